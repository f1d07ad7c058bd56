"""Tokenised documents under a length limit, and the rows that they are laid into."""

from collections.abc import Sequence

import numpy as np

from difftune.data.chat import Encoded
from difftune.data.packing import Rows, one_a_row, pack_best_fit
from difftune.data.tokenized import Counts, TokenizedSet
from difftune.data.upsampling import Upsampling

OVERLONG = ("drop", "truncate", "raise")


class Corpus:
    """The documents of one or more tokenised sets that fit a row.

    Args:
        sets: The documents, in this order.
        seq_len: Most tokens of a document.
        overlong: What happens to a longer one: "drop" (counted), "truncate" (its first `seq_len` tokens stay;
            dropped if none of them is learned) or "raise".
        upsampling: Documents are taken more than once, by their length; sets of one path are one source. None: once.

    Raises:
        ValueError: For an over-long document under "raise"; names the row and its length.

    Attributes:
        counts: Rows read and dropped, over-long ones included.
        truncated: Documents that were cut.
        lost_to_length: Documents that were dropped because of their length.
        longest: Tokens of the longest document before the limit.
        further_turns: Documents beyond the first of their row, before the limit.
        repeats: Copies of documents beyond the first; each copy counts among the kept.
        lengths: int64, shape [kept]: tokens of each document that is learned.
        label_counts: int64, shape [kept]: labels of each.
    """

    def __init__(
        self, sets: Sequence[TokenizedSet], *, seq_len: int, overlong: str, upsampling: Upsampling | None = None
    ) -> None:
        self._sets = list(sets)
        self._first = np.cumsum([0, *(len(part) for part in sets)])
        self.counts = sum((part.counts for part in sets), Counts())
        self.seq_len = seq_len
        self.lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in sets)])
        self.label_counts = np.concatenate([np.empty(0, np.int64), *(part.label_counts for part in sets)])
        self.longest = int(self.lengths.max(initial=0))
        self._kept = np.arange(len(self.lengths))
        self.truncated = self.lost_to_length = 0
        self.further_turns = sum(int(np.count_nonzero(np.diff(part.row_numbers) == 0)) for part in sets)
        if (too_long := np.flatnonzero(self.lengths > seq_len)).size:
            self._limit(too_long, overlong)
        self.repeats = 0
        if upsampling is not None:
            self._repeat(upsampling)

    def __len__(self) -> int:
        return len(self._kept)

    def document(self, index: int) -> Encoded:
        """A kept document, cut to the limit."""
        return self._whole(int(self._kept[index])).first(self.seq_len)

    def rows(self, rng: np.random.Generator | None, *, packing: bool) -> Rows:
        """The documents of each row, in the order in which rows are trained on.

        Args:
            rng: Decides the order of documents and rows. None: as they stand (packing still sorts by length).
            packing: Several documents a row, best fit. False: one a row.
        """
        order = np.arange(len(self)) if rng is None else rng.permutation(len(self))
        if not packing:
            return one_a_row(order)
        rows = pack_best_fit(self.lengths, order, self.seq_len)
        # The longest documents are packed first: without this an epoch would run from long to short.
        return rows if rng is None else rows.taken(rng.permutation(len(rows)))

    def questions(self) -> np.ndarray:
        """uint64, shape [kept]: the `question_key` of each document."""
        keys = np.concatenate([np.empty(0, np.uint64), *(part.questions for part in self._sets)])
        return keys[self._kept]

    def ends_in(self, token: int) -> int:
        """How many documents end in this token."""
        last = np.concatenate([np.empty(0, np.int32), *(part.last_ids for part in self._sets)])
        if self.truncated:
            for part, first in zip(self._sets, self._first.tolist(), strict=False):
                cut = np.flatnonzero(part.lengths > self.seq_len)
                last[first + cut] = part.ids[part.offsets[cut] + self.seq_len - 1]
        return int(np.count_nonzero(last[self._kept] == token))

    def _whole(self, index: int) -> Encoded:
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._sets[part].document(index - int(self._first[part]))

    def _repeat(self, upsampling: Upsampling) -> None:
        paths = [part.source for part in self._sets]
        part_of = np.repeat(np.arange(len(paths)), [len(part) for part in self._sets])[self._kept]
        source_of = np.array([paths.index(path) for path in paths], dtype=np.int64)[part_of]
        counts = upsampling.counts(self.lengths, source_of)
        self.repeats = int(counts.sum()) - len(counts)
        self._kept = np.repeat(self._kept, counts)
        self.lengths, self.label_counts = np.repeat(self.lengths, counts), np.repeat(self.label_counts, counts)

    def _limit(self, too_long: np.ndarray, overlong: str) -> None:
        if overlong == "raise":
            part = int(np.searchsorted(self._first, too_long[0], side="right")) - 1
            row = self._sets[part].row_numbers[too_long[0] - self._first[part]]
            raise ValueError(
                f"{self._sets[part].source}, row {row}: {self.lengths[too_long[0]]} tokens do not fit "
                f"seq_len={self.seq_len} and overlong=raise; raise seq_len (the longest row has "
                f"{self.longest}), or set overlong to drop or truncate"
            )
        keep = np.ones(len(self.lengths), dtype=bool)
        if overlong == "drop":
            keep[too_long] = False
            reason = f"longer than {self.seq_len} tokens"
        else:
            for index in too_long.tolist():
                self.lengths[index] = self.seq_len
                self.label_counts[index] = np.count_nonzero(self._whole(index).learned[: self.seq_len])
                keep[index] = self.label_counts[index] > 0
            self.truncated = int(keep[too_long].sum())
            reason = f"no label within {self.seq_len} tokens"
        if lost := len(keep) - int(keep.sum()):
            self.lost_to_length = lost
            self.counts.dropped[reason] = lost
        self._kept = np.flatnonzero(keep)
        self.lengths, self.label_counts = self.lengths[keep], self.label_counts[keep]
