"""The work of `difftune evaluate`: one task after the other, partial results on disk, tables at the end."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.means import mean_accuracy
from difftune.evaluation.task import Result, Task
from difftune.report.figures import FIGURES, can_draw, save_figure
from difftune.result_folder import ResultFolder

log = logging.getLogger(__name__)


def evaluate_tasks(
    console: Console,
    tasks: Sequence[Task[Any]],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    label: str,
    folder: ResultFolder | None,
    time_limit_s: float | None,
    should_stop: Callable[[], bool],
) -> dict[str, dict[str, Any]]:
    """Run tasks, print their figures and write them down.

    What an earlier call left in the folder is not done again. However this call ends (time limit, signal, Ctrl-C,
    error), the items that were done are in the folder, with the figures of what there is.

    Args:
        console: Where to print.
        tasks: What to evaluate.
        model: The model.
        tokenizer: Its tokenizer.
        label: Names the model in the titles and in the results.
        folder: Where the samples and results go. None: nowhere.
        time_limit_s: Seconds for all tasks together; what a task leaves over goes to those after it.
        should_stop: Polled while items are measured; True ends the work.

    Returns:
        The figures by task name.
    """
    found: dict[str, Result] = {}
    results: dict[str, dict[str, Any]] = {}
    begun = time.monotonic()
    try:
        for index, task in enumerate(tasks):
            started = time.monotonic()
            left = None if time_limit_s is None else max(0.0, time_limit_s - (started - begun))
            deadline = None if left is None else started + left / (len(tasks) - index)
            samples = folder.samples(task) if folder is not None else []
            before = folder.results().get(task.name, {}).get("seconds", 0.0) if folder is not None else 0.0
            counter = _Counter(task, samples, folder)
            try:
                with console.status(str(counter)) as status:
                    counter.show = status.update
                    task.run(
                        model,
                        tokenizer,
                        part=(0, 1),
                        should_stop=should_stop,
                        deadline=deadline,
                        done=tuple(samples),
                        on_block=counter.add,
                    )
            finally:
                task.close()
                if counter.samples:
                    result = found[task.name] = task.summarise(counter.samples)
                    seconds = round(before + time.monotonic() - started, 2)
                    results[task.name] = {
                        "kind": task.kind,
                        **result.to_dict(),
                        "complete": result.complete,
                        "seconds": seconds,
                    }
                    if folder is not None:
                        _write(folder, label, task, result, results[task.name])
            if should_stop():
                break
    finally:
        _print(console, tasks, found, results, label)
        mean = mean_accuracy(tasks, found)
        if mean:
            console.print(f"unweighted mean of {_count(tasks)} sets: {mean['eval/mean/accuracy']:.3f}", highlight=False)
            if folder is not None:
                folder.write(label, {}, mean, 0)
    return results


class _Counter:
    """Collects samples as they come, writes them, and shows how far a task is."""

    def __init__(self, task: Task[Any], samples: list[Any], folder: ResultFolder | None) -> None:
        self.task, self.samples, self._folder = task, list(samples), folder
        self.show: Callable[[str], None] = lambda text: None
        if samples:
            log.info("%s: %d of %d items were done before", task.name, self._items(), task.num_items)

    def add(self, new: list[Any]) -> None:
        """A block is done."""
        self.samples += new
        if self._folder is not None:
            self._folder.append(self.task.name, new)
        self.show(str(self))

    def __str__(self) -> str:
        return f"{self.task.name}: {self._items()} of {self.task.num_items}"

    def _items(self) -> int:
        return len({sample.index for sample in self.samples})


def _write(folder: ResultFolder, label: str, task: Task[Any], result: Result, figures: dict[str, Any]) -> None:
    if result.complete:
        folder.finish(task.name, result.samples)
    metrics = {f"eval/{task.name}/{name}": value for name, value in result.metrics().items()}
    folder.write(label, {task.name: figures}, metrics, 0)
    if task.kind in FIGURES and result.complete:
        if can_draw():
            save_figure(task.kind, {label: figures}, folder.path / "figures" / f"{task.name}.png")
        else:
            log.info("no picture of %s without matplotlib: pip install 'difftune[report]'", task.name)


def _print(
    console: Console,
    tasks: Sequence[Task[Any]],
    found: dict[str, Result],
    results: dict[str, dict[str, Any]],
    label: str,
) -> None:
    """A table for each kind, then what the tasks have to show besides."""
    for kind in dict.fromkeys(task.kind for task in tasks if task.name in found):
        of_kind = [task for task in tasks if task.kind == kind and task.name in found]
        what = "accuracy" if kind == "math" else kind
        table = Table(title=f"{what} of {label}")
        rows = {task.name: found[task.name].row() for task in of_kind}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        for column in ("task", *columns, "seconds"):
            table.add_column(column, justify="left" if column == "task" else "right")
        for task in of_kind:
            seconds = f"{results[task.name]['seconds']:.1f}"
            table.add_row(task.name, *(rows[task.name].get(column, "-") for column in columns), seconds)
        _show(console, table)
    for task in tasks:
        if task.name not in found:
            log.warning("%s: not begun", task.name)
            continue
        for table in found[task.name].tables():
            table.title = f"{task.name}: {table.title}"
            _show(console, table)
        if not found[task.name].complete:
            done = len({sample.index for sample in found[task.name].samples})
            log.warning(
                "%s: %d of its %d items were not reached; with --out the same command goes on from here",
                task.name,
                task.num_items - done,
                task.num_items,
            )


def _show(console: Console, table: Table) -> None:
    """Print a table below its title, which would be broken to the width of a narrow table."""
    title, table.title = table.title, None
    console.print(title, style="italic", highlight=False, soft_wrap=True)
    console.print(table)


def _count(tasks: Sequence[Task[Any]]) -> int:
    return sum(task.kind == "math" for task in tasks)
