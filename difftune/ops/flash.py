"""Softmax attention through flash-attn 4, 3 or 2, whichever is installed. Imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from difftune.ops.documents import Documents

MAX_HEAD_DIM = 256
INSTALL = "pip install 'difftune[flash]' (flash-attn 2; needs a CUDA toolkit that matches torch)"
# Newest first; each offers flash_attn_func and flash_attn_varlen_func with causal= and softmax_scale=.
MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")


@cache
def load_flash() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The dense and the variable-length function of the newest flash-attn that is installed.

    Raises:
        ImportError: If none is installed, with the install line; or the library's own error if one is broken.
    """
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and name.startswith(error.name):
                continue
            raise
        return module.flash_attn_func, module.flash_attn_varlen_func
    raise ImportError(f"backend='flash' needs flash-attn, which is not installed: {INSTALL}, or choose backend='sdpa'")


def is_available() -> bool:
    """Whether a flash-attn can be imported."""
    try:
        load_flash()
    except ImportError:
        return False
    return True


def supports(q: torch.Tensor) -> bool:
    """Whether device, dtype and head dim of ``q`` are ones that flash-attn takes."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= MAX_HEAD_DIM


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    key_padding_mask: torch.Tensor | None,
    documents: Documents | None,
    scale: float,
) -> torch.Tensor:
    """``softmax(q k^T * scale) v`` for ``q (B, T, N, D)``, ``k (B, S, M, D)``, ``v (B, S, M, E)``: ``(B, T, N, E)``.

    Values wider than the keys are cut into pieces of ``D``, one call each, because flash-attn 2 wants equal widths.

    Raises:
        ValueError: If ``E`` is not a multiple of ``D``, or dtype or head dim are ones that flash-attn does not take.
    """
    dense, varlen = load_flash()
    D, E = q.shape[-1], v.shape[-1]
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"backend='flash' takes float16 or bfloat16, got {q.dtype}; choose backend='sdpa'")
    if D > MAX_HEAD_DIM or E % D:
        raise ValueError(f"backend='flash' needs D <= {MAX_HEAD_DIM} and E a multiple of D, got D={D}, E={E}")
    pieces = v.split(D, dim=-1)
    options = {"causal": causal, "softmax_scale": scale}
    if documents is not None:
        B = q.shape[0]
        bounds = _bounds(documents.cu_seqlens, documents.cu_seqlens, documents.max_length, documents.max_length)
        outputs = [
            _first(varlen(q.flatten(0, 1), k.flatten(0, 1), piece.flatten(0, 1), **bounds, **options)).unflatten(
                0, (B, -1)
            )
            for piece in pieces
        ]
    elif key_padding_mask is not None:
        outputs = _unpadded(varlen, q, k, pieces, key_padding_mask, options)
    else:
        outputs = [_first(dense(q, k, piece, **options)) for piece in pieces]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _unpadded(
    varlen: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    pieces: tuple[torch.Tensor, ...],
    key_padding_mask: torch.Tensor,
    options: dict[str, Any],
) -> list[torch.Tensor]:
    # Queries are the last T positions, so their padding is the mask's last T columns.
    query_mask = key_padding_mask[:, -q.shape[1] :]
    q_lengths, k_lengths = query_mask.sum(1), key_padding_mask.sum(1)
    bounds = _bounds(_cumulative(q_lengths), _cumulative(k_lengths), int(q_lengths.max()), int(k_lengths.max()))
    outputs = []
    for piece in pieces:
        real = _first(varlen(q[query_mask], k[key_padding_mask], piece[key_padding_mask], **bounds, **options))
        out = real.new_zeros(*q.shape[:3], piece.shape[-1])
        outputs.append(out.masked_scatter(query_mask[:, :, None, None], real))
    return outputs


def _bounds(cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int) -> dict[str, Any]:
    return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _first(result: Any) -> torch.Tensor:
    # flash-attn 3 and 4 return (out, lse), flash-attn 2 returns out.
    return result[0] if isinstance(result, tuple) else result
