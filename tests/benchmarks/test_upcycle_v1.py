import pytest

from benchmarks import upcycle_v1


def test_every_way_has_its_losses_for_every_seed(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "2", "--recovery", "2", "--hidden-size", "32", "--held-out", "4"]
    upcycle_v1.main([*small, "--seeds", "2"])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    figures = {
        cells[1].strip(): [cell.strip() for cell in cells[2:4]] for cells in (line.split("|") for line in lines[2:])
    }
    assert figures.keys() == {"DIFF V2", *(way[0] for way in upcycle_v1.WAYS)}
    middle, low_high = figures["DIFF V2"][0].replace("-0.000", "0.000").split()
    assert middle == "0.000" and low_high.strip("()").replace("-", "") in ("0.0000.000",), "the function is the same"
    assert "median of 2 seeds" in printed
