"""Documents packed into one batch: where they begin, and how to attend to them without a dense mask.

A packed row holds several documents that must not see one another. A boolean mask of T x T says so, but costs the
attention of the whole row. Here the tokens are regrouped instead: documents of similar length become the rows of a
few dense batches, attended causally and put back. Padding stands to the right of a document, so under the causal
mask no real token sees it.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

# A document shorter than this share of the longest one in its bucket opens a new bucket: at most a fifth of the
# positions of a bucket are padding, and few buckets means few kernel calls.
BUCKET_RATIO = 0.8


class Bucket(NamedTuple):
    """Documents of similar length: ``rows`` rows of ``width`` slots, from ``start`` in the regrouped tokens."""

    start: int
    rows: int
    width: int
    lengths: list[int]


class Documents:
    """Boundaries of the documents in a batch of ``B * T`` tokens, prepared once and used by every layer.

    Args:
        cu_seqlens: Cumulative lengths, integer, shape ``(n + 1,)``: 0, the end of each document, ..., ``B * T``.
            Rows are flattened one after another, so every end of a row is a boundary; padding at the end of a row
            is a document of its own.

    Raises:
        ValueError: If ``cu_seqlens`` is not one-dimensional, does not begin with 0 or does not increase.

    Example:
        >>> documents = Documents(torch.tensor([0, 3, 8]))
        >>> documents.lengths, documents.max_length
        ([3, 5], 5)
    """

    def __init__(self, cu_seqlens: torch.Tensor) -> None:
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be integers of shape (documents + 1,), got {cu_seqlens.dtype} "
                f"of shape {tuple(cu_seqlens.shape)}"
            )
        ends = cu_seqlens.tolist()
        self.lengths: list[int] = [end - start for start, end in pairwise(ends)]
        if ends[0] != 0 or min(self.lengths) <= 0:
            raise ValueError(f"cu_seqlens must begin with 0 and increase strictly, got {_shorten(ends)}")
        self.cu_seqlens = cu_seqlens.to(torch.int32)
        self.num_tokens: int = ends[-1]
        self.max_length: int = max(self.lengths)
        self._starts = ends[:-1]

    def check(self, rows: int, row_length: int) -> None:
        """Raise ValueError unless the documents fill ``rows`` rows of ``row_length`` tokens without crossing one."""
        if self.num_tokens != rows * row_length:
            raise ValueError(
                f"cu_seqlens ends at {self.num_tokens}, but the batch holds {rows} x {row_length} = "
                f"{rows * row_length} tokens: padding at the end of a row must be a document of its own"
            )
        crossing = [
            (start, start + length)
            for start, length in zip(self._starts, self.lengths, strict=True)
            if start // row_length != (start + length - 1) // row_length
        ]
        if crossing:
            raise ValueError(
                f"cu_seqlens has a document from {crossing[0][0]} to {crossing[0][1]}, across a row boundary "
                f"(rows have {row_length} tokens): every end of a row must be a boundary"
            )

    @cached_property
    def document_ids(self) -> torch.Tensor:
        """Index of the document of each token, shape ``(B * T,)``, int64."""
        lengths = torch.tensor(self.lengths, device=self.cu_seqlens.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=lengths.device), lengths)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Documents by falling length, cut where the next one would be padded too much."""
        buckets: list[Bucket] = []
        start = 0
        ordered = [self.lengths[i] for i in self._order]
        first = 0
        for i in range(1, len(ordered) + 1):
            if i == len(ordered) or ordered[i] < BUCKET_RATIO * ordered[first]:
                bucket = Bucket(start, i - first, ordered[first], ordered[first:i])
                buckets.append(bucket)
                start += bucket.rows * bucket.width
                first = i
        return buckets

    @cached_property
    def _order(self) -> list[int]:
        return sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])

    @cached_property
    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token of each slot (padding slots repeat the document's last token), and slot of each token."""
        tokens = []
        slots = np.empty(self.num_tokens, dtype=np.int64)
        documents = iter(self._order)
        for bucket in self.buckets:
            which = [next(documents) for _ in range(bucket.rows)]
            starts = np.array([self._starts[i] for i in which])[:, None]
            lengths = np.array(bucket.lengths)[:, None]
            offsets = np.arange(bucket.width)[None, :]
            token = starts + np.minimum(offsets, lengths - 1)
            slot = bucket.start + np.arange(token.size).reshape(token.shape)
            real = offsets < lengths
            slots[token[real]] = slot[real]
            tokens.append(token.reshape(-1))
        device = self.cu_seqlens.device
        return torch.from_numpy(np.concatenate(tokens)).to(device), torch.from_numpy(slots).to(device)

    def group(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens ``(B, T, ...)`` to slots ``(slots, ...)``, bucket after bucket."""
        tokens, slots = self._slots
        return _Group.apply(x.flatten(0, 1), tokens, slots)

    def ungroup(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Slots ``(slots, ...)`` back to tokens ``(B, T, ...)``; what stands in padding slots is dropped."""
        _, slots = self._slots
        return _Ungroup.apply(x, slots).unflatten(0, (rows, -1))


class _Group(torch.autograd.Function):
    """``x[tokens]`` whose gradient is a gather too: padding slots receive no gradient, each token one slot's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(0, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Ungroup(torch.autograd.Function):
    """``x[slots]`` whose gradient is written to the slots, zero in the padding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_slots, *grad.shape[1:]).index_copy_(0, slots, grad), None


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
