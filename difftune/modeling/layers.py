"""The parts of a block that are not attention: norms, cosines and sines, gated unit."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from difftune.modeling.configuration import DiffTransformerConfig
from difftune.ops import rms_norm


def build_rotary(config: DiffTransformerConfig) -> nn.Module:
    """Cosines and sines of positions, with every scaling that transformers knows (linear, dynamic, yarn, llama3, ...).

    Returns:
        A module called as ``rotary(x, position_ids=positions)`` with positions ``(B or 1, T)``; it returns cosines and
        sines, each ``(B or 1, T, D)``, in the dtype of ``x``.
    """
    # Llama's module reads head_dim, max_position_embeddings and rope_parameters of any config that has them.
    return LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis.

    Args:
        size: Length of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as ``x``."""
        return rms_norm(x, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        """Size and epsilon, for ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SubLayerNorm(nn.Module):
    """The norm of each V1 head's output, and the constant that keeps its gradient at the baseline's scale.

    ``(1 - lambda_init) * x / sqrt(mean(x^2) + eps) * weight``, with or without the weight (shared by the heads).
    Holds the parameter; `difftune.ops.diff_attention` applies the norm, so that a kernel can fuse it.

    Source: arXiv:2410.05258, Eq. (3).

    Args:
        size: Width of a head's output, E.
        eps: Added to the mean square.
        scale: ``1 - lambda_init`` of the layer.
        affine: Whether there is a weight.
    """

    def __init__(self, size: int, eps: float, scale: float, affine: bool) -> None:
        super().__init__()
        self.size, self.eps, self.scale = size, eps, scale
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def scaled_weight(self, x: torch.Tensor) -> torch.Tensor:
        """``(1 - lambda_init) * weight``, shape ``(E,)``, on the device of ``x``, in float32 or its dtype if wider."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.weight is None:
            return torch.full((self.size,), self.scale, dtype=dtype, device=x.device)
        return self.scale * self.weight.to(dtype)

    def extra_repr(self) -> str:
        """Size, epsilon, scale and kind, for ``print(model)``."""
        return f"{self.size}, eps={self.eps}, scale={self.scale:.4f}, affine={self.weight is not None}"


class SwiGLU(nn.Module):
    """``down(act(gate(x)) * up(x))``.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.

    Attributes:
        chunk: Tokens at once, each chunk computed again in the backward pass, so that of the inner width that of one
            chunk is all that is held. None: all tokens, once.
    """

    def __init__(self, config: DiffTransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.chunk: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape ``(..., C)`` to ``(..., C)``."""
        if self.chunk is None or x.shape[:-1].numel() <= self.chunk:
            return self._unit(x)
        parts = x.flatten(0, -2).split(self.chunk)
        if torch.is_grad_enabled():
            done = [checkpoint(self._unit, part, use_reentrant=False) for part in parts]
        else:
            done = [self._unit(part) for part in parts]
        return torch.cat(done).view_as(x)

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
