"""Many-shot learning: accuracy over the number of demonstrations and over their orders, beside the paper's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from statistics import fmean
from typing import Any

from difftune.report.charts import Line, line_chart
from difftune.report.compare import Group
from difftune.report.curves import figure, grid, table_html
from difftune.report.paper import paper_many_shot, paper_orders
from difftune.report.probes import group_estimate, group_title
from difftune.report.runs import Run
from difftune.report.style import COLOURS, Style

_BY_SHOTS = re.compile(r"eval/(.+)/accuracy_(\d+)")
_EXTREMES = ("accuracy", "best", "worst", "margin")


def many_shot_section(groups: Sequence[Group], styles: dict[str, Style]) -> str:
    """Curves over the demonstrations beside the paper's Fig. 6, and orders of them beside its Fig. 7 and 11.

    Args:
        groups: The recipes.
        styles: How each is drawn, by its label.

    Returns:
        HTML; empty where no run measured many-shot learning.
    """
    charts, tables = [], []
    for task, shots in _tasks(groups).items():
        settings = _settings(groups, task)
        charts += [_chart(groups, styles, task, shots), paper_many_shot(settings["set"])]
        tables.append(_orders(groups, task, settings, shots[-1]))
    if not charts:
        return ""
    note = (
        "Mean over the orders of the demonstrations, then over runs with its 95% interval. The paper: 64K models of 3B "
        "parameters, from one demonstration a class to as many as fit 64K tokens."
    )
    return f"<p>{note}</p>{grid(charts)}{''.join(tables)}"


def _tasks(groups: Sequence[Group]) -> dict[str, list[int]]:
    """The numbers of demonstrations by task. Only this kind of task says what guessing would come to."""
    found: dict[str, set[int]] = {}
    for group in groups:
        for run in group.runs:
            for name in run.series:
                match = _BY_SHOTS.fullmatch(name)
                if match and f"eval/{match[1]}/chance" in run.series:
                    found.setdefault(match[1], set()).add(int(match[2]))
    return {task: sorted(shots) for task, shots in found.items()}


def _chart(groups: Sequence[Group], styles: dict[str, Style], task: str, shots: Sequence[int]) -> str:
    lines = []
    for group in groups:
        found = [(n, group_estimate(group, f"eval/{task}/accuracy_{n}")) for n in shots]
        points = [(float(n), value.mean) for n, value in found if value is not None]
        halves = [value.half for _, value in found if value is not None]
        style = styles[group.label]
        lines.append(Line(group_title(group), points, style.colour, style.dash, markers=True, halves=halves))
    chances = [value.mean for group in groups if (value := group_estimate(group, f"eval/{task}/chance")) is not None]
    ends = [(float(n), fmean(chances)) for n in (shots[0], shots[-1])]
    lines.append(Line("chance", ends, COLOURS[""], "2 3"))
    chart = line_chart([line for line in lines if line.points], x_label="demonstrations", y_label="accuracy")
    return figure(chart, task, "Dotted: guessing.")


def _orders(groups: Sequence[Group], task: str, settings: dict[str, Any], shots: int) -> str:
    """The extremes of the orders of the most demonstrations; empty where there was one order."""
    rows = []
    for group in groups:
        values = [group_estimate(group, f"eval/{task}/{name}") for name in _EXTREMES]
        if all(value is not None for value in values):
            rows.append([group_title(group), f"{shots:,}", str(settings["orders"]), *map(str, values)])
    if not rows:
        return ""
    beside = paper_orders(settings["set"], settings["order"])
    rows += [[f"paper, {model} 3B", "64K tokens", *cells] for model, *cells in beside]
    heads = ["", "demonstrations", "orders", "mean", "best", "worst", "margin"]
    title = f"{task}: orders of the same demonstrations, {settings['order']}"
    return f"<h3>{escape(title)}</h3>{table_html(heads, rows, paper=len(beside))}"


def _settings(groups: Sequence[Group], task: str) -> dict[str, Any]:
    """Set, kind of order and number of orders of a task, from the recipe or the folder of results."""
    for group in groups:
        for run in group.runs:
            for name, found in _all_settings(run):
                if name == task:
                    return {"set": found.get("set") or "", "order": found["order"], "orders": found["orders"]}
    return {"set": task, "order": "random", "orders": "-"}


def _all_settings(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tasks of this kind by name; a stage has its own where they are not those of the whole recipe."""
    yield from run.settings.get("tasks", {}).items()
    for place in (*run.config.get("stages", ()), run.config):
        for found in place.get("evaluation", {}).get("tasks", ()):
            if found.get("kind") == "many_shot":
                yield found.get("name") or found.get("set") or "many_shot", found
