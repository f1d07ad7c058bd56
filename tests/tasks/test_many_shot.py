import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from difftune import cli
from difftune.config import load_config
from tests.conftest import shared_data


@pytest.fixture
def toy_set(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("test", 3)):
        rows = [{"text": f"{label} {n}", "label": f"is_{label}"} for n in range(count) for label in ("a", "b")]
        (tmp_path / f"banking77_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command_measures_and_draws(
    evaluate: Callable[..., dict[str, Any]], toy_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    settings = [f"many_shot.folder={toy_set}", "many_shot.per_class=[1, 3]", "many_shot.orders=3", "many_shot.limit=4"]
    results = evaluate("--task", "many_shot:banking77", *settings)["banking77"]
    assert [point["shots"] for point in results["by_shots"]] == [2, 6] and results["chance"] == 0.5
    assert [len(point["accuracies"]) for point in results["by_shots"]] == [3, 3] and results["n"] == 4
    assert results["margin"] == results["margin_6"]
    assert "worst order" in capsys.readouterr().out
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples" / "banking77.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 3 * 4 and {sample["label"] for sample in samples} <= {"is a", "is b"}
    assert (tmp_path / "out" / "figures" / "banking77.png").is_file()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("set: trec", "evaluation.tasks.0.folder: say where the files of trec are"),
        ("train: a.jsonl", "evaluation.tasks.0.set: name one of trec, trec_fine, banking77, clinic150, or the files"),
        (
            "set: trek, folder: x",
            "must be one of trec, trec_fine, banking77, clinic150, got 'trek'; did you mean 'trec'?",
        ),
    ],
)
def test_keys_are_checked(keys: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(None, ["model.path=m", f"evaluation.tasks=[{{kind: many_shot, {keys}}}]"], command="evaluate")
    assert message in str(error.value)


@pytest.mark.real
def test_thirty_two_demonstrations_beat_chance_on_real_sets(smollm2: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--model", str(smollm2), "--task", "many_shot:trec", "--task", "many_shot:banking77"]
    settings = [f"many_shot.folder={shared_data() / 'icl'}", "many_shot.shots=[32]", "--limit", "40"]
    assert cli.main([*arguments, *settings, "--out", str(tmp_path / "out")]) == 0
    tasks = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    for name, figures in tasks.items():
        print(
            f"\n{name}: accuracy {figures['accuracy']:.3f}, {figures['accuracy_low']:.3f} to "
            f"{figures['accuracy_high']:.3f}, chance {figures['chance']:.3f}, {figures['seconds']} s"
        )
        assert figures["accuracy_low"] > figures["chance"]
