import json
from pathlib import Path

import pytest

from difftune.result_folder import ResultFolder
from tests.evaluation.toy_task import Square, SquareTask

SETTINGS = {"model": "m", "weights": [["a", 1, 2]], "tasks": {"squares": {"size": 5}}}


def test_samples_that_were_appended_are_read_back_without_a_line_that_was_cut(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path)
    folder.open(SETTINGS)
    folder.append("squares", [Square(0, 0), Square(3, 9)])
    folder.append("squares", [Square(1, 1)])
    file = tmp_path / "samples" / "squares.jsonl"
    with file.open("a") as stream:
        stream.write('{"index": 4, "val')
    assert folder.samples(SquareTask()) == [Square(0, 0), Square(3, 9), Square(1, 1)]
    assert len(file.read_text().splitlines()) == 3
    assert folder.samples(SquareTask(name="other")) == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model": "other"}, "another model"),
        ({"weights": [["a", 1, 3]]}, "another weights"),
        ({"tasks": {"squares": {"size": 6}}}, "another task squares"),
    ],
)
def test_results_of_something_else_are_not_gone_on_with(tmp_path: Path, changed: dict, what: str) -> None:
    ResultFolder(tmp_path).open(SETTINGS)
    ResultFolder(tmp_path).open(SETTINGS)
    with pytest.raises(ValueError, match=f"{what}: they cannot be gone on with; choose another --out"):
        ResultFolder(tmp_path).open({**SETTINGS, **changed})


def test_a_task_can_be_added_and_figures_of_the_others_stay(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path)
    folder.open(SETTINGS)
    folder.write("m", {"squares": {"sum": 3}}, {"eval/squares/sum": 3.0}, 0)
    folder.open({**SETTINGS, "tasks": {"more": {}}})
    folder.write("m", {"more": {"sum": None}}, {"eval/more/sum": float("nan")}, 0)
    folder.write("m", {"squares": {"sum": 4}}, {"eval/squares/sum": 4.0}, 0)
    assert folder.results() == {"squares": {"sum": 4}, "more": {"sum": None}}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["name"], line["value"]) for line in lines] == [("eval/more/sum", None), ("eval/squares/sum", 4.0)]
    assert set(lines[0]) == {"step", "tokens", "name", "value", "stage", "time"}
    assert json.loads((tmp_path / "settings.json").read_text())["tasks"].keys() == {"squares", "more"}
