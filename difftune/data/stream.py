"""The training order: one stream of rows through all epochs, the same for every number of workers and ranks.

Row number n of the stream is a function of (data, settings, seed, n). A *global micro-batch* is the next
`micro_batch_size * world_size` rows; rank r takes every `world_size`-th of them from the r-th on. So the
position in the stream, a number of rows, is all that a checkpoint needs, and it also holds for another number
of ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from difftune.data.batches import Batch, packed_batch, padded_batch
from difftune.data.corpus import Corpus
from difftune.data.packing import Rows
from difftune.data.row_cache import RowCache


def order_rng(seed: int, epoch: int, block: int) -> np.random.Generator:
    """What decides the order of a block of an epoch."""
    return np.random.default_rng([seed, epoch, block])


@dataclass(frozen=True)
class RowStream:
    """The rows of all epochs, one after another."""

    blocks: Callable[[], Iterator[Corpus]]
    """The data of one epoch. A set in memory is one block; streamed data come in blocks, each shuffled and
    packed."""
    packing: bool
    shuffle: bool
    seed: int
    max_epochs: int | None
    """Passes over the data; None: endless."""
    rows_per_epoch: int | None
    """Rows of an epoch where known beforehand: then a start in the middle costs nothing. None: blocks are
    counted again."""
    cache: RowCache | None = None
    """Keeps what `rows_of` made. None: it is made anew each time."""

    def rows_of(self, corpus: Corpus, epoch: int, block: int) -> Rows:
        """The rows of a block of an epoch, in the order in which they are trained on."""

        def lay() -> Rows:
            rng = order_rng(self.seed, epoch, block) if self.shuffle else None
            return corpus.rows(rng, packing=self.packing)

        if self.cache is None:
            return lay()
        seed = [self.seed, block] if self.shuffle else None
        # Without a shuffle all epochs are the first.
        return self.cache.rows(corpus.lengths, [seed, self.packing, corpus.seq_len], epoch if seed else 0, lay)

    def rows_from(self, start: int) -> Iterator[tuple[Corpus, list[int]]]:
        """Yield rows from number `start` on: a corpus, and the documents of it that make up the row."""
        first_epoch, skip = divmod(start, self.rows_per_epoch) if self.rows_per_epoch else (0, start)
        for epoch in count(first_epoch):
            if self.max_epochs is not None and epoch >= self.max_epochs:
                return
            rows_of_epoch = 0
            for number, corpus in enumerate(self.blocks()):
                rows = self.rows_of(corpus, epoch, number)
                rows_of_epoch += len(rows)
                for row in range(skip, len(rows)):
                    yield corpus, rows[row]
                skip = max(0, skip - len(rows))
                # Not while the next are made.
                del rows
            # Without this an endless stream over nothing would never return.
            if not rows_of_epoch:
                raise ValueError("an epoch has no row: every row of the data was dropped")


class BatchStream(IterableDataset):
    """Ready batches of one rank, from a position on.

    Args:
        rows: The stream of rows.
        start_row: Global rows that were consumed before.
        micro_batch_size: Rows of a batch of one rank.
        rank: This rank.
        world_size: Number of ranks.
        seq_len: Tokens of a packed row.
        pad_id: Padding token.
    """

    def __init__(
        self,
        rows: RowStream,
        *,
        start_row: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seq_len: int,
        pad_id: int,
    ) -> None:
        self._rows = rows
        self._start_row = start_row
        self._global_batch = micro_batch_size * world_size
        self._rank, self._world_size = rank, world_size
        self._seq_len, self._pad_id = seq_len, pad_id

    def __iter__(self) -> Iterator[Batch]:
        # The loader takes batches from its workers in turn, so worker w of n makes the batches w, w + n, ...
        worker: Any = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = self._rows.rows_from(self._start_row)
        for number in count():
            # The last batch may be smaller; a rank without a row of it gets padding, because all ranks must
            # step together.
            batch = list(islice(rows, self._global_batch))
            if not batch:
                return
            if number % step == first:
                yield self._collate(batch)

    def _collate(self, rows: list[tuple[Corpus, list[int]]]) -> Batch:
        """This rank's share of a global micro-batch; all ranks get rows of one width."""
        own = rows[self._rank :: self._world_size]
        documents = [[corpus.document(index) for index in indices] for corpus, indices in own] or [[]]
        if self._rows.packing:
            return packed_batch(documents, self._seq_len, self._pad_id)
        width = max(int(corpus.lengths[indices[0]]) for corpus, indices in rows)
        return padded_batch(documents, self._pad_id, width)


def interleave(iterators: list[Iterator[Any]]) -> Iterator[Any]:
    """One item of each in turn, until all are exhausted."""
    nothing = object()
    while iterators:
        items = [(iterator, next(iterator, nothing)) for iterator in iterators]
        iterators = [iterator for iterator, item in items if item is not nothing]
        yield from (item for _, item in items if item is not nothing)
