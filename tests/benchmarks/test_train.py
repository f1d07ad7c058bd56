import argparse
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import train

SIZES = {"steps": 2, "batch_size": 2, "seq_len": 32, "vocab_size": 64, "hidden_size": 32, "layers": 1, "threads": 1}


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Run the children here, with the arguments that they would get; leave logging as it was."""
    collected: list[dict[str, Any]] = []

    def run_child(module: str, arguments: list[str], threads: int) -> dict[str, Any]:
        assert module == "benchmarks.train"
        train.main(arguments)
        return collected[-1]

    monkeypatch.setattr(train, "run_child", run_child)
    monkeypatch.setattr(train, "report", lambda **values: collected.append(values))
    logger = logging.getLogger("difftune")
    before = logger.handlers[:], logger.level, logger.propagate
    yield collected
    logger.handlers[:], logger.level, logger.propagate = before


def test_documents_are_the_same_in_every_run_and_end_with_eos() -> None:
    args = argparse.Namespace(**SIZES)
    equal, unequal = train.documents(args, True, 4), train.documents(args, False, 20)
    assert [len(row) for row in equal] == [32] * 4
    assert len({len(row) for row in unequal}) > 3
    assert max(len(row) for row in unequal) <= 16
    assert equal == train.documents(args, True, 4)
    assert all(row[-1] == train.EOS and min(row[:-1]) >= train.FIRST_WORD for row in equal + unequal)


def test_padding_is_neither_seen_nor_learned() -> None:
    (batch,) = train.padded_batches([[5, 6, 2], [7, 2]], 2)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 0]]
    assert batch["labels"].tolist() == [[5, 6, 2], [7, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_tokenizer_reads_the_documents_as_they_were_made() -> None:
    args = argparse.Namespace(**SIZES)
    ids = train.tokenizer(args)("t4 t63 t7", add_special_tokens=False)["input_ids"]
    assert ids == [4, 63, 7]


def test_ours_learns_what_the_bare_loop_learns(reports, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [train.BARE, train.OURS, *train.UNEQUAL]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    train.main(["--rounds=1", *options, "--only", *kinds])
    torch.set_num_threads(1)
    assert len(reports) == len(kinds)
    by_kind = dict(zip(kinds, reports, strict=True))
    for ours, baseline in ((train.OURS, train.BARE), (train.OURS_PADDED, train.BARE_PADDED)):
        for what in ("first_loss", "last_loss"):
            assert by_kind[ours][what] == pytest.approx(by_kind[baseline][what], rel=1e-4)
    printed = capsys.readouterr().out
    assert "tokens/s, full rows" in printed
    assert "times bare loop, DiffLlama" in printed
    assert "label tokens/s, documents of unequal length" in printed


@pytest.mark.parametrize("loss", [9.02, float("nan")])
def test_other_losses_stop_the_benchmark(loss: float) -> None:
    same = {"first_loss": 9.0, "last_loss": 8.9}
    train.check({train.BARE: [same], train.OURS: [same]})
    with pytest.raises(SystemExit, match="No speed is printed"):
        train.check({train.BARE: [same], train.OURS: [{**same, "first_loss": loss}]})


def test_speeds_are_compared_within_a_round() -> None:
    rows = train.rows_of({"a": [100.0, 50.0], "b": [200.0, 150.0]}, ["times a"])
    assert rows == [["a", "75 (50-100)", "1.00 (1.00-1.00)"], ["b", "175 (150-200)", "2.50 (2.00-3.00)"]]
