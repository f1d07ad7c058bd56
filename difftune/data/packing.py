"""Laying documents into rows of one length, so that little is padding."""

from bisect import bisect_left, insort

import numpy as np


def pack_best_fit(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest documents first, each into the fullest row that still takes it.

    At most 11/9 of the optimal number of rows plus one (Johnson 1974); nearly no padding with many short
    documents. The number of rows depends on the lengths alone, so it is the same for every order.

    Args:
        lengths: Tokens of each document, each 1 to `capacity`.
        order: Indices of the documents to pack; documents of equal length are taken in this order.
        capacity: Tokens of a row.

    Returns:
        The documents of each row.

    Raises:
        ValueError: If a document is longer than a row.
    """
    if len(order) and int(lengths[order].max()) > capacity:
        raise ValueError(f"a document of {int(lengths[order].max())} tokens does not fit a row of {capacity}")
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the distinct free lengths that some row has, sorted
    for document, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[at]
        rows[row].append(document)
        if left := room - length:
            if left not in rows_by_room:
                rows_by_room[left] = []
                insort(rooms, left)
            rows_by_room[left].append(row)
    return rows
