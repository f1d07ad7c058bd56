"""The one rule by which a backend is compared with the equation; no tuned constants.

``truth`` is the reference on the same rounded inputs in float64, ``plain`` the reference in the working dtype. The
error of what is tested may be twice the error of ``plain``, plus four units in the last place of the largest value.
"""

from collections.abc import Callable, Sequence

import torch


def assert_within_budget(
    name: str, actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, scale: float | None = None
) -> None:
    """Fail, with the three numbers, where ``actual`` is further from ``truth`` than the budget.

    ``scale`` replaces ``max|truth|`` for sums whose terms cancel (the difference of two maps, the
    gradients of lambda, queries and keys): the largest sum of their absolute values.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if not truth.numel():
        return
    scale = truth.abs().max().item() if scale is None else scale
    error = (actual.double() - truth).abs().max().item()
    plain_error = (plain.double() - truth).abs().max().item()
    budget = 2 * plain_error + 4 * torch.finfo(plain.dtype).eps * scale
    assert error <= budget, f"{name}: error {error:.3e} over budget {budget:.3e} (plain {plain_error:.3e})"


def outputs_and_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], cotangent: torch.Tensor
) -> list[torch.Tensor]:
    """``[function(*inputs), gradient of each input]`` under ``cotangent``, on fresh leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
    return [out.detach(), *gradients]
