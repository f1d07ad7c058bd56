"""What a forward is given, made ready for the layers: packed documents, positions, padding, shards of rows."""

from __future__ import annotations

import torch

from difftune.ops import ContextShard, Documents


def find_documents(
    x: torch.Tensor,
    cu_seqlens: torch.Tensor | Documents | None,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> Documents | None:
    """The packed documents of a batch, under any of the names by which they come.

    Args:
        x: Embeddings, shape ``(B, T, C)``.
        cu_seqlens: Boundaries, or documents made of them.
        cu_seq_lens_q: The same by transformers' name for queries.
        cu_seq_lens_k: And for keys; a packed batch has the same.
        seq_idx: Number of the document of each token, shape ``(B or 1, T)``; where boundaries are given, these count.
        position_ids: Shape ``(B or 1, T)``: where they do not count on, a document begins. None: they do not tell.

    Returns:
        The documents; None for one document a row.

    Raises:
        ValueError: If boundaries contradict one another, or do not fill the rows.
    """
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens and cu_seq_lens_q are two names of one argument: give one of them")
        if cu_seq_lens_q is None or cu_seq_lens_k is None or not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k must both be there and equal: queries and keys are of the same "
                "documents"
            )
        cu_seqlens = cu_seq_lens_q
    if cu_seqlens is None and seq_idx is not None:
        numbers = seq_idx.expand(x.shape[0], -1)
        cu_seqlens = _documents_from(numbers.diff(dim=1, prepend=numbers[:, :1]) != 0)
    elif cu_seqlens is None and position_ids is not None:
        cu_seqlens = documents_of_positions(position_ids.expand(x.shape[0], -1))
    documents = Documents(cu_seqlens) if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    if documents is not None:
        documents.check(*x.shape[:2])
    return documents


def documents_of_positions(position_ids: torch.Tensor) -> Documents | None:
    """Documents that begin where positions ``(B, T)`` do not count on, as transformers does; None for one a row."""
    return _documents_from(position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1)


@torch.compiler.disable
def _documents_from(begins: torch.Tensor) -> Documents | None:
    """Documents that begin where ``begins (B, T)`` is true, and with each row; None for one a row."""
    if not bool(begins.any()):
        return None
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return Documents(torch.cat((starts, starts.new_tensor([begins.numel()]))))


def count_positions(x: torch.Tensor, past: int, documents: Documents | None) -> torch.Tensor:
    """Positions ``(B or 1, T)``: counted on from the cache, or from 0 in each document."""
    if documents is None:
        return torch.arange(past, past + x.shape[1], device=x.device)[None]
    starts = documents.cu_seqlens[:-1].long().to(x.device)
    positions = torch.arange(documents.num_tokens, device=x.device) - starts[documents.document_ids]
    return positions.view(x.shape[0], -1)


def key_padding_mask(mask: torch.Tensor | None, rows: int, length: int, past: int) -> torch.Tensor | None:
    """The mask that attention still needs, or None: padding on the right is hidden by the causal mask already.

    Raises:
        ValueError: If the mask is not of shape ``(rows, past + length)``.
    """
    if mask is None:
        return None
    if mask.ndim != 2 or tuple(mask.shape) != (rows, past + length):
        raise ValueError(
            f"attention_mask must have shape ({rows}, {past + length}), 1 where a token is real, "
            f"got {tuple(mask.shape)}; for packed documents give cu_seqlens"
        )
    real = mask.bool()
    right_padded = past == 0 and bool((real[:, 1:] <= real[:, :-1]).all())
    return None if right_padded or bool(real.all()) else real


def check_shard(
    shard: ContextShard,
    x: torch.Tensor,
    use_cache: bool,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    documents: Documents | None,
) -> None:
    """Raise ValueError unless a forward of a shard of rows has its tokens and positions, and nothing besides."""
    expected = (shard.rows, len(shard.tokens))
    if tuple(x.shape[:2]) != expected or position_ids is None:
        raise ValueError(
            f"a shard of {expected[0]} rows with {expected[1]} tokens each needs so many input_ids, and position_ids, "
            f"got {tuple(x.shape[:2])} and {'none' if position_ids is None else tuple(position_ids.shape)}"
        )
    if use_cache or attention_mask is not None or documents is not None:
        raise ValueError("with a shard there is no cache and no mask, and documents are given to the shard itself")
