import pytest

from benchmarks import upcycle_v1


def test_every_way_has_its_losses(capsys: pytest.CaptureFixture[str]) -> None:
    upcycle_v1.main(["--steps", "2", "--recovery", "1", "--hidden-size", "32"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    figures = {cells[1].strip(): [float(c) for c in cells[2:4]] for cells in (line.split("|") for line in lines[2:])}
    assert len(figures) == 2 + len(upcycle_v1.WAYS)
    assert figures["DIFF V2"][0] == figures["the Llama itself"][0], "the function is the same"
