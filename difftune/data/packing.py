"""Laying documents into rows of one length, so that little is padding."""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of documents in two flat arrays: an integer a document and one a row, however many there are."""

    documents: np.ndarray
    """int64, shape [documents]: the documents of all rows, one row after another."""
    offsets: np.ndarray
    """int64, shape [rows + 1]: where in `documents` each row begins."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> list[int]:
        """The documents of one row, from 0."""
        return self.documents[self.offsets[row] : self.offsets[row + 1]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[row] for row in range(len(self)))

    def taken(self, order: np.ndarray) -> "Rows":
        """The same rows in another order.

        Args:
            order: int64, shape [rows]: which row comes first, second, ...
        """
        sizes = np.diff(self.offsets)[order]
        offsets = _borders(sizes)
        places = np.repeat(self.offsets[:-1][order] - offsets[:-1], sizes)
        places += np.arange(len(places))
        return Rows(self.documents[places], offsets)


def one_a_row(order: np.ndarray) -> Rows:
    """A row for each document, in this order."""
    return Rows(order, np.arange(len(order) + 1))


def pack_best_fit(lengths: np.ndarray, order: np.ndarray, capacity: int) -> Rows:
    """Best-fit decreasing: the longest documents first, each into the fullest row that still takes it.

    At most 11/9 of the optimal number of rows plus one (Johnson 1974); nearly no padding with many short
    documents. The number of rows depends on the lengths alone, so it is the same for every order.

    Memory is at most some six integers a document. Time is that of sorting where many documents are of one length, as
    in large sets; it is never more than some microseconds a document.

    Args:
        lengths: Tokens of each document, each 1 to `capacity`.
        order: Indices of the documents to pack; documents of equal length are taken in this order.
        capacity: Tokens of a row.

    Raises:
        ValueError: If a document is longer than a row.
    """
    # What sorts into the wanted order; in 16 bits where they do, because numpy sorts those by counting.
    short_by = capacity - lengths[order]
    if len(order) and int(short_by.min()) < 0:
        raise ValueError(f"a document of {capacity - int(short_by.min())} tokens does not fit a row of {capacity}")
    short_by = short_by.astype(np.min_scalar_type(max(0, capacity - 1)))
    longest_first = np.argsort(short_by, kind="stable")
    short_by, longest_first = short_by[longest_first], order[longest_first]
    starts = np.flatnonzero(np.append(np.ones(min(1, len(order)), np.bool_), short_by[1:] != short_by[:-1]))
    row_of, rows = _place(capacity - short_by[starts].astype(np.int64), np.diff(starts, append=len(order)), capacity)
    del short_by
    offsets = _borders(np.bincount(row_of, minlength=rows))
    # Within a row in the order in which documents were placed.
    return Rows(longest_first[np.argsort(row_of, kind="stable")], offsets)


def _place(lengths: np.ndarray, counts: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each document, and how many rows there are.

    Documents of one length are placed together: the fullest row that takes one of them stays the fullest that takes
    the next, until it takes none. So all rows with one free length get equally many, one row after another.

    Args:
        lengths: Each length once, descending, each 1 to `capacity`.
        counts: Documents of each length.
        capacity: Tokens of a row.
    """
    row_of = np.empty(int(counts.sum()), dtype=np.int64)
    rows = done = 0
    rooms: list[int] = []  # the distinct free lengths that some row has, sorted
    rows_by_room: dict[int, array[int]] = {}  # of each of them the rows; the one to take next is the last

    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        while count:
            at = bisect_left(rooms, length)
            room = capacity if at == len(rooms) else rooms[at]
            each = room // length
            wanted = -(-count // each)
            if at == len(rooms):
                which = array("q", range(rows, rows + wanted))
                rows += wanted
            else:
                free = rows_by_room[room]
                which = free[: -wanted - 1 : -1]
                del free[-wanted:]
                if not free:
                    del rows_by_room[room], rooms[at]
            placed = min(count, each * len(which))
            full, rest = divmod(placed, each)
            # In a small set it is mostly one row, for which numpy would take longer.
            row_of[done : done + placed] = which[0] if len(which) == 1 else np.repeat(which, each)[:placed]
            for some, documents in ((which[:full], each), (which[full:], rest)):
                left = room - documents * length
                if left and some:
                    if left in rows_by_room:
                        rows_by_room[left] += some
                    else:
                        rows_by_room[left] = some
                        insort(rooms, left)
            done, count = done + placed, count - placed
    return row_of, rows


def _borders(sizes: np.ndarray) -> np.ndarray:
    """Where each of some parts of these sizes begins, and where the last one ends."""
    borders = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=borders[1:])
    return borders
