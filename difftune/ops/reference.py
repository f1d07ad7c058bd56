"""The equations as they stand in the papers: documentation, fallback and the oracle of every test.

Memory is O(B * H * T * S); train with another backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from difftune.ops.documents import Documents
from difftune.ops.shapes import visible

ChangeLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the scaled logits ``(B, N, T, S)`` and who may see whom (bool, ``(B or 1, 1, T, S)``) to other logits."""


def reference_softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    change_logits: ChangeLogits | None = None,
) -> torch.Tensor:
    """``softmax(q k^T * scale) v``, in the dtype of the inputs; arguments as `difftune.ops.softmax_attention`.

    ``change_logits`` replaces the logits before the softmax: for studies of rounding, not for training.
    """
    maps = reference_softmax_maps(
        q,
        k,
        causal=causal,
        key_padding_mask=key_padding_mask,
        documents=documents,
        scale=scale,
        change_logits=change_logits,
    )
    return torch.einsum("bnts,bsne->btne", maps, _repeat_groups(v, q.shape[2]))


def reference_diff_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    *,
    causal: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    change_logits: ChangeLogits | None = None,
) -> torch.Tensor:
    """Differential attention, written to be read against the paper.

    Each differential head takes two softmax maps over the same values and returns their difference::

        out = (softmax(q_1 k_1^T * scale) - lam * softmax(q_2 k_2^T * scale)) v

    Arguments and result as :func:`difftune.ops.diff_attention`. Computes in the dtype of its inputs: tests pass
    float64 for the truth.

    Source:
        Ye et al., "Differential Transformer", arXiv:2410.05258, Eq. (1).
    """
    positive, negative = reference_maps(
        q,
        k,
        causal=causal,
        key_padding_mask=key_padding_mask,
        documents=documents,
        scale=scale,
        change_logits=change_logits,
    )
    return torch.einsum("bhts,bshe->bthe", difference_map(positive, negative, lam), _repeat_groups(v, q.shape[2]))


def difference_map(positive: torch.Tensor, negative: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """``A_1 - lam * A_2``, shape ``(B, H, T, S)``, of the two maps of :func:`reference_maps`.

    Lambda has shape ``()``, ``(H,)`` or ``(B, T, H)``.
    """
    lam = lam.to(positive.dtype)
    lam_BHT1 = lam.reshape(1, -1, 1, 1) if lam.ndim < 2 else lam.permute(0, 2, 1)[..., None]
    return positive - lam_BHT1 * negative


def reference_maps(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    change_logits: ChangeLogits | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two softmax maps of each differential head, each of shape ``(B, H, T, S)``.

    Args:
        q: Queries ``(B, T, H, 2, D)``.
        k: Keys ``(B, S, G, 2, D)``, or ``(B, S, G, 1, D)`` when the pair shares them (V2).
        causal: Query t sees keys ``s <= t + S - T``.
        key_padding_mask: Bool ``(B, S)``, True where a key is real.
        documents: Packed documents; a token sees its own document only.
        scale: Multiplies the logits. Default: ``D ** -0.5``.
        change_logits: Applied to the logits of each map before its softmax.

    Returns:
        The positive and the negative map. Rows sum to 1, or to 0 where a query sees no key.
    """
    pair = k.expand(-1, -1, -1, 2, -1)
    positive, negative = (
        reference_softmax_maps(
            q[..., p, :],
            pair[..., p, :],
            causal=causal,
            key_padding_mask=key_padding_mask,
            documents=documents,
            scale=scale,
            change_logits=change_logits,
        )
        for p in (0, 1)
    )
    return positive, negative


def reference_softmax_maps(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
    change_logits: ChangeLogits | None = None,
) -> torch.Tensor:
    """The softmax map of each head of plain attention, shape ``(B, N, T, S)``.

    Queries are ``(B, T, N, D)``, keys ``(B, S, M, D)``; the rest is as in :func:`reference_maps`.
    """
    logits_BNTS = reference_logits(q, k, scale=scale)
    mask = visible(q.shape[1], k.shape[1], q.device, causal, key_padding_mask, documents)
    if change_logits is not None:
        shape = (1, 1, *logits_BNTS.shape[2:])
        logits_BNTS = change_logits(
            logits_BNTS, logits_BNTS.new_ones(shape, dtype=torch.bool) if mask is None else mask[:, None]
        )
    if mask is None:
        return logits_BNTS.softmax(dim=-1)
    hidden = ~mask[:, None]
    # The smallest finite number instead of -inf: a row that sees no key is then uniform, not NaN, before it is zeroed.
    lowest = torch.finfo(logits_BNTS.dtype).min
    return logits_BNTS.masked_fill(hidden, lowest).softmax(dim=-1).masked_fill(hidden, 0.0)


def reference_logits(q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """``q k^T * scale`` of plain attention, shape ``(B, N, T, S)``, of all pairs, whoever may see whom.

    Queries are ``(B, T, N, D)``, keys ``(B, S, M, D)``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("btnd,bsnd->bnts", q * scale, _repeat_groups(k, q.shape[2]))


def _repeat_groups(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.repeat_interleave(num_heads // x.shape[2], dim=2)
