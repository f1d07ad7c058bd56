"""Attention of a few queries over a cache of keys: what generation does a token; checks, operator, dispatch.

``difftune::diff_attention_decode`` reads a cache once for both maps: one that grows, one of fixed size of which
``lengths`` says how far it is filled, or pages behind a table.
"""

from __future__ import annotations

from typing import Any

import torch

from difftune.ops.documents import Documents
from difftune.ops.shapes import check_diff_shapes
from difftune.ops.triton.launch import architecture, is_interpreted

# Tokens of a row: with more, the forward kernel fills its tiles.
MAX_QUERIES = 8
HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def diff_attention_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    *,
    causal: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Differential attention of a few queries over a cache that is read once; without gradients.

    As `difftune.ops.diff_attention`, for rows of unequal lengths and for pages. The queries of a row are its last
    ``T`` tokens. A query that sees no key returns 0.

    Args:
        q: Queries, shape ``(B, T, H, 2, D)`` with D one of 16, 32, 64, 128.
        k: Keys, shape ``(B, S, G, 2, D)``, or ``(B, S, G, 1, D)`` when the pair shares them (V2), in any strides with
            a dense last axis; with ``block_table`` ``(pages, page size, G, 2 or 1, D)``.
        v: Values, shape ``(B, S, G, E)`` with ``E = 2 * D`` or ``D``, or ``(B, S, G, 2, D)`` where the halves do not
            lie side by side; with ``block_table`` ``(pages, page size, G, ...)``.
        lam: Weight of the negative map, shape ``()``, ``(H,)`` or ``(B, T, H)``.
        causal: Query t of a row with n keys sees keys ``s <= t + n - T``.
        key_padding_mask: Bool, shape ``(B, S)``, True where a key is real. Default: all real.
        lengths: Keys n of each row, int32, shape ``(B,)``, at most S; what lies behind is not read. Default: S.
        block_table: Pages of each row in order, int32, shape ``(B, pages a row)``, for a page size that is a power of
            two; needs ``lengths``. Entries are not checked, and those behind the length of a row are not read.
        scale: Multiplies the logits. Default: ``D ** -0.5``.
        norm_weight: Weight of an RMSNorm over E of the result, shape ``(E,)``. Default: no norm.
        norm_eps: Added to the mean square.
        num_splits: Parts that the keys of a row are cut into. Default: as many as fill the device.

    Returns:
        Shape ``(B, T, H, E)``, dtype of ``q``.

    Raises:
        ValueError: If shapes, dtypes or masks do not fit together, or are not covered.

    Source:
        Ye et al., "Differential Transformer", arXiv:2410.05258, Eq. (1); the cut over the keys is that of
        Flash-Decoding (Dao, Haziza, Massa, Sizov, October 2023).
    """
    D, E = q.shape[-1], v.shape[3:].numel()
    if D not in HEAD_DIMS or E not in (D, 2 * D) or not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        raise ValueError(
            f"decoding takes D of {', '.join(map(str, HEAD_DIMS))}, values of D or 2 D and one dtype of float32, "
            f"float16, bfloat16, got q {_in_words(q)}, k {_in_words(k)}, v {_in_words(v)}; use diff_attention"
        )
    if not is_served(q):
        raise ValueError(
            f"decoding needs a CUDA device of compute capability 8.0 or more, or TRITON_INTERPRET=1, got "
            f"{q.device}; use diff_attention with backend='sdpa'"
        )
    halves = v if v.ndim == 5 else v.unflatten(-1, (-1, D))
    _check(q, k, halves, lam, key_padding_mask, lengths, block_table)
    if norm_weight is not None and tuple(norm_weight.shape) != (E,):
        raise ValueError(f"norm_weight must have shape ({E},), got {tuple(norm_weight.shape)}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    return torch.ops.difftune.diff_attention_decode(
        q,
        k,
        halves,
        lam,
        norm_weight,
        key_padding_mask,
        lengths,
        block_table,
        causal,
        D**-0.5 if scale is None else scale,
        norm_eps,
        num_splits or 0,
    )


@torch.library.custom_op(
    "difftune::diff_attention_decode",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor lam, Tensor? norm_weight, Tensor? key_padding_mask, Tensor? lengths, "
    "Tensor? block_table, bool causal, float scale, float norm_eps, int num_splits) -> Tensor",
)
def _decode(*arguments: Any) -> torch.Tensor:
    from difftune.ops.triton.decode import decode

    return decode(*arguments)


@_decode.register_fake
def _decode_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3] * v.shape[4])


def is_decoding(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    norm_weight: torch.Tensor | None,
    documents: Documents | None,
) -> bool:
    """Whether the decode kernel should serve a call of the backend `triton`: few queries, and no gradient wanted."""
    learned = [x for x in (q, k, v, lam, norm_weight) if x is not None and x.requires_grad]
    return q.shape[1] <= MAX_QUERIES and documents is None and not (torch.is_grad_enabled() and learned)


def is_served(q: torch.Tensor) -> bool:
    """Whether the kernel runs where ``q`` lies."""
    return is_interpreted() or architecture(q.device.type, q.device.index) >= 80


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    halves: torch.Tensor,
    lam: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> None:
    B = q.shape[0]
    if lengths is not None and (lengths.dtype != torch.int32 or tuple(lengths.shape) != (B,)):
        raise ValueError(f"lengths must be int32 of shape ({B},), got {_in_words(lengths)}")
    if block_table is None:
        check_diff_shapes(q, k, halves[..., 0, :], lam)
        S = k.shape[1]
    else:
        if lengths is None:
            raise ValueError("block_table needs lengths, which say how far the pages of each row are filled")
        if block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.shape[0] != B:
            raise ValueError(f"block_table must be int32 of shape ({B}, pages a row), got {_in_words(block_table)}")
        page = k.shape[1]
        if page < 1 or page & (page - 1):
            raise ValueError(f"the page size must be a power of two, got {page}")
        if k.shape[:3] != halves.shape[:3]:
            raise ValueError(f"k and v must have the same pages and groups, got {_in_words(k)} and {_in_words(halves)}")
        # One page for every row: heads, pair and dims are then checked as without a table.
        check_diff_shapes(q, k[:1].expand(B, -1, -1, -1, -1), halves[:1, ..., 0, :].expand(B, -1, -1, -1), lam)
        S = block_table.shape[1] * page
    if key_padding_mask is not None and (
        key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (B, S)
    ):
        raise ValueError(f"key_padding_mask must be bool of shape ({B}, {S}), got {_in_words(key_padding_mask)}")


def _in_words(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"
