"""What every kernel is launched with: the tensors as they lie in memory, the sizes, what is special."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from difftune.ops.triton.tiles import SMALL, TILES, Tiles


def is_interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on the CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def architecture(device: str, index: int | None) -> int:
    """Key of `TILES` for a device: its compute capability, 90 for 9.0, or SMALL for the interpreter; -1 for others."""
    if is_interpreted():
        return SMALL
    if device != "cuda":
        return -1
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def rows_in_memory(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied only where the kernels cannot read it: its last axis must be dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass
class Problem:
    """One differential attention, as the kernels see it; the arguments of the operators, checked by their caller."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lam: torch.Tensor
    norm_weight: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    key_padding_mask: torch.Tensor | None
    max_length: int
    causal: bool
    scale: float
    norm_eps: float

    def __post_init__(self) -> None:
        """Copy what does not lie in rows."""
        self.q, self.k, self.v = (rows_in_memory(x) for x in (self.q, self.k, self.v))

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """B, T, H, E."""
        B, T, H = self.q.shape[:3]
        return B, T, H, self.v.shape[3]

    @property
    def sequences(self) -> int:
        """Rows, or packed documents."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def max_queries(self) -> int:
        """Queries of the longest sequence."""
        return self.q.shape[1] if self.cu_seqlens is None else self.max_length

    @property
    def max_keys(self) -> int:
        """Keys of the longest sequence."""
        return self.k.shape[1] if self.cu_seqlens is None else self.max_length

    @cached_property
    def tiles(self) -> Tiles:
        """Tile sizes on this device."""
        wide = self.q.dtype == torch.float32
        arch = SMALL if wide else architecture(self.q.device.type, self.q.device.index)
        return TILES[arch][self.q.shape[4], self.v.shape[3]]

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What all kernels take, by name."""
        q, k, v, lam, mask = self.q, self.k, self.v, self.lam, self.key_padding_mask
        H = q.shape[2]
        strides_l = {0: (0, 0, 0), 1: (0, 0, *lam.stride()), 3: lam.stride()}[lam.ndim]
        return {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "lam_ptr": lam,
            "cu_ptr": self.cu_seqlens,
            # Triton reads whole bytes, and a bool is one.
            "mask_ptr": None if mask is None else mask.contiguous().view(torch.int8),
            **dict(zip(("stride_qb", "stride_qt", "stride_qh", "stride_qp"), q.stride(), strict=False)),
            **dict(zip(("stride_kb", "stride_kt", "stride_kh", "stride_kp"), k.stride(), strict=False)),
            **dict(zip(("stride_vb", "stride_vt", "stride_vh"), v.stride(), strict=False)),
            **dict(zip(("stride_lb", "stride_lt", "stride_lh"), strides_l, strict=True)),
            "H": H,
            "T": q.shape[1],
            "S": k.shape[1],
            # exp2 is what the hardware has.
            "scale": self.scale * math.log2(math.e),
            "GROUP": H // k.shape[2],
            "D": q.shape[4],
            "E": v.shape[3],
            "CAUSAL": self.causal,
            "VARLEN": self.cu_seqlens is not None,
            "PADDED": mask is not None,
            "SHARED": k.shape[3] == 1,
            "LAM_TOKEN": lam.ndim == 3,
            "INTERPRET": is_interpreted(),
        }
