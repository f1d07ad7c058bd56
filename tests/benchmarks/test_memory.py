from typing import Any

import pytest

from benchmarks import memory

ARGUMENTS = ["--threads=1", "--tokens=64", "--seq-len=32", "--vocab-size=300", "--hidden-size=32", "--layers=1"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the children here, with the arguments that they would get."""
    reports: list[dict[str, Any]] = []

    def run_child(module: str, arguments: list[str], threads: int) -> dict[str, Any]:
        assert module == "benchmarks.memory"
        memory.main(arguments)
        return reports[-1]

    monkeypatch.setattr(memory, "run_child", run_child)
    # A model this small does not raise the peak of a process that ran other tests before.
    monkeypatch.setattr(memory, "report", lambda **values: reports.append(values | {"step_gib": 1.0}))
    return reports


def test_both_models_have_one_loss_and_gradient(in_process, capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(ARGUMENTS)
    theirs, ours = in_process
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert "| ours / baseline " in capsys.readouterr().out


def test_nothing_is_printed_for_a_wrong_result(
    in_process, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        memory, "report", lambda **values: in_process.append(values | {"step_gib": 1.0, "loss": len(in_process) + 1.0})
    )
    with pytest.raises(SystemExit, match="loss differs"):
        memory.main(ARGUMENTS)
    assert "|" not in capsys.readouterr().out


def test_tokens_must_fill_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(["--tokens", "100", "--seq-len", "64"])
    assert "must be a multiple of" in capsys.readouterr().err
