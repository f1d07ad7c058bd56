"""Softmax attention through torch's scaled_dot_product_attention, arranged so that torch takes a fused path.

Torch's fused kernels want values as wide as the keys and no dense mask. Differential V1 has values twice as wide, so
on the CPU queries and keys are padded with zeros (the softmax is computed once, 10 to 20 % faster than two calls);
elsewhere the values are cut into pieces, one call each, since fused GPU kernels end at 128 or 256 dims a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from difftune.ops.documents import Documents
from difftune.ops.shapes import visible


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
    mask = visible(T, S, q.device, causal, key_padding_mask, None)
    return _fused(q, k, v, None if mask is None else mask[:, None], False, scale)


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
