"""Which attentions the kernels cover: dtype, shape, device."""

from __future__ import annotations

import importlib.util

import torch

from difftune.ops.triton.launch import architecture
from difftune.ops.triton.tiles import TILES

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INSTALL = "pip install triton (Linux; CUDA builds of torch bring it), or choose backend='sdpa'"


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype in which ``x`` enters a product here: its own, or that of autocast."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def why_not(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, auto: bool) -> str | None:
    """What keeps the kernels from computing a differential attention of these tensors, or None.

    Args:
        q: Queries ``(B, T, H, 2, D)``.
        k: Keys ``(B, S, G, 2 or 1, D)``.
        v: Values ``(B, S, G, E)``.
        scale: Multiplies the logits.
        auto: Whether they must also be the best choice.
    """
    dtypes = sorted({compute_dtype(x) for x in (q, k, v)}, key=str)
    arch = architecture(q.device.type, q.device.index)
    D, E = q.shape[-1], v.shape[-1]
    if arch not in TILES:
        where = f"{q.device.type}, compute capability {arch // 10}.{arch % 10}" if arch > 0 else q.device.type
        known = ", ".join(f"{arch // 10}.{arch % 10}" for arch in TILES if arch > 0)
        return f"device {where}: the kernels are for CUDA devices of compute capability {known}"
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        return f"{', '.join(map(str, dtypes))}: q, k and v must be all bfloat16, float16 or float32"
    if auto and dtypes[0] == torch.float32:
        # Exact float32 products, without tensor cores and with registers spilled: right, and slow.
        return "float32 is computed without tensor cores"
    if (D, E) not in TILES[arch] or k.shape[3] * D != E:
        dims = ", ".join(map(str, sorted({D for D, _ in TILES[arch]})))
        return f"D={D}, E={E}, {k.shape[3]} keys a pair: the kernels take D of {dims}, E=2D for 2 keys, E=D for 1"
    if scale <= 0:
        return f"scale={scale}: the kernels need a positive one"
    return None
