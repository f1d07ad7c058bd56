"""What was logged during training, as charts over the steps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from difftune.report.charts import Line, line_chart
from difftune.report.compare import Group, shown_name
from difftune.report.runs import KIND_NAMES, Run
from difftune.report.style import Style, ramp

_MAIN_FIGURES = re.compile(r"/(accuracy|nll|margin|signal_to_noise|faithful|answer|noise)$")
_SHARES = re.compile(r"/(accuracy|faithful|answer|noise)(_|$)")
_NAN = float("nan")


def figure(svg: str, title: str, caption: str = "") -> str:
    """A chart with its title; empty where there is no chart."""
    if not svg:
        return ""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{svg}{note}</figure>"


def grid(figures: Sequence[str]) -> str:
    """Charts beside one another; empty where there are none."""
    present = [one for one in figures if one]
    return f'<div class="grid2">{"".join(present)}</div>' if present else ""


def legend_item(name: str, colour: str, dash: str = "", note: str = "") -> str:
    """A stroke as the charts have it, and what it stands for."""
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    stroke = f'<svg viewBox="0 0 30 8"><path d="M0 4H30" stroke="{colour}" stroke-width="3"{pattern}/></svg>'
    return f"<span>{stroke}{escape(name)}{f' <small>{escape(note)}</small>' if note else ''}</span>"


def metric_chart(
    groups: Sequence[Group],
    styles: dict[str, Style],
    metric: str,
    label: str,
    *,
    log_y: bool = False,
    markers: bool = False,
) -> str:
    """One metric over the steps, a curve a run."""
    lines = [
        Line(run.name, points_of(run, metric), styles[group.label].colour, styles[group.label].dash, markers)
        for group in groups
        for run in group.runs
    ]
    return line_chart(
        [line for line in lines if line.points],
        x_label="step",
        y_label=label,
        log_y=log_y,
        bounds=(0.0, 1.0) if _SHARES.search(metric) else (-math.inf, math.inf),
        marks=stage_marks(groups),
    )


def stage_marks(groups: Sequence[Group]) -> list[tuple[float, str]]:
    """First step of each stage after the first, and its name, where all runs have the same stages at the same steps."""
    found = [run.stage_starts for group in groups for run in group.runs]
    return (
        [(float(step), stage) for stage, step in list(found[0].items())[1:]]
        if found.count(found[0]) == len(found)
        else []
    )


def points_of(run: Run, metric: str) -> list[tuple[float, float]]:
    """A metric of a run over the steps; NaN where it was not finite."""
    return [(float(p.step), _NAN if p.value is None else p.value) for p in run.series.get(metric, [])]


def loss_charts(groups: Sequence[Group], styles: dict[str, Style]) -> str:
    """Loss and gradient norm."""
    caption = "Nats a label token."
    if stage_marks(groups):
        caption += " A stage has its own data, so the loss jumps where one begins (dotted)."
    return grid(
        [
            figure(metric_chart(groups, styles, "train/loss", "loss", log_y=True), "Training loss", caption),
            figure(
                metric_chart(groups, styles, "train/grad_norm", "norm", log_y=True),
                "Norm of the gradient, before clipping",
            ),
        ]
    )


def evaluation_charts(groups: Sequence[Group], styles: dict[str, Style]) -> str:
    """The main figure of each evaluation that was measured more than once."""
    names = dict.fromkeys(
        name
        for group in groups
        for run in group.runs
        for name, points in run.series.items()
        if name.startswith("eval/") and _MAIN_FIGURES.search(name) and len(points) > 1
    )
    return grid(
        [figure(metric_chart(groups, styles, name, shown_name(name), markers=True), shown_name(name)) for name in names]
    )


def lambda_charts(groups: Sequence[Group]) -> str:
    """Lambda of every layer over the steps, of the first run of each differential recipe."""
    figures = []
    for group in groups:
        run = group.runs[0]
        names = sorted(name for name in run.series if re.fullmatch(r"lambda/layer_\d+", name))
        lines = [
            Line(f"layer {int(name[-2:])}", points_of(run, name), ramp(place, len(names)))
            for place, name in enumerate(names)
        ]
        caption = "From light, the first layer, to dark, the last."
        if group.kind == "diff_v2":
            caption += " The mean over tokens and heads."
        title = f"{KIND_NAMES.get(group.kind, group.kind)}: {run.name}"
        figures.append(figure(line_chart(lines, x_label="step", y_label="lambda"), title, caption))
    return grid(figures)


def speed_charts(groups: Sequence[Group], styles: dict[str, Style]) -> str:
    """Tokens a second and memory."""
    return grid(
        [
            figure(metric_chart(groups, styles, "perf/tokens_per_s", "tokens/s"), "Training positions a second"),
            figure(metric_chart(groups, styles, "perf/peak_memory_gib", "GiB"), "Largest memory so far"),
        ]
    )


def table_html(heads: Sequence[str], rows: Sequence[Sequence[str]], *, paper: int = 0) -> str:
    """A table as HTML, the last `paper` rows of which are the paper's."""
    first = f"<th>{escape(heads[0])}</th>" + "".join(f'<th class="num">{escape(head)}</th>' for head in heads[1:])
    lines = []
    for place, row in enumerate(rows):
        cells = f"<td>{escape(row[0])}</td>" + "".join(f'<td class="num">{escape(cell)}</td>' for cell in row[1:])
        lines.append(f"<tr{' class=paper' if place >= len(rows) - paper else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{first}</tr>{"".join(lines)}</table></div>'
