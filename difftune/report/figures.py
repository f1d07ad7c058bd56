"""Pictures of evaluation results: PNG files, one or several models in each. Needs matplotlib (`difftune[report]`).

`python -m difftune.report.figures OUT_A OUT_B --task books --png nll.png` draws a task of several folders that
`difftune evaluate --out` wrote, such as those of a DIFF model and of its softmax baseline.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difftune.report.attention_maps import draw_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT, _DPI = 6.4, 4.0, 150
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_STYLES = ("-", "--", "-.", ":")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_position_nll(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Cumulative average NLL by position, a line a model, with a band of two standard errors where there is one.

    Args:
        results: Figures of a task of the kind `nll`, as in results.json, by label.
    """
    figure = _figure(1)
    axes = figure.subplots()
    for index, (label, result) in enumerate(results.items()):
        colour, style = _COLOURS[index % len(_COLOURS)], _STYLES[index % len(_STYLES)]
        positions, values = result["positions"], _numbers(result["cumulative"])
        axes.plot(positions, values, style, color=colour, label=label, linewidth=1.6)
        errors = _numbers(result["spread"])
        low, high = ([v + sign * 2 * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(positions, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("position, tokens")
    axes.set_ylabel("cumulative average NLL, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_heat_map(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Retrieval by depth and length, a map a model side by side, with the numbers in the cells.

    Args:
        results: Figures of a task of the kind `needle`, as in results.json, by label.
    """
    figure = _figure(len(results))
    row = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (label, result) in zip(row, results.items(), strict=True):
        cells = [_numbers(values) for values in result["cells"]]
        axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, values in enumerate(cells):
            for x, value in enumerate(values):
                axes.text(x, y, "" if value != value else f"{value:.2f}", ha="center", va="center", fontsize=8)
        lengths = [f"{length:,}" for length in result["lengths"]]
        axes.set_xticks(range(len(lengths)), lengths, rotation=45 if len(lengths) > 4 else 0)
        axes.set_yticks(range(len(result["depths"])), [f"{depth:.0%}" for depth in result["depths"]])
        axes.set_xlabel("length, tokens")
        axes.set_ylabel("depth of the answer")
        axes.set_title(label, fontsize=10)
    figure.colorbar(row[0].images[0], ax=list(row), label="accuracy")
    return figure


def draw_many_shot(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy by number of demonstrations, a line a model, with a band from the worst order to the best.

    Args:
        results: Figures of a task of the kind `many_shot`, as in results.json, by label.
    """
    figure = _figure(1)
    axes = figure.subplots()
    for index, (label, result) in enumerate(results.items()):
        colour, style = _COLOURS[index % len(_COLOURS)], _STYLES[index % len(_STYLES)]
        shots = [point["shots"] for point in result["by_shots"]]
        orders = [point["accuracies"] for point in result["by_shots"]]
        means = [sum(values) / len(values) for values in orders]
        axes.plot(shots, means, style, color=colour, label=label, marker="o", markersize=4)
        axes.fill_between(shots, [min(v) for v in orders], [max(v) for v in orders], color=colour, alpha=0.15)
        axes.axhline(result["chance"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("demonstrations")
    axes.set_ylabel("accuracy (dotted: chance)")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


FIGURES: dict[str, Callable[[Mapping[str, Mapping[str, Any]]], Figure]] = {
    "nll": draw_position_nll,
    "needle": draw_heat_map,
    "many_shot": draw_many_shot,
    "attention_noise": draw_attention,
}
"""What draws the results of a kind of task; kinds that are not here have no picture."""


def save_figure(kind: str, results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw results of one kind and write a PNG.

    Args:
        kind: One of `FIGURES`.
        results: Figures of a task, as in results.json, by label.
        path: The file; its folder is made.
    """
    figure = FIGURES[kind](results)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def read_results(folders: Sequence[str | Path], task: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The kind of a task and its figures in several folders, by the name of the folder.

    Raises:
        ValueError: If a folder lacks the task, or two have it as different kinds.
        FileNotFoundError: If a folder has no results.json.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        tasks = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"]
        if task not in tasks:
            raise ValueError(f"{folder} has no results of {task!r}; there are {', '.join(tasks) or 'none'}")
        name = folder.name
        found[name if name not in found else str(folder)] = tasks[task]
    kinds = sorted({str(result["kind"]) for result in found.values()})
    if len(kinds) > 1 or kinds[0] not in FIGURES:
        raise ValueError(f"{task!r} is of the kind {' and '.join(kinds)}: there is a picture of {', '.join(FIGURES)}")
    return kinds[0], found


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw a task of several folders."""
    parser = argparse.ArgumentParser(prog="python -m difftune.report.figures", description="Draw results of a task.")
    parser.add_argument("folders", nargs="+", help="folders that difftune evaluate --out wrote")
    parser.add_argument("--task", required=True, help="name of the task, as in results.json")
    parser.add_argument("--png", required=True, help="file to write")
    given = parser.parse_args(arguments)
    if not can_draw():
        parser.error("matplotlib is not installed: pip install 'difftune[report]'")
    try:
        kind, results = read_results(given.folders, given.task)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    save_figure(kind, results, given.png)
    print(given.png)


def _figure(columns: int) -> Figure:
    # The class itself and not pyplot: no window system, and no list of open figures.
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH * columns, _HEIGHT), layout="constrained")


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


if __name__ == "__main__":
    main()
