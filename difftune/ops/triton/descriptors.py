"""Tensor descriptors: tiles of rows by the memory unit of sm_90 (TMA) instead of one pointer for each element.

A descriptor covers a whole tensor; what lies beyond it reads as zero. `difftune.ops.triton.primitives.load_rows` takes
one where there is one, and pointers where there is none: the same kernel, the same numbers.
"""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16
"""Bytes of which TMA asks the base and every stride to be multiples."""


def is_aligned(x: torch.Tensor) -> bool:
    """Whether TMA can read ``x`` where it lies: rows dense, base and strides multiples of 16 bytes, none of them 0."""
    # The stride of an axis of one element is never used.
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return (
        x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % ALIGNMENT == 0
        and all(stride > 0 and stride * x.element_size() % ALIGNMENT == 0 for stride in strides)
    )


def describe(x: torch.Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Descriptor of an aligned tensor, by tiles of the shape ``block``."""
    # Triton checks the strides of axes of one element too.
    strides = [stride if size > 1 else ALIGNMENT for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], list(block))


def describe_heads(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of ``(B, T, H, D)`` or ``(B, T, H, P, D)`` as ``(B, H, P, T, D)``, by tiles of ``rows`` x D."""
    pairs = x if x.ndim == 5 else x.unsqueeze(3)
    return describe(pairs.permute(0, 2, 3, 1, 4), (1, 1, 1, rows, x.shape[-1]))
