import pytest

from benchmarks import recover_v1


def test_every_way_has_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    recover_v1.main(["--steps", "3", "--recovery", "3", "--hidden-size", "32", "--threads", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    figures = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines[2:])}
    assert list(figures) == ["the Llama", "converted", *recover_v1.WAYS]
    assert all(0 < float(loss) < 10 for loss in figures.values())
