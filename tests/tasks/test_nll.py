from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from difftune.tasks.base import Defaults
from difftune.tasks.nll import NllTaskConfig

DEFAULTS = Defaults(max_new_tokens=7, batch_size=3, temperature=0.0, top_p=1.0, num_samples=1, seed=0)


def test_the_command_measures_and_draws(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    settings = ["nll.limit=3", "nll.length=200", "nll.bins=4", "nll.chunk_size=64"]
    results = evaluate("--task", "nll:synthetic:prose", *settings)
    assert results["nll"]["kind"] == "nll" and results["nll"]["n"] == 3 and results["nll"]["complete"]
    assert len(results["nll"]["cumulative"]) == 4 and results["nll"]["nll"] > 1
    shown = capsys.readouterr().out
    assert "nats a token" in shown and "NLL by position" in shown
    assert (tmp_path / "out" / "figures" / "nll.png").is_file()
    assert len((tmp_path / "out" / "samples" / "nll.jsonl").read_text().splitlines()) == 3
    assert '"eval/nll/nll_last"' in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_texts_are_documents_or_joined_to_longer_ones(tmp_path: Path) -> None:
    for n in range(6):
        (tmp_path / f"{n}.txt").write_text("a" * 100)
    assert NllTaskConfig(path=str(tmp_path), length=20, limit=4).build(DEFAULTS).num_items == 4
    joined = NllTaskConfig(path=str(tmp_path), length=20, join=True).build(DEFAULTS)
    assert [len(text) for text in joined.texts] == [202, 202, 202]
