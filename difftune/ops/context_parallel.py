"""Attention of long rows whose tokens are spread over several processes.

A row of T tokens is cut into ``2 n`` chunks for n processes, and process i holds the chunks ``i`` and ``2 n - 1 - i``:
a chunk near the end sees many keys, one near the beginning few, so that every process has the same work under the
causal mask. All but attention is done token by token and needs nothing of the others. Attention gathers the keys and
values of the whole row, once a layer, and in the backward pass adds up the gradients that every process has for them
and hands each its own.

Queries are then attended a piece at a time. A piece is what a chunk holds of one document. Those that begin in the
chunk are packed documents as everywhere; one that began earlier is a block of queries at the end of its keys, which is
what ``causal`` means for fewer queries than keys. No mask is made, and every backend serves.

torch's own context parallelism (``torch.distributed.tensor.experimental``, 2.13) does not serve here: it steps in below
``scaled_dot_product_attention`` on CUDA alone, takes no boundaries of documents there, and would pass by kernels that
compute both maps at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from difftune.ops.documents import Documents

# torch 2.13 renames them; 2.11 has the old names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Continued(NamedTuple):
    """Queries at the end of keys that begin before their chunk, the same in each of ``rows``."""

    queries: slice
    keys: slice
    rows: list[int]


class ContextShard:
    """Which tokens of a batch a process has, and how it attends to all of them. Made once a batch, used by every layer.

    Args:
        rank: This process among those that share the rows.
        size: How many they are.
        rows: Rows of the batch, B.
        length: Tokens of a whole row, T, a multiple of ``2 * size``.
        documents: Boundaries of packed documents over the ``B * T`` tokens. None: a row is one document.
        group: The processes; None only where nothing is gathered.
        device: Of the tensors to come.

    Raises:
        ValueError: If ``length`` cannot be cut into ``2 * size`` chunks, or the documents do not fill the rows.

    Example:
        >>> ContextShard(0, 2, rows=1, length=8).tokens.tolist()
        [0, 1, 6, 7]
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        rows: int,
        length: int,
        documents: Documents | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if length % (2 * size):
            raise ValueError(
                f"rows of {length} tokens cannot be shared by {size} processes: give rows of a multiple of {2 * size}"
            )
        if documents is not None:
            documents.check(rows, length)
        self.size, self.rows, self.length = size, rows, length
        self._group = group
        chunk = length // (2 * size)
        starts = (rank * chunk, (2 * size - 1 - rank) * chunk)
        self.tokens = torch.cat([torch.arange(start, start + chunk, device=device) for start in starts])
        """Positions in the row of the tokens of this process, ascending, shape ``(T / size,)``."""
        self._plan(starts, chunk, documents, device)

    def _plan(
        self, starts: tuple[int, int], chunk: int, documents: Documents | None, device: torch.device | str
    ) -> None:
        lengths = [self.length] * self.rows if documents is None else documents.lengths
        begun: list[int] = []
        own: list[torch.Tensor] = []
        everyone: list[torch.Tensor] = []
        continued: dict[tuple[int, int, int, int], list[int]] = {}
        first = 0
        for count in lengths:
            row, start = divmod(first, self.length)
            first, end = first + count, start + count
            for place, chunk_start in enumerate(starts):
                low, high = max(start, chunk_start), min(end, chunk_start + chunk)
                if low >= high:
                    continue
                local = place * chunk - chunk_start
                if low == start:
                    begun.append(high - low)
                    own.append(torch.arange(low + local, high + local) + row * 2 * chunk)
                    everyone.append(torch.arange(low, high) + row * self.length)
                else:
                    continued.setdefault((low + local, high + local, start, high), []).append(row)
        self._continued = [
            _Continued(slice(low, high), slice(start, end), rows) for (low, high, start, end), rows in continued.items()
        ]
        order = list(own)
        for piece in self._continued:
            order += [torch.arange(piece.queries.start, piece.queries.stop) + row * 2 * chunk for row in piece.rows]
        placed = torch.cat(order)
        inverse = torch.argsort(placed)
        in_order = bool((inverse == torch.arange(len(inverse))).all())
        self._inverse = None if in_order else inverse.to(device)
        self._begun: Documents | None = None
        if begun:
            ends = torch.tensor([0, *begun], device=device).cumsum(0)
            self._begun = Documents(ends)
            self._own, self._everyone = torch.cat(own).to(device), torch.cat(everyone).to(device)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """The part of this process of whole rows ``(B, T, ...)``: ``(B, T / size, ...)``."""
        return x.index_select(1, self.tokens)

    def gather(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Whole rows ``(B, T, ...)`` of what every process has ``(B, T / size, ...)`` of; one exchange for all parts.

        The gradient of a whole row is summed over the processes, and each gets that of its own tokens.
        """
        if self._group is None:
            assert self.size == 1, "a group is needed to gather"
            return parts
        shapes = [part.shape[2:] for part in parts]
        joined = torch.cat([part.flatten(2) for part in parts], dim=2)
        whole = _GatherRows.apply(joined, self._group, self.size)
        split = whole.split([shape.numel() for shape in shapes], dim=2)
        return tuple(part.unflatten(2, shape) for part, shape in zip(split, shapes, strict=True))

    def attend(
        self,
        attention: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *lam: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """``attention`` of the queries of this process to all that they may see.

        Args:
            attention: `difftune.ops.diff_attention` or `difftune.ops.softmax_attention`.
            q: Queries of this process, shape ``(B, T / size, ...)``.
            k: Keys of whole rows, shape ``(B, T, ...)``, from :meth:`gather`.
            v: Values of whole rows.
            lam: Of `diff_attention`; where it varies over tokens, those of the queries.
            options: Passed on.

        Returns:
            Shape ``(B, T / size, H, E)``.
        """
        outputs = []
        if self._begun is not None:
            index = self._own
            mine, theirs = (lambda x: _take(x, index)), (lambda x: _take(x, self._everyone))
            weights = [mine(x) if x.ndim == 3 else x for x in lam]
            documents = None if len(self._begun.lengths) == 1 else self._begun
            out = attention(mine(q), theirs(k), theirs(v), *weights, cu_seqlens=documents, **options)
            outputs.append(out.flatten(0, 1))
        for piece in self._continued:
            # Most often all rows are cut alike, and then they are taken as they stand.
            rows = slice(None) if len(piece.rows) == q.shape[0] else piece.rows
            mine_at, theirs_at = piece.queries, piece.keys
            weights = [x[rows][:, mine_at] if x.ndim == 3 else x for x in lam]
            out = attention(q[rows][:, mine_at], k[rows][:, theirs_at], v[rows][:, theirs_at], *weights, **options)
            outputs.append(out.flatten(0, 1))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self._inverse is not None:
            joined = joined.index_select(0, self._inverse)
        return joined.unflatten(0, (self.rows, -1))


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens by their place among those of all rows, as one row."""
    return x.flatten(0, 1).index_select(0, index)[None]


class _GatherRows(torch.autograd.Function):
    """Rows whose chunks lie head and tail on the processes, put together; the gradient is summed and cut again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
        ctx.group, ctx.size = group, size
        gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
        _all_gather(gathered, x.contiguous(), group=group)
        heads, tails = gathered.unflatten(0, (size, -1)).chunk(2, dim=2)
        return torch.cat([*heads.unbind(0), *reversed(tails.unbind(0))], dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        chunks = grad.chunk(2 * ctx.size, dim=1)
        order = [chunks[place] for rank in range(ctx.size) for place in (rank, 2 * ctx.size - 1 - rank)]
        parts = [torch.cat(order[at : at + 2], dim=1) for at in range(0, len(order), 2)]
        own = torch.empty_like(parts[0])
        _reduce_scatter(own, torch.cat(parts), group=ctx.group)
        return own, None, None
