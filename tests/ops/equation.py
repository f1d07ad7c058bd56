"""`difftune.verification.equation`, as an assertion."""

from typing import Any

import torch

from difftune.verification.equation import diff_deviations


def assert_equals_the_equation(inputs: list[torch.Tensor], backend: str, device: str = "cpu", **masks: Any) -> None:
    """Output and every gradient of a backend are within the budget of the equation in float64."""
    wrong = [str(found) for found in diff_deviations(inputs, backend, device, **masks) if not found.holds]
    assert not wrong, f"over budget: {'; '.join(wrong)}"
