import time
import tracemalloc

import numpy as np
import pytest

from benchmarks.packing import one_by_one
from difftune.data.packing import one_a_row, pack_best_fit


def pack(lengths, capacity, order=None):
    lengths = np.asarray(lengths)
    return list(pack_best_fit(lengths, np.arange(len(lengths)) if order is None else order, capacity))


@pytest.mark.parametrize("seed", range(5))
def test_every_document_is_in_exactly_one_row_that_holds_it(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, size=rng.integers(1, 400))
    rows = pack(lengths, 64, rng.permutation(len(lengths)))
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(row and lengths[row].sum() <= 64 for row in rows)


def plain_best_fit(lengths, capacity):
    """The definition, written a second time: look at every row."""
    rows = []
    for document in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = [row for row in rows if capacity - sum(lengths[n] for n in row) >= lengths[document]]
        if fitting:
            max(fitting, key=lambda row: sum(lengths[n] for n in row)).append(document)
        else:
            rows.append([document])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_is_as_tight_as_best_fit_decreasing(seed):
    lengths = np.random.default_rng(seed).integers(1, 33, size=120).tolist()
    fast, slow = pack(lengths, 32), plain_best_fit(lengths, 32)
    fill = sorted(sum(lengths[n] for n in row) for row in fast)
    assert fill == sorted(sum(lengths[n] for n in row) for row in slow)


# On both sides of the widths of integers that sort differently.
@pytest.mark.parametrize("capacity", [1, 2, 7, 64, 256, 257, 65_536, 65_537, 2**33])
@pytest.mark.parametrize("shortest", [1.0, 0.2])
def test_rows_are_those_of_placing_one_document_after_another(capacity, shortest):
    rng = np.random.default_rng(capacity)
    for count in (1, 2, 50, 1500):
        lengths = np.ceil(capacity * rng.uniform(0, shortest, count) ** 2).astype(np.int64).clip(1)
        order = rng.permutation(count)
        assert pack(lengths, capacity, order) == one_by_one(lengths, order, capacity)


def test_rows_in_another_order_are_the_same_rows():
    rng = np.random.default_rng(0)
    rows = pack_best_fit(rng.integers(1, 65, size=300), np.arange(300), 64)
    order = rng.permutation(len(rows))
    assert list(rows.taken(order)) == [rows[row] for row in order]
    assert list(one_a_row(np.array([2, 0, 1]))) == [[2], [0], [1]]
    assert list(pack_best_fit(np.empty(0, np.int64), np.arange(0), 64).taken(np.arange(0))) == []


def test_takes_the_fullest_row_that_fits():
    assert [sorted(row) for row in pack([6, 5, 3, 4], 10)] == [[0, 3], [1, 2]]


def test_number_of_rows_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, size=500)
    assert len({len(pack(lengths, 128, rng.permutation(500))) for _ in range(10)}) == 1


def test_equal_documents_are_taken_in_the_given_order():
    rng = np.random.default_rng(0)
    lengths, order = rng.integers(6, 9, size=400), rng.permutation(400)
    # Two of them never share a row, so the rows show the order.
    rows = pack(lengths, 10, order)
    assert [row[0] for row in rows] == sorted(order.tolist(), key=lambda document: -lengths[document])


def test_only_the_documents_asked_for_are_packed():
    assert pack([5, 5, 50, 5], 10, np.array([3, 0])) == [[3, 0]]
    assert pack([], 10) == []


def test_document_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="a document of 11 tokens does not fit a row of 10"):
        pack([3, 11], 10)


def test_memory_is_some_integers_a_document():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.8, 200_000).astype(np.int64), 1, 2048)
    order = np.arange(len(lengths))
    tracemalloc.start()
    rows = pack_best_fit(lengths, order, 2048)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # What is given back is a number a document, and the borders of the rows.
    assert held < 8 * (len(lengths) + len(rows)) * 1.01 + 100_000
    assert peak < 6 * 8 * len(lengths)


def test_a_hundred_thousand_documents_take_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.8, 100_000).astype(np.int64), 1, 2048)
    # Of this thread alone, and not of what else the machine does.
    start = time.thread_time()
    rows = pack(lengths, 2048)
    assert time.thread_time() - start < 5
    assert lengths.sum() / (len(rows) * 2048) > 0.99
