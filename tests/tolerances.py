"""The rule of `difftune.verification.budget`, as an assertion."""

import torch

from difftune.verification.budget import deviation


def assert_within_budget(
    name: str, actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, scale: float | None = None
) -> None:
    """Fail, with the three numbers, where ``actual`` is further from ``truth`` than the budget."""
    found = deviation(name, actual, plain, truth, scale)
    assert found.holds, f"over budget: {found}"
