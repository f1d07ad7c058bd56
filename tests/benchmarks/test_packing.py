import numpy as np
import pytest

from benchmarks import packing


def test_every_way_has_its_seconds_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    packing.main(["--documents", "300", "--seq-len", "2048", "--rounds", "1"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[2] for line in lines[2:]] == list(packing.WAYS)
    assert all(line[0] == "300" and float(line[3].split()[0]) >= 0 and float(line[4]) >= 0 for line in lines[2:])


def test_the_baseline_lays_the_same_rows() -> None:
    rng = np.random.default_rng(0)
    lengths, order = rng.integers(1, 65, size=500), rng.permutation(500)
    assert packing.one_by_one(lengths, order, 64) == list(packing.pack_best_fit(lengths, order, 64))
