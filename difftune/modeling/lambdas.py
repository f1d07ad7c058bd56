"""The parametrisations of lambda, the weight of the negative map: a module each, so that others can name them.

Both compute in float32 whatever the model's dtype: in bfloat16 a step of the optimiser is smaller than the spacing of
the numbers around lambda.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

WARMUP_STEP = "warmup_step"
"""Name of the buffer that counts the steps of a warm-up, below the name of the lambda module."""


def lambda_init_at(layer_idx: int) -> float:
    """``0.8 - 0.6 exp(-0.3 layer_idx)``, layers counted from 0: 0.2 in the first layer.

    Source: arXiv:2410.05258, section 2.1, which counts from 1.

    Example:
        >>> round(lambda_init_at(0), 4), round(lambda_init_at(27), 4)
        (0.2, 0.7998)
    """
    return 0.8 - 0.6 * math.exp(-0.3 * layer_idx)


def lambda_v1(
    q1: torch.Tensor, k1: torch.Tensor, q2: torch.Tensor, k2: torch.Tensor, lambda_init: float
) -> torch.Tensor:
    """``exp(q1 . k1) - exp(q2 . k2) + lambda_init`` of four vectors ``(D,)``: a scalar, float32 (or float64).

    Source: arXiv:2410.05258, Eq. (2).

    Example:
        >>> lambda_v1(*torch.zeros(4, 8), lambda_init=0.5).item()
        0.5
    """
    dtype = torch.promote_types(q1.dtype, torch.float32)
    q1, k1, q2, k2 = (vector.to(dtype) for vector in (q1, k1, q2, k2))
    return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + lambda_init


def warmup_factor(step: torch.Tensor, steps: int) -> torch.Tensor:
    """``min(1, (step + 1) / (steps + 1))``, by which lambda is multiplied after ``step`` of ``steps`` optimiser steps.

    Example:
        >>> [round(warmup_factor(torch.tensor(float(step)), 3).item(), 2) for step in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return ((step + 1) / (steps + 1)).clamp(max=1)


class LambdaV1(nn.Module):
    """``exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init``: one scalar a layer.

    During a warm-up of N optimiser steps that is multiplied by ``(step + 1) / (N + 1)``: small at the start, never 0,
    where the second map would get no gradient, and exactly 1 after N steps. The step is a buffer, saved with the
    weights; a module without warm-up has none.

    Source: arXiv:2410.05258, Eq. (2); the warm-up is this package's.

    Args:
        head_dim: Length of the four vectors.
        lambda_init: The constant part, dimensionless.
        warmup_steps: N, optimiser steps; 0 is none.
    """

    def __init__(self, head_dim: int, lambda_init: float, warmup_steps: int = 0) -> None:
        super().__init__()
        self.lambda_init = lambda_init
        self.lambda_q1 = nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))
        self.lambda_k1 = nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))
        self.lambda_q2 = nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))
        self.lambda_k2 = nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))
        self.warm_up(warmup_steps)

    def warm_up(self, steps: int) -> None:
        """Begin a warm-up of so many optimiser steps; 0 ends it, and lambda is whole at once."""
        self.warmup_steps = steps
        if steps:
            # float32, as everything here: who loads a checkpoint takes integers for quantised weights.
            step = torch.zeros((), dtype=torch.float32, device=self.lambda_q1.device)
            self.register_buffer(WARMUP_STEP, step)
        elif WARMUP_STEP in self._buffers:
            del self._buffers[WARMUP_STEP]

    def advance(self) -> None:
        """Count one optimiser step of the warm-up; nothing where there is none or it has ended."""
        if self.warmup_steps:
            self.get_buffer(WARMUP_STEP).add_(1).clamp_(max=self.warmup_steps)

    def forward(self, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Lambda, shape ``()``, float32 (float64 for a float64 module); ``hidden_states`` plays no part in V1."""
        whole = lambda_v1(self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2, self.lambda_init)
        if not self.warmup_steps:
            return whole
        return whole * warmup_factor(self.get_buffer(WARMUP_STEP).to(whole.dtype), self.warmup_steps)

    def extra_repr(self) -> str:
        """The constant part, for ``print(model)``."""
        warmup = f", warmup_steps={self.warmup_steps}" if self.warmup_steps else ""
        return f"lambda_init={self.lambda_init:.4f}{warmup}"


class LambdaV2(nn.Module):
    """``sigmoid(lambda_proj x)``: one number a token and differential head.

    Source: "Differential Transformer V2", Microsoft, January 2026.

    Args:
        hidden_size: Width of the hidden states.
        num_diff_heads: Differential heads, H.
    """

    def __init__(self, hidden_size: int, num_diff_heads: int) -> None:
        super().__init__()
        self.lambda_proj = nn.Linear(hidden_size, num_diff_heads, bias=False, dtype=torch.float32)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Lambda in (0, 1), shape ``(B, T, H)``, float32 (float64 for a float64 module)."""
        dtype = torch.promote_types(self.lambda_proj.weight.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = self.lambda_proj(hidden_states.to(self.lambda_proj.weight.dtype))
        return logits.to(dtype).sigmoid()


def warming_up(model: nn.Module) -> Iterator[LambdaV1]:
    """The lambda modules of a model whose warm-up training has to advance.

    Under an adapter that trains lambda these are its own copies; the frozen ones stay where the base was.

    Args:
        model: A model, with or without adapters.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LambdaV1) or not module.warmup_steps or "original_module" in name.split("."):
            continue
        if "modules_to_save" not in name.split(".") or any(p.requires_grad for p in module.parameters()):
            yield module
