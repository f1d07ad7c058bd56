"""The parametrisations of lambda, the weight of the negative map: a module each, so that others can name them.

Both compute in float32 whatever the model's dtype: in bfloat16 a step of the optimiser is smaller than the spacing of
the numbers around lambda.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def lambda_init_at(layer_idx: int) -> float:
    """``0.8 - 0.6 exp(-0.3 layer_idx)``, layers counted from 0: 0.2 in the first layer.

    Source: arXiv:2410.05258, section 2.1, which counts from 1.

    Example:
        >>> round(lambda_init_at(0), 4), round(lambda_init_at(27), 4)
        (0.2, 0.7998)
    """
    return 0.8 - 0.6 * math.exp(-0.3 * layer_idx)


class LambdaV1(nn.Module):
    """``exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init``: one scalar a layer.

    Source: arXiv:2410.05258, Eq. (2).

    Args:
        head_dim: Length of the four vectors.
        lambda_init: The constant part, dimensionless.
    """

    def __init__(self, head_dim: int, lambda_init: float) -> None:
        super().__init__()
        self.lambda_init = lambda_init
        self.lambda_q1 = nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))
        self.lambda_k1 = nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))
        self.lambda_q2 = nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))
        self.lambda_k2 = nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Lambda, shape ``()``, float32 (float64 for a float64 module); ``hidden_states`` plays no part in V1."""
        dtype = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (p.to(dtype) for p in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init

    def extra_repr(self) -> str:
        """The constant part, for ``print(model)``."""
        return f"lambda_init={self.lambda_init:.4f}"


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
