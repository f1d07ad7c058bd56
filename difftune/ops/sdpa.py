"""Softmax attention through torch's scaled_dot_product_attention, arranged so that torch takes a fused path.

Torch's fused kernels want values as wide as the keys and no dense mask. Differential V1 has values twice as wide, so
on the CPU queries and keys are padded with zeros (the softmax is computed once, 10 to 20 % faster than two calls);
elsewhere the values are cut into pieces, one call each, since fused GPU kernels end at 128 or 256 dims a head. A few
queries over many keys, as in decoding, are another matter on the CPU: there the maps are small enough to be subtracted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from difftune.ops.documents import Documents
from difftune.ops.last_queries import in_blocks, last_queries
from difftune.ops.shapes import visible

_FEW_QUERIES = 8
# Of a dense mask that is made at once: 4 MiB, and four times that where torch makes floats of it.
_MASK_ELEMENTS = 2**22


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    key_padding_mask: torch.Tensor | None,
    documents: Documents | None,
    scale: float,
) -> torch.Tensor:
    """``softmax(q k^T * scale) v`` for ``q (B, T, N, D)``, ``k (B, S, M, D)``, ``v (B, S, M, E)``: ``(B, T, N, E)``."""
    if documents is not None and documents.max_length < q.shape[1]:
        return _by_document(q, k, v, causal, documents, scale)
    T, S = q.shape[1], k.shape[1]
    if key_padding_mask is None and causal and T == S:
        return _fused(q, k, v, None, True, scale)
    if key_padding_mask is None and causal and 1 < T < S and T * S > _MASK_ELEMENTS:
        return _last_queries(q, k, v, scale)
    mask = visible(T, S, q.device, causal, key_padding_mask, None)
    return _fused(q, k, v, None if mask is None else mask[:, None], False, scale)


def _last_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    if q.device.type == "cpu":
        return last_queries(q, k, v, scale)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = visible(q.shape[1], k.shape[1], q.device, True, None, None)
        return _fused(q, k, v, None if mask is None else mask[:, None], False, scale)

    return in_blocks(attend, q, k, v, rows=max(1, _MASK_ELEMENTS // k.shape[1]))


def _by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, documents: Documents, scale: float
) -> torch.Tensor:
    rows = q.shape[0]
    q, k, v = documents.group(q), documents.group(k), documents.group(v)
    parts = []
    for start, bucket_rows, width, lengths in documents.buckets:
        window = slice(start, start + bucket_rows * width)
        shape = (bucket_rows, width)
        mask = None
        if not causal and lengths[-1] < width:
            real = torch.arange(width, device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
            mask = real[:, None, None, :]
        bucket_q, bucket_k, bucket_v = (x[window].unflatten(0, shape) for x in (q, k, v))
        parts.append(_fused(bucket_q, bucket_k, bucket_v, mask, causal, scale).flatten(0, 1))
    return documents.ungroup(torch.cat(parts), rows)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    D, E = q.shape[-1], v.shape[-1]
    if D < E and q.device.type == "cpu":
        q, k = F.pad(q, (0, E - D)), F.pad(k, (0, E - D))
    pieces = [v] if q.shape[-1] == E or E % D else v.split(D, dim=-1)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    outputs = [
        F.scaled_dot_product_attention(
            q, k, piece.transpose(1, 2), attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        for piece in pieces
    ]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return out.transpose(1, 2)


def forms_difference_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: torch.Tensor, documents: Documents | None
) -> bool:
    """Whether :func:`few_queries` is the faster way: decoding on the CPU, where the maps are small and V is large."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, lam))
    # Half precision would round the logits.
    alike = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.float64)
    fits = q.device.type == "cpu" and alike and documents is None
    return fits and not learns and q.shape[1] <= _FEW_QUERIES < k.shape[1]


def few_queries(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    *,
    causal: bool,
    key_padding_mask: torch.Tensor | None,
    documents: Documents | None,
    scale: float,
) -> torch.Tensor:
    """``(A_1 - lam A_2) v`` with the difference formed first, so that V is read once: ``(B, T, H, E)``.

    Arguments as `difftune.ops.diff_attention`, inside :func:`forms_difference_first`.
    """
    assert documents is None
    # In the dtype of the inputs: autocast would round the logits.
    with torch.autocast(q.device.type, enabled=False):
        return _few_queries(q, k, v, lam, causal, key_padding_mask, scale)


def _few_queries(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    causal: bool,
    key_padding_mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    (_B, T, H), (S, G) = q.shape[:3], k.shape[1:3]
    # Query heads of a group are rows of one product, so that its keys are read once.
    q_BGPRD = (q * scale).unflatten(2, (G, H // G)).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)
    k_BGPDS = k.permute(0, 2, 3, 4, 1)
    if k.shape[3] == 1:
        logits_BGPRS = torch.matmul(q_BGPRD.flatten(2, 3), k_BGPDS[:, :, 0]).unflatten(2, (2, -1))
    else:
        # A map at a time: with the pair inside, torch would copy the cache.
        logits_BGPRS = torch.stack([torch.matmul(q_BGPRD[:, :, p], k_BGPDS[:, :, p]) for p in (0, 1)], dim=2)
    mask = visible(T, S, q.device, causal, key_padding_mask, None)
    if mask is None:
        maps = logits_BGPRS.softmax(-1)
    else:
        hidden = ~mask.repeat_interleave(H // G, dim=1)[:, None, None]
        # Finite, so that a row that sees no key is not NaN before it is zeroed.
        lowest = torch.finfo(logits_BGPRS.dtype).min
        maps = logits_BGPRS.masked_fill_(hidden, lowest).softmax(-1).masked_fill_(hidden, 0.0)
    if lam.ndim == 3:
        lam = lam.unflatten(2, (G, H // G)).permute(0, 2, 1, 3).flatten(2)[..., None]
    elif lam.ndim == 1:
        lam = lam.unflatten(0, (G, H // G)).repeat(1, T)[..., None]
    difference = torch.addcmul(maps[:, :, 0], maps[:, :, 1], -lam.to(q.dtype))
    out_BGRE = torch.matmul(difference, v.transpose(1, 2))
    return out_BGRE.unflatten(2, (T, H // G)).permute(0, 2, 1, 3, 4).flatten(2, 3)
