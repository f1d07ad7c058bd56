"""Which attentions the kernels cover: dtype, shape, device."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from difftune.ops.triton.launch import architecture
from difftune.ops.triton.tiles import TILES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def is_installed() -> bool:
    """Whether Triton can be imported; CUDA builds of torch bring it."""
    return importlib.util.find_spec("triton") is not None


def why_not(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from computing a differential attention of these shapes in ``dtype``, or None.

    Args:
        q: Queries ``(B, T, H, 2, D)``.
        k: Keys ``(B, S, G, 2 or 1, D)``.
        v: Values ``(B, S, G, E)``.
        scale: Multiplies the logits.
        dtype: In which to compute.
    """
    arch = architecture(q.device.type, q.device.index)
    D, E = q.shape[-1], v.shape[-1]
    if arch not in TILES:
        where = f"{q.device.type}, compute capability {arch // 10}.{arch % 10}" if arch > 0 else q.device.type
        known = ", ".join(f"{arch // 10}.{arch % 10}" for arch in TILES if arch > 0)
        return f"device {where}: the kernels are for CUDA devices of compute capability {known}"
    if dtype not in DTYPES:
        return f"dtype {dtype}: the kernels take bfloat16, float16 and float32"
    if (D, E) not in TILES[arch] or E != k.shape[3] * D:
        dims = ", ".join(map(str, sorted({D for D, _ in TILES[arch]})))
        return f"D={D}, E={E}, {k.shape[3]} keys a pair: the kernels take D of {dims}, E=2D for 2 keys, E=D for 1"
    if scale <= 0:
        return f"scale={scale}: the kernels need a positive one"
    return None
