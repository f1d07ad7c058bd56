import hashlib
import json
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from difftune.data.corpus import Corpus
from difftune.data.sources import Source
from difftune.data.stream import BatchStream, RowStream, interleave
from difftune.data.token_cache import load_tokenized
from difftune.data.tokenized import ARRAYS, Counts, TokenizedSet


@pytest.fixture(scope="module")
def data(digits) -> TokenizedSet:
    return load_tokenized(Source("synthetic:arithmetic", options={"count": 90}), digits)


def row_stream(data: TokenizedSet, *, blocks: int = 1, **changed) -> RowStream:
    corpora = [Corpus([data], seq_len=80, overlong="raise") for _ in range(blocks)]
    settings = {"packing": True, "shuffle": True, "seed": 3, "max_epochs": None, "rows_per_epoch": None, **changed}
    return RowStream(blocks=lambda: iter(corpora), **settings)


def batches(rows: RowStream, *, start: int = 0, size: int = 4, rank: int = 0, world: int = 1, workers: int = 0) -> list:
    stream = BatchStream(
        rows, start_row=start, micro_batch_size=size, rank=rank, world_size=world, seq_len=80, pad_id=0
    )
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    return [batch["input_ids"] for batch in islice(loader, 60)]


def equal(left: list, right: list) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def documents(rows, count: int) -> list[list[int]]:
    return [indices for _, indices in islice(rows, count)]


def test_epochs_follow_one_another_in_new_orders(data):
    per_epoch = len(documents(row_stream(data, max_epochs=1).rows_from(0), 10**6))
    rows = documents(row_stream(data, max_epochs=3).rows_from(0), 10**6)
    assert len(rows) == 3 * per_epoch
    epochs = [rows[n * per_epoch : (n + 1) * per_epoch] for n in range(3)]
    for epoch in epochs:
        assert sorted(document for row in epoch for document in row) == list(range(90))
    assert epochs[0] != epochs[1] != epochs[2]


def test_unshuffled_unpacked_rows_stand_in_the_order_of_the_data(data):
    rows = row_stream(data, packing=False, shuffle=False, max_epochs=2)
    assert documents(rows.rows_from(0), 200) == [[n] for n in range(90)] * 2


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("blocks", [1, 3])
def test_start_anywhere_gives_exactly_the_rest(data, known, blocks):
    whole = documents(row_stream(data, blocks=blocks, max_epochs=3).rows_from(0), 10**6)
    per_epoch = len(whole) // 3
    rows = row_stream(data, blocks=blocks, max_epochs=3, rows_per_epoch=per_epoch if known else None)
    for start in (1, per_epoch - 1, per_epoch, per_epoch + 7, 2 * per_epoch + 1, len(whole), len(whole) + 5):
        assert documents(rows.rows_from(start), 10**6) == whole[start:]


@pytest.mark.parametrize(("packing", "expected"), [(True, "b0eca118998dd3d3"), (False, "29664d81b5a071da")])
def test_rows_of_a_seed_are_what_they_always_were(packing, expected):
    """A run that was begun with an earlier version goes on with the rows that it would have had."""
    arrays = {name: np.zeros(500, dtype) for name, dtype in ARRAYS.items()}
    lengths = np.array([1 + n * 37 % 61 for n in range(500)])
    words = TokenizedSet("x", counts=Counts(), **{**arrays, "offsets": np.cumsum([0, *lengths], dtype=np.int64)})
    rows = documents(row_stream(words, packing=packing, max_epochs=3).rows_from(0), 10**6)
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == expected


def test_seed_decides_the_order(data):
    assert documents(row_stream(data).rows_from(0), 30) == documents(row_stream(data).rows_from(0), 30)
    assert documents(row_stream(data).rows_from(0), 30) != documents(row_stream(data, seed=4).rows_from(0), 30)


def test_same_batches_with_any_number_of_workers(data):
    for max_epochs in (None, 2):
        alone = batches(row_stream(data, max_epochs=max_epochs))
        assert equal(alone, batches(row_stream(data, max_epochs=max_epochs), workers=2))


def test_ranks_together_take_the_rows_of_one_rank_in_order(data):
    for max_epochs in (None, 1):
        alone = batches(row_stream(data, max_epochs=max_epochs), size=4)
        ranks = [batches(row_stream(data, max_epochs=max_epochs), size=2, rank=r, world=2) for r in range(2)]
        assert len(ranks[0]) == len(ranks[1])
        woven = [torch.stack([left, right], 1).flatten(0, 1) for left, right in zip(*ranks, strict=True)]
        assert equal(woven, alone)


def test_position_holds_for_another_number_of_ranks(data):
    whole = torch.cat(batches(row_stream(data, max_epochs=2), size=1))
    on_two = [batches(row_stream(data, max_epochs=2), start=12, size=3, rank=r, world=2) for r in range(2)]
    first = torch.stack([on_two[0][0], on_two[1][0]], 1).flatten(0, 1)
    assert torch.equal(first, whole[12:18])


def test_rank_without_a_row_of_the_last_batch_gets_padding(data):
    rows = row_stream(data, max_epochs=1, packing=False)
    ranks = [batches(rows, size=7, rank=r, world=4) for r in range(4)]
    assert [len(rank) for rank in ranks] == [4, 4, 4, 4]  # 90 rows = 3 * 28 + 6: two ranks get one row less
    assert [len(rank[-1]) for rank in ranks] == [2, 2, 1, 1]
    last = [batches(rows, start=88, size=1, rank=r, world=4)[0] for r in range(4)]
    assert [len(batch) for batch in last] == [1, 1, 1, 1]
    assert [bool((batch != 0).any()) for batch in last] == [True, True, False, False]


def test_stream_over_nothing_is_an_error_and_not_endless(data):
    arrays = {name: getattr(data, name)[:0] for name in ARRAYS}
    empty = TokenizedSet("x", counts=data.counts, **{**arrays, "offsets": np.zeros(1, np.int64)})
    rows = row_stream(empty)
    with pytest.raises(ValueError, match="an epoch has no row"):
        next(rows.rows_from(0))


def test_interleave_takes_turns_until_all_are_exhausted():
    assert list(interleave([iter("abc"), iter("1"), iter("xy")])) == list("a1xbyc")
    assert list(interleave([])) == []
