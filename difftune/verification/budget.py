"""The one rule by which two ways of a computation are compared; no tuned constants.

``truth`` is the reference on the same rounded inputs in a wider dtype, ``plain`` the reference in the working dtype.
The error of what is tested may be twice the error of ``plain``, plus four units in the last place of the largest value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Deviation:
    """How far a result is from the truth, and how far it may be."""

    name: str
    """Of the result."""
    error: float
    """Largest difference from the truth; NaN where the result has a value that is not finite."""
    budget: float
    """What the error has to stay within."""
    plain_error: float
    """The error of the reference in the working dtype."""

    @property
    def holds(self) -> bool:
        """Whether the error is within the budget; false for NaN."""
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """The error as a share of the budget; infinite for NaN, or where nothing is allowed and something is found."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.budget if self.budget else (math.inf if self.error else 0.0)

    def __str__(self) -> str:
        """The three numbers."""
        return f"{self.name}: error {self.error:.3e}, budget {self.budget:.3e} (plain {self.plain_error:.3e})"


def deviation(
    name: str, actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, scale: float | None = None
) -> Deviation:
    """Measure a result by the rule of this module.

    Args:
        name: Of the result.
        actual: What is tested, any shape.
        plain: The reference in the working dtype, same shape.
        truth: The reference in a wider dtype, same shape.
        scale: Replaces ``max|truth|`` for sums whose terms cancel (the difference of two maps, the gradients of lambda,
            queries and keys): the largest sum of their absolute values.

    Returns:
        Error and budget; a wrong shape is an error that no budget allows.

    Example:
        >>> one = torch.ones(1)
        >>> deviation("x", one * 1.01, one, one.double()).holds
        False
    """
    if actual.shape != truth.shape:
        return Deviation(f"{name} of shape {tuple(actual.shape)}, not {tuple(truth.shape)},", math.nan, 0.0, 0.0)
    if not truth.numel():
        return Deviation(name, 0.0, 0.0, 0.0)
    scale = truth.abs().max().item() if scale is None else scale
    error = (actual.to(truth.dtype) - truth).abs().max().item()
    plain_error = (plain.to(truth.dtype) - truth).abs().max().item()
    budget = 2 * plain_error + 4 * torch.finfo(plain.dtype).eps * scale
    return Deviation(name, error if math.isfinite(error) else math.nan, budget, plain_error)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the truth: float32 for 16 bits, float64 for float32 and float64."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64
