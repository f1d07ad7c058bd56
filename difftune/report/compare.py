"""Runs of several recipes side by side: each metric's mean over the seeds, with its 95% interval."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich.table import Table

from difftune.report.runs import Run, differing_keys, load_runs

# Two-sided 95% quantiles of Student's t with 1, 2, ... degrees of freedom; then at most so many.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_T95_BEYOND = ((120, 1.980), (60, 2.000), (40, 2.021))

_DETAILS = re.compile(
    r"_layer_\d+|_depth_\d+|_low\b|_high\b|_low_\d+bit|_high_\d+bit|/n\b|/n_\d+bit|/seconds\b|_top_(2|3|10)\b"
)
# How answers look: worth a row only where runs differ in it.
_ASIDE = re.compile(r"/(truncated|unparsed|mean_length|chance)(_\d+bit)?$")
_LAST_PART = 0.1

FINAL_LOSS = "final training loss"
"""Mean of `train/loss` over the last tenth of the steps of the last stage."""


@dataclass(frozen=True)
class Estimate:
    """A mean over runs."""

    mean: float
    """Of the values."""
    half: float
    """Half the width of the 95% interval; NaN for a single run."""
    n: int
    """Runs."""

    def __str__(self) -> str:
        """Mean and half width, to the same place."""
        if math.isnan(self.half):
            return f"{self.mean:,.0f}" if abs(self.mean) >= 1000 else f"{self.mean:.4g}"
        if self.half == 0:
            return f"{self.mean:,.4g} ± 0"
        places = max(0, min(6, 1 - math.floor(math.log10(self.half))))
        return f"{self.mean:,.{places}f} ± {self.half:,.{places}f}"


@dataclass(frozen=True)
class Group:
    """Runs of one recipe, with different seeds."""

    label: str
    """What tells it from the others."""
    kind: str
    """Kind of attention."""
    runs: list[Run]
    """The runs."""


@dataclass(frozen=True)
class Comparison:
    """Metrics by group."""

    groups: list[Group]
    """The recipes."""
    rows: dict[str, list[Estimate | None]]
    """By metric, an estimate for each group; None where a group does not have it."""
    differences: dict[str, Estimate]
    """By metric, first group minus second one, where there are two groups of at least two runs."""
    same: dict[str, float]
    """Metrics of how answers look that are the same in all runs (more than one), and so have no row."""


def t95(degrees: float) -> float:
    """Two-sided 95% quantile of Student's t; between whole degrees of freedom the larger, which is the safe side."""
    whole = int(degrees)
    if whole < 1:
        return math.inf
    if whole <= len(_T95):
        return _T95[whole - 1]
    return next((quantile for least, quantile in _T95_BEYOND if whole >= least), _T95[-1])


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval of independent values, by Student's t.

    Example:
        >>> str(estimate([1.0, 2.0, 3.0]))
        '2.0 ± 2.5'
    """
    n = len(values)
    half = t95(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(fmean(values), half, n)


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean difference of two independent samples with its 95% interval, by Welch's t; at least two values each.

    Source:
        Welch, "The generalization of Student's problem when several different population variances are involved",
        Biometrika 34 (1947).
    """
    variances = [stdev(values) ** 2 / len(values) for values in (first, second)]
    total = sum(variances)
    spread = sum(v**2 / (len(values) - 1) for v, values in zip(variances, (first, second), strict=True))
    half = t95(total**2 / spread) * math.sqrt(total) if spread else 0.0
    return Estimate(fmean(first) - fmean(second), half, min(len(first), len(second)))


def compare_runs(paths: Sequence[str | Path], *, metrics: Sequence[str] = ()) -> Comparison:
    """Group runs by recipe, whatever their seed, and estimate every metric.

    Args:
        paths: Run folders, or folders of results.
        metrics: Names to show, with `*` for any text. Default: the final loss, the speed, and the main figures of the
            evaluations (no single layers, depths or bounds).

    Raises:
        ValueError: If a folder is no run, is given twice, or no metric is left.
    """
    groups = group_runs(load_runs(paths))
    names = dict.fromkeys(name for group in groups for run in group.runs for name in _values(run))
    chosen = [name for name in names if _is_chosen(name, metrics)]
    if not chosen:
        raise ValueError(f"no metric matches {', '.join(metrics)}; there are {', '.join(sorted(names)) or 'none'}")
    rows: dict[str, list[Estimate | None]] = {}
    differences: dict[str, Estimate] = {}
    same: dict[str, float] = {}
    for name in chosen:
        found = [[value for run in group.runs if (value := _values(run).get(name)) is not None] for group in groups]
        values = [value for group in found for value in group]
        if not metrics and _ASIDE.search(name) and len(values) > 1 and len(set(values)) == 1:
            same[name] = values[0]
            continue
        rows[name] = [estimate(values) if values else None for values in found]
        if len(groups) == 2 and all(len(values) > 1 for values in found):
            differences[name] = difference(*found)
    return Comparison(groups, rows, differences, same)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by recipe, in the order given; a group is named by what tells it from the others."""
    grouped: list[list[Run]] = []
    for run in runs:
        alike = next((group for group in grouped if not differing_keys([group[0], run])), None)
        if alike is None:
            grouped.append([run])
        else:
            alike.append(run)
    kinds = Counter(group[0].kind for group in grouped)
    return [Group(_label(group[0], kinds, grouped), group[0].kind, group) for group in grouped]


def comparison_table(comparison: Comparison) -> Table:
    """The comparison for a terminal: the figures of a task beneath its name."""
    title = "mean ± half of the 95% interval over seeds"
    table = Table(title=title, title_justify="left", caption=same_text(comparison) or None, caption_justify="left")
    table.add_column("metric", overflow="fold")
    for group in comparison.groups:
        table.add_column(
            f"{group.label} ({len(group.runs)} {'run' if len(group.runs) == 1 else 'runs'})",
            justify="right",
            overflow="fold",
        )
    if comparison.differences:
        table.add_column("difference", justify="right")
    task = ""
    for name, estimates in comparison.rows.items():
        before, _, figure = shown_name(name).rpartition("/")
        if before and before != task:
            # Under the name of its task a metric's own is short enough for a narrow terminal.
            table.add_row(f"{before}/", style="bold")
        task = before
        shown = f"  {figure}" if before else figure
        cells = [shown, *("-" if one is None else str(one) for one in estimates)]
        if comparison.differences:
            cells.append(str(comparison.differences[name]) if name in comparison.differences else "-")
        table.add_row(*cells)
    return table


def same_text(comparison: Comparison) -> str:
    """A line about the metrics that are the same in all runs; empty where there are none."""
    values = ", ".join(f"{shown_name(name)} {value:.4g}" for name, value in comparison.same.items())
    return f"The same in all runs: {values}." if values else ""


def shown_name(metric: str) -> str:
    """A metric's name without `eval/`."""
    return metric.removeprefix("eval/")


def _values(run: Run) -> dict[str, float]:
    """What a run came to, by metric."""
    values: dict[str, float] = {}
    losses = [point for point in run.series.get("train/loss", []) if point.value is not None]
    if losses:
        stage = [point for point in losses if point.stage == losses[-1].stage]
        first, last = stage[0].step, stage[-1].step
        late = [point.value for point in stage if point.step > last - max(1, (last - first) * _LAST_PART)]
        values[FINAL_LOSS] = fmean(value for value in late if value is not None)
    for name in run.series:
        value = run.last(name)
        if value is not None and name != "train/loss":
            values[name] = value
    return values


def _is_chosen(name: str, patterns: Sequence[str]) -> bool:
    if patterns:
        return any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(shown_name(name), pattern) for pattern in patterns)
    if name.startswith("eval/"):
        return not _DETAILS.search(name)
    return name in (FINAL_LOSS, "perf/tokens_per_s")


def _label(run: Run, kinds: Counter[str], grouped: list[list[Run]]) -> str:
    """The kind of attention where that tells the recipe from the others, else with the first keys that differ."""
    if run.kind and kinds[run.kind] == 1:
        return run.kind
    rivals = [group[0] for group in grouped if group[0].kind == run.kind]
    keys = differing_keys(rivals) if all(rival.config for rival in rivals) else {}
    place = rivals.index(run)
    shown = [f"{key.rpartition('.')[2]}={values[place]}" for key, values in list(keys.items())[:2]]
    shown += ["..."] if len(keys) > 2 else []
    return ", ".join(([run.kind] if run.kind else []) + (shown or [run.name]))
