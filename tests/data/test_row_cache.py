import logging
import mmap
import multiprocessing
import os
import pickle
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from difftune.data import row_cache
from difftune.data.datamodule import SFTDataModule
from difftune.data.packing import Rows, pack_best_fit
from difftune.data.row_cache import RowCache
from difftune.data.sources import Source
from difftune.data.upsampling import Upsampling

LENGTHS = np.random.default_rng(0).integers(1, 65, size=300)


def lay(epoch: int = 0) -> Rows:
    return pack_best_fit(LENGTHS, np.random.default_rng(epoch).permutation(len(LENGTHS)), 64)


def never() -> Rows:
    pytest.fail("laid again")


def files(cache: Path) -> list[str]:
    """The epochs kept, of all settings."""
    return sorted(path.name for path in cache.glob("rows-*/*") if path.name != "lock")


def is_mapped(rows: Rows) -> bool:
    base = rows.documents
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


def test_rows_are_laid_once_and_mapped_by_whoever_comes_later(tmp_path):
    first = RowCache(tmp_path).rows(LENGTHS, [1], 0, lay)
    again = RowCache(tmp_path).rows(LENGTHS.copy(), [1], 0, never)
    assert list(first) == list(again) == list(lay())
    assert is_mapped(first) and is_mapped(again)
    assert files(tmp_path) == ["epoch-0.bin"]
    kept = next(tmp_path.glob("rows-*/epoch-0.bin")).stat().st_size
    assert kept == 8 * (len(LENGTHS) + len(first) + 1)


def test_other_lengths_settings_or_code_are_other_rows(tmp_path, monkeypatch):
    cache = RowCache(tmp_path)
    one_more = LENGTHS + (np.arange(len(LENGTHS)) == 7) * (LENGTHS < 64)
    for number, (lengths, settings) in enumerate([(LENGTHS, [1]), (LENGTHS, [2]), (one_more, [1])], 1):
        cache.rows(lengths, settings, 0, lay)
        assert len(files(tmp_path)) == number
    monkeypatch.setattr(row_cache, "_code_fingerprint", lambda: "another version")
    cache.rows(LENGTHS, [1], 0, lay)
    assert len(files(tmp_path)) == 4


def test_the_first_epoch_and_the_last_two_are_kept(tmp_path):
    cache = RowCache(tmp_path)
    for epoch in range(5):
        rows = cache.rows(LENGTHS, [1], epoch, lambda: lay(epoch))  # noqa: B023 - called at once
        (next(tmp_path.glob("rows-*")) / f"epoch-{epoch}.tmp").touch()  # as a killed process leaves it
        if epoch == 1:
            second = rows
    assert files(tmp_path) == ["epoch-0.bin", "epoch-3.bin", "epoch-4.bin", "epoch-4.tmp"]
    assert list(second) == list(lay(1)), "who has it mapped goes on reading it"
    assert list(cache.rows(LENGTHS, [1], 1, lambda: lay(1))) == list(lay(1)), "it is made again where it is needed"


@pytest.mark.parametrize("damage", ["short", "empty", "of others", "odd"])
def test_damaged_file_is_made_again_and_said_so(damage, tmp_path, caplog):
    RowCache(tmp_path).rows(LENGTHS, [1], 0, lay)
    file = next(tmp_path.glob("rows-*/epoch-0.bin"))
    whole = file.read_bytes()
    file.write_bytes({"short": whole[:800], "empty": b"", "of others": whole[:-8], "odd": whole[:-3]}[damage])
    with caplog.at_level(logging.WARNING):
        again = RowCache(tmp_path).rows(LENGTHS, [1], 0, lay)
    assert "is damaged" in caplog.text
    assert list(again) == list(lay()) and file.read_bytes() == whole


@pytest.mark.parametrize("reason", ["a file is in the way", "the disk is full", "nobody may lock"])
def test_where_nothing_can_be_written_rows_stay_in_memory_and_it_is_said_once(reason, tmp_path, caplog, monkeypatch):
    def refused(*_):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "cache"
    if reason == "a file is in the way":
        folder.touch()
    elif reason == "the disk is full":
        monkeypatch.setattr(os, "fsync", refused)
    else:
        monkeypatch.setattr(row_cache, "FileLock", refused)
    cache = RowCache(folder)
    laid: list[int] = []

    def counted(epoch: int) -> Rows:
        laid.append(epoch)
        return lay(epoch)

    with caplog.at_level(logging.WARNING):
        for epoch in (0, 0, 1):
            rows = cache.rows(LENGTHS, [1], epoch, lambda: counted(epoch))  # noqa: B023 - called at once
            assert list(rows) == list(lay(epoch)) and not is_mapped(rows)
    assert laid == [0, 1]
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text and "in memory" in caplog.text
    assert not [path for path in tmp_path.rglob("epoch-*")]


def test_without_a_folder_rows_are_in_memory_and_nothing_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = RowCache(None)
    first = cache.rows(LENGTHS, [1], 0, lay)
    assert cache.rows(LENGTHS, [1], 0, never) is first
    assert not caplog.records and not list(tmp_path.iterdir())


def test_another_process_is_given_no_arrays(tmp_path):
    cache = RowCache(tmp_path)
    cache.rows(LENGTHS, [1], 0, lay)
    data = pickle.dumps(cache)
    assert len(data) < 1000
    assert is_mapped(pickle.loads(data).rows(LENGTHS, [1], 0, never))


def lay_in_child(folder, laid, results):
    def slow() -> Rows:
        with laid.open("a") as stream:
            stream.write("laid\n")
        time.sleep(0.3)
        return lay()

    results.put(RowCache(folder).rows(LENGTHS, [1], 0, slow).documents.tolist())


def test_of_several_processes_one_lays_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    results, laid = context.Queue(), tmp_path / "laid"
    children = [context.Process(target=lay_in_child, args=(tmp_path / "cache", laid, results)) for _ in range(3)]
    for child in children:
        child.start()
    assert [results.get(timeout=300) for _ in children] == [lay().documents.tolist()] * 3
    for child in children:
        child.join()
    assert laid.read_text() == "laid\n"


EASY = Source("synthetic:arithmetic", options={"terms": [2, 3], "operands": [1, 20], "count": 120})


def batches(digits, count: int = 70, **changed) -> list[dict[str, torch.Tensor]]:
    settings = {"train": [EASY], "seq_len": 80, "micro_batch_size": 4, "seed": 1, **changed}
    return list(islice(SFTDataModule(tokenizer=digits, **settings).train_dataloader(), count))


@pytest.mark.parametrize(
    "settings",
    [{}, {"packing": False}, {"shuffle": False}, {"upsampling": Upsampling(30, 0.9)}, {"num_workers": 2}],
    ids=["packed", "plain", "in order", "upsampled", "by workers"],
)
def test_batches_of_all_epochs_are_those_without_files(settings, digits, tmp_path):
    expected = batches(digits, **settings)
    for _ in range(2):
        got = batches(digits, cache_dir=tmp_path, **settings)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(got, expected, strict=True) for name in a)
    # All epochs in order are one.
    assert len(files(tmp_path)) in ([1] if settings == {"shuffle": False} else [2, 3])
    assert len(list(tmp_path.glob("rows-*"))) == 1


def test_a_later_training_lays_nothing(digits, tmp_path, monkeypatch):
    expected = batches(digits, 20, cache_dir=tmp_path)
    monkeypatch.setattr("difftune.data.corpus.pack_best_fit", lambda *_: pytest.fail("packed again"))
    got = batches(digits, 20, cache_dir=tmp_path)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(got, expected, strict=True))


def test_every_setting_that_changes_the_rows_has_its_own(digits, tmp_path):
    changes = [{}, {"seed": 2}, {"packing": False}, {"seq_len": 90}, {"shuffle": False}]
    changes += [{"upsampling": Upsampling(30, 0.9)}, {"upsampling": Upsampling(30, 0.95)}]
    changes += [{"train": [EASY, EASY]}, {"seq_len": 30}, {"seq_len": 30, "overlong": "truncate"}]
    for number, changed in enumerate(changes, 1):
        batches(digits, 1, cache_dir=tmp_path, **changed)
        assert len(list(tmp_path.glob("rows-*"))) == number
    # These do not.
    batches(digits, 1, cache_dir=tmp_path, micro_batch_size=2, max_epochs=3, accumulate_grad_batches=2)
    assert len(list(tmp_path.glob("rows-*"))) == len(changes)


def test_streamed_data_leave_no_files(digits, tmp_path):
    batches(digits, 5, cache_dir=tmp_path, streaming=True)
    assert not list(tmp_path.iterdir())
