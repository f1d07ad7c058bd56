import pytest
import torch

from benchmarks import attention

ARGUMENTS = ["--threads", "1", "--rounds", "1", "--tokens", "32", "--lengths", "16", "--head-dim", "8"]


def test_table_has_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    attention.main(ARGUMENTS)
    printed = capsys.readouterr().out
    assert printed.count("| 16 ") == 4
    assert "DiffLlama sdpa ms" in printed


def test_nothing_is_printed_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention.diff_attention
    monkeypatch.setattr(attention, "diff_attention", lambda *a, **k: right(*a, **k) + torch.tensor(0.01))
    with pytest.raises(SystemExit, match="is wrong"):
        attention.main(ARGUMENTS)
    assert "|" not in capsys.readouterr().out
