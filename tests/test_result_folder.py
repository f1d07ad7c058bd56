import json
from pathlib import Path
from typing import Any

import pytest

from difftune.result_folder import ResultFolder
from tests.evaluation.toy_task import Square, SquareTask

SETTINGS = {"model": "m", "model's weights": "abc", "tasks": {"squares": {"size": 5, "data": "d"}}}


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
        ({"model's weights": "abd"}, "model's weights"),
        ({"chat template": "new"}, "chat template"),
        ({"tasks": {"squares": {"size": 6, "data": "e"}}}, "data, size of task squares"),
    ],
)
def test_results_of_something_else_are_refused_with_what_has_changed(tmp_path: Path, changed: dict, what: str) -> None:
    folder = ResultFolder(tmp_path)
    folder.open(SETTINGS)
    folder.open({**SETTINGS, "model": "moved"})
    folder.append("squares", [Square(0, 0)])
    with pytest.raises(ValueError, match=f"changed since then: {what}. Choose another --out, or .* --overwrite"):
        folder.open({**SETTINGS, **changed})
    assert folder.samples(SquareTask()) == [Square(0, 0)], "refused, and left alone"
    folder.open({**SETTINGS, **changed}, overwrite=True)
    assert folder.samples(SquareTask()) == []
    folder.open({**SETTINGS, **changed})


def test_overwriting_leaves_the_other_tasks_alone_unless_all_are_of_something_else(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path)
    more = {"more": {"data": "x"}}
    folder.open({**SETTINGS, "tasks": {**SETTINGS["tasks"], **more}})
    for name in ("squares", "more"):
        folder.append(name, [Square(0, 0)])
        folder.write("m", {name: {"sum": 3}}, {f"eval/{name}/sum": 3.0, "eval/mean/accuracy": 0.5}, 0)
    (tmp_path / "notes.txt").write_text("mine")
    folder.open(SETTINGS, overwrite=True)
    assert (
        folder.results().keys()
        == {"more"}
        == json.loads((tmp_path / "settings.json").read_text())["tasks"].keys() - {"squares"}
    )
    assert [json.loads(line)["name"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        "eval/more/sum"
    ]
    folder.open({**SETTINGS, "model's weights": "other"}, overwrite=True)
    assert folder.results() == {} and not list((tmp_path / "samples").iterdir())
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", [None, "", "\0\0\0", "[]", "{}"])
def test_results_that_nothing_says_the_inputs_of_are_not_taken_for_those_of_today(tmp_path: Path, damage: Any) -> None:
    folder = ResultFolder(tmp_path)
    folder.open(SETTINGS)
    folder.append("squares", [Square(0, 0)])
    (tmp_path / "settings.json").unlink() if damage is None else (tmp_path / "settings.json").write_text(damage)
    with pytest.raises(ValueError, match=r"no readable settings.json says what they are of: .*--overwrite"):
        folder.open(SETTINGS)
    folder.open(SETTINGS, overwrite=True)
    assert folder.samples(SquareTask()) == []


def test_samples_that_a_power_cut_left_as_zeros_are_measured_again(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path)
    folder.append("squares", [Square(0, 0), Square(3, 9)])
    file = tmp_path / "samples" / "squares.jsonl"
    file.write_bytes(file.read_bytes() + b"\0\0\0\n\xff\0")
    assert folder.samples(SquareTask()) == [Square(0, 0), Square(3, 9)]
    assert len(file.read_bytes().splitlines()) == 2


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
