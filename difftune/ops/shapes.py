"""Checks of the arguments of an attention, below the entry and the reference so that both can use them."""

from __future__ import annotations

import torch

from difftune.ops.documents import Documents


def check_softmax_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError unless ``q (B, T, N, D)``, ``k (B, S, M, D)`` and ``v (B, S, M, E)`` fit together."""
    if q.ndim != 4:
        raise ValueError(f"q must have shape (batch, T, heads, D), got {tuple(q.shape)}")
    B, _, N, D = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[3]) != (B, D):
        raise ValueError(f"k must have shape ({B}, S, kv_heads, {D}), got {tuple(k.shape)}")
    _check_values(k.shape[1], k.shape[2], v, B, N)


def check_diff_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: torch.Tensor) -> None:
    """Raise ValueError unless the arguments of a differential attention fit together."""
    if q.ndim != 5 or q.shape[3] != 2:
        raise ValueError(f"q must have shape (batch, T, H, 2, D), got {tuple(q.shape)}")
    B, T, H, _, D = q.shape
    if k.ndim != 5 or (k.shape[0], k.shape[4]) != (B, D) or k.shape[3] not in (1, 2):
        raise ValueError(f"k must have shape ({B}, S, G, 2 or 1, {D}), got {tuple(k.shape)}")
    _check_values(k.shape[1], k.shape[2], v, B, H)
    if tuple(lam.shape) not in ((), (H,), (B, T, H)):
        raise ValueError(f"lam must have shape (), ({H},) or ({B}, {T}, {H}), got {tuple(lam.shape)}")


def check_norm_weight(norm_weight: torch.Tensor | None, v: torch.Tensor) -> None:
    """Raise ValueError unless the weight of the heads' norm is as wide as the values ``(B, S, G, E)``."""
    if norm_weight is not None and tuple(norm_weight.shape) != tuple(v.shape[3:]):
        raise ValueError(f"norm_weight must have shape ({v.shape[3]},), got {tuple(norm_weight.shape)}")


def _check_values(S: int, G: int, v: torch.Tensor, B: int, H: int) -> None:
    if v.ndim != 4 or tuple(v.shape[:3]) != (B, S, G):
        raise ValueError(f"v must have shape ({B}, {S}, {G}, E), got {tuple(v.shape)}")
    if H % G:
        raise ValueError(f"query heads ({H}) must be a multiple of key/value heads ({G})")


def check_visibility(
    batch: int,
    num_queries: int,
    num_keys: int,
    causal: bool,
    key_padding_mask: torch.Tensor | None,
    documents: Documents | None,
) -> None:
    """Raise ValueError unless the masks fit the shapes: who may see whom must never be a guess."""
    if causal and num_queries > num_keys:
        raise ValueError(f"causal attention needs T <= S, got T={num_queries}, S={num_keys}")
    if key_padding_mask is not None and (
        key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (batch, num_keys)
    ):
        raise ValueError(
            f"key_padding_mask must be bool of shape ({batch}, {num_keys}), True where a key is real, "
            f"got {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
        )
    if documents is not None:
        if key_padding_mask is not None:
            raise ValueError("give cu_seqlens or key_padding_mask, not both: padding is a document of its own")
        if num_queries != num_keys:
            raise ValueError(f"packed documents need T == S (no cache), got T={num_queries}, S={num_keys}")
        documents.check(batch, num_queries)


def visible(
    num_queries: int,
    num_keys: int,
    device: torch.device,
    causal: bool,
    key_padding_mask: torch.Tensor | None,
    documents: Documents | None,
) -> torch.Tensor | None:
    """Dense mask, bool ``(B or 1, T, S)``, True where query t may see key s; None when all may."""
    mask = None
    if causal and num_queries > 1:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)[None]
    if key_padding_mask is not None:
        mask = key_padding_mask[:, None, :] if mask is None else mask & key_padding_mask[:, None, :]
    if documents is not None:
        ids = documents.document_ids.view(-1, num_queries)
        same = ids[:, :, None] == ids[:, None, :]
        mask = same if mask is None else mask & same
    return mask
