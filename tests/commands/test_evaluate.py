import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from difftune.commands.evaluate import evaluate_tasks
from difftune.result_folder import ResultFolder
from tests.evaluation.toy_task import SquareTask


def evaluate(tasks: list[SquareTask], folder: Path | None, **options: Any) -> tuple[dict[str, Any], str]:
    shown = io.StringIO()
    settings: dict[str, Any] = {"time_limit_s": None, "should_stop": lambda: False, "label": "m", **options}
    results = ResultFolder(folder) if folder else None
    return evaluate_tasks(
        Console(file=shown), tasks, nn.Linear(1, 1), None, folder=results, **settings
    ), shown.getvalue()


def test_figures_are_returned_printed_and_written(tmp_path: Path) -> None:
    tasks = [SquareTask(4, "four"), SquareTask(5, "five")]
    results, shown = evaluate(tasks, tmp_path)
    assert [results[name]["sum"] for name in ("four", "five")] == [14, 30] and results["four"]["complete"]
    assert "squares of m" in shown and "14" in shown
    assert json.loads((tmp_path / "results.json").read_text())["tasks"] == results
    assert [json.loads(line)["index"] for line in (tmp_path / "samples" / "five.jsonl").read_text().splitlines()] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert all(task.closed for task in tasks)
    assert evaluate([SquareTask(4)], None)[0]["squares"]["sum"] == 14


class PaperTask(SquareTask):
    """A task whose result has a column that others of its kind lack."""

    def summarise(self, samples: Any) -> Any:
        result = super().summarise(samples)
        row = {**result.row(), "paper": "0.5"}
        object.__setattr__(result, "row", lambda: row)
        return result


def test_tasks_of_one_kind_share_a_table_whatever_columns_they_have() -> None:
    _, shown = evaluate([SquareTask(4, "four"), PaperTask(5, "five")], None)
    four, five = (next(line for line in shown.splitlines() if name in line) for name in ("four", "five"))
    assert "paper" in shown and [cell.strip() for cell in four.split("│")[1:4]] == ["four", "14", "-"]
    assert [cell.strip() for cell in five.split("│")[1:4]] == ["five", "30", "0.5"]


def interrupt(count: int) -> None:
    if count == 2:
        raise KeyboardInterrupt


def test_after_ctrl_c_partial_results_are_there_and_the_rest_is_done_later(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate([SquareTask(9, act=interrupt), SquareTask(3, "later")], tmp_path)
    partial = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert partial.keys() == {"squares"} and partial["squares"]["sum"] == 14 and not partial["squares"]["complete"]
    again = SquareTask(9)
    results, _ = evaluate([again, SquareTask(3, "later")], tmp_path)
    assert again.done == [[4, 5], [6, 7], [8]]
    assert results["squares"]["sum"] == 204 and results["squares"]["complete"] and results["later"]["sum"] == 5
    assert results["squares"]["seconds"] >= partial["squares"]["seconds"]
    nothing = SquareTask(9)
    evaluate([nothing], tmp_path)
    assert nothing.done == []


def test_a_signal_ends_the_work_between_blocks_and_later_tasks_are_not_begun(tmp_path: Path) -> None:
    first, second = SquareTask(9), SquareTask(3, "later")
    results, _ = evaluate([first, second], tmp_path, should_stop=lambda: len(first.done) == 1)
    assert first.done == [[0, 1]] and second.done == [] and results.keys() == {"squares"}
    assert not results["squares"]["complete"]


def test_the_time_that_a_task_leaves_over_goes_to_those_after_it(tmp_path: Path) -> None:
    results, _ = evaluate([SquareTask(3, "a"), SquareTask(3, "b")], tmp_path, time_limit_s=100)
    assert all(figures["complete"] for figures in results.values())
    assert evaluate([SquareTask(3)], None, time_limit_s=1e-9)[0] == {}
