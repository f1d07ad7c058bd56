"""Rotary position embedding, with a backward pass that rotates back and keeps no activations."""

from __future__ import annotations

from typing import Any

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the two halves of each head against one another (Llama's convention).

    ``(x_1 cos - x_2 sin, x_2 cos + x_1 sin)`` for the halves ``x_1, x_2`` of the last axis.

    Args:
        x: Heads, shape ``(B, T, ..., D)``.
        cos: Cosines, shape ``(B or 1, T, D)``, of which the two halves are equal; dtype of ``x`` or wider, as under
            autocast, where the embeddings are float32 and the projections are not.
        sin: Sines, likewise.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: If the shapes do not fit together.

    Source:
        Su et al., "RoFormer", arXiv:2104.09864, Eq. (34), with the pairs (i, i + D/2).

    Example:
        >>> angle = torch.full((1, 1, 2), torch.pi / 2)
        >>> rotate(torch.tensor([[[1.0, 0.0]]]), angle.cos(), angle.sin()).round()
        tensor([[[-0., 1.]]])
    """
    B, T, D = x.shape[0], x.shape[1], x.shape[-1]
    if cos.shape != sin.shape or cos.shape[0] not in (1, B) or tuple(cos.shape[1:]) != (T, D):
        raise ValueError(
            f"cos and sin must have shape ({B} or 1, {T}, {D}), got {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    shape = (cos.shape[0], T, *(1,) * (x.ndim - 3), D // 2)
    return _Rotate.apply(x, cos[..., : D // 2].view(shape), sin[..., : D // 2].view(shape))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    # Not into the halves of one tensor through out=: torch.compile gives wrong numbers for that (torch 2.13).
    left = torch.addcmul(first * cos, second, sin, value=-direction)
    right = torch.addcmul(second * cos, first, sin, value=direction)
    # Rounded last, and back to what came in: attention kernels refuse queries that are wider than their values.
    return torch.cat((left, right), dim=-1).to(x.dtype)
