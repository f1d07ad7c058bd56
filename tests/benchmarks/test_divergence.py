from typing import Any

import pytest

from benchmarks import divergence

ARGUMENTS = ["--threads=1", "--tokens=64", "--vocab-size=100", "--hidden-size=16"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the children here, with the arguments that they would get."""
    reports: list[dict[str, Any]] = []

    def run_child(module: str, arguments: list[str], threads: int) -> dict[str, Any]:
        assert module == "benchmarks.divergence"
        divergence.main(arguments)
        return reports[-1]

    monkeypatch.setattr(divergence, "run_child", run_child)
    monkeypatch.setattr(divergence, "report", lambda **values: reports.append(values | {"step_gib": 1.0}))
    return reports


def test_every_form_has_its_loss_and_the_stored_one_is_below(in_process, capsys: pytest.CaptureFixture[str]) -> None:
    divergence.main(ARGUMENTS)
    plain, dense, sparse = in_process
    assert dense["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert dense["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    assert 0 < sparse["loss"] < plain["loss"]
    assert "| chunked, stored top 64 |" in capsys.readouterr().out


def test_too_little_memory_is_said_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "available_gib", lambda: 1.0)
    with pytest.raises(SystemExit, match=r"needs about 18 GiB and 1 are free: take fewer --tokens"):
        divergence.main([])
