from collections.abc import Callable

import pytest
import torch

from benchmarks import packed_attention

ARGUMENTS = ["--threads", "1", "--rounds", "1", "--lengths", "64", "--mean-document", "12", "--head-dim", "8"]


def test_documents_fill_the_row() -> None:
    for row in (64, 1000):
        lengths = packed_attention.document_lengths(row, 30)
        assert sum(lengths) == row
        assert len(set(lengths)) > 1
        assert min(lengths) > 0


def test_table_has_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    packed_attention.main(ARGUMENTS)
    assert "| 64 " in capsys.readouterr().out


def leaking(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Attention that forgets where documents begin."""
    return lambda *a, cu_seqlens, **k: right(*a, **k)


def wrong_gradient(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The right output, but half of it cut from the graph."""
    return lambda *a, **k: right(*a, **k) / 2 + right(*a, **k).detach() / 2


@pytest.mark.parametrize("fault", [leaking, wrong_gradient])
def test_nothing_is_printed_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Callable
) -> None:
    monkeypatch.setattr(packed_attention, "diff_attention", fault(packed_attention.diff_attention))
    with pytest.raises(SystemExit, match="is wrong"):
        packed_attention.main(ARGUMENTS)
    assert "|" not in capsys.readouterr().out
