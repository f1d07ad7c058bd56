"""What the evaluations beyond accuracy found: retrieval, likelihood by position, attention, outliers, few bits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import Any

from difftune.report.charts import Line, heat_map, line_chart, map_picture, short
from difftune.report.compare import Estimate, Group, estimate
from difftune.report.curves import figure, grid, table_html
from difftune.report.paper import paper_figures, paper_lines
from difftune.report.runs import KIND_NAMES
from difftune.report.style import Style

PAPER_NAMES = {"diff": "paper, DIFF 3B", "transformer": "paper, Transformer 3B"}
"""The paper's two models, as tables show them."""


def needle_section(groups: Sequence[Group]) -> str:
    """A heat map for each recipe and task, over all of its runs."""
    figures = []
    for group in groups:
        for task, samples in _samples_with(group, "length", "depth", "found").items():
            scores: dict[tuple[float, int], list[float]] = {}
            for sample in samples:
                scores.setdefault((sample["depth"], sample["length"]), []).append(fmean(sample["found"]))
            depths, lengths = sorted({d for d, _ in scores}), sorted({n for _, n in scores})
            cells = [[fmean(scores[d, n]) if (d, n) in scores else float("nan") for n in lengths] for d in depths]
            picture = heat_map(
                [f"{depth:.0%}" for depth in depths],
                [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths],
                cells,
                x_label="length in tokens",
                y_label="depth",
            )
            figures.append(figure(picture, f"{group_title(group)}: {task}", f"{len(samples)} texts."))
    return grid(figures)


def nll_section(groups: Sequence[Group], styles: dict[str, Style]) -> str:
    """Cumulative NLL by position: a curve for each run and task."""
    by_task: dict[str, list[Line]] = {}
    for group in groups:
        for run in group.runs:
            for task, samples in _samples_of(run.samples(), "sums", "num_tokens").items():
                points = cumulative_nll([sample for sample in samples if sample["sums"]])
                style = styles[group.label]
                by_task.setdefault(task, []).append(Line(run.name, points, style.colour, style.dash))
    charts = [
        figure(
            line_chart(lines, x_label="position", y_label="nats a token"),
            task,
            "Mean NLL of all tokens up to the position.",
        )
        for task, lines in by_task.items()
    ]
    return grid(charts)


def cumulative_nll(documents: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Position and mean NLL of the tokens up to it, over documents with the NLL summed by bins of equal size."""
    if not documents:
        return []
    bins, tokens = len(documents[0]["sums"]), documents[0]["num_tokens"]
    points, total = [], 0.0
    for place in range(bins):
        total += fmean(document["sums"][place] for document in documents)
        position = round(tokens * (place + 1) / bins)
        points.append((float(position), total / position))
    return points


def attention_section(groups: Sequence[Group]) -> str:
    """Shares of the attention beside the paper's Table 3, and the maps of a head of each recipe."""
    tasks = _tasks_with(groups, "answer", "noise", "signal_to_noise")
    parts = []
    for task in tasks:
        rows = []
        for group in groups:
            values = [group_estimate(group, f"eval/{task}/{name}") for name in ("answer", "noise", "signal_to_noise")]
            if any(values):
                rows.append([group_title(group), *("-" if value is None else str(value) for value in values)])
        table = paper_figures()["table3_attention_by_depth"]
        for model, title in PAPER_NAMES.items():
            answer, noise = fmean(table[model]["answer"]), fmean(table[model]["noise"])
            rows.append([f"{title}, mean over depths", f"{answer:.3f}", f"{noise:.3f}", f"{answer / noise:.3g}"])
        parts.append(f"<h3>{escape(task)}</h3>{table_html(['', 'answer', 'noise', 'signal to noise'], rows, paper=2)}")
    if not parts:
        return ""
    note = (
        "Share of the last token's attention, by magnitude, that goes to the tokens of the answer and to the rest of "
        "the context; mean over heads, layers and prompts. The paper does not say how it normalised its shares."
    )
    return f"<p>{note}</p>{''.join(parts)}{_maps(groups)}"


def _maps(groups: Sequence[Group]) -> str:
    blocks = []
    for group in groups:
        run = group.runs[0]
        sample = next((sample for sample in run.samples() if sample.get("maps")), None)
        if sample is None:
            continue
        maps = sample["maps"]
        names = [("first", "A1" if "second" in maps else "A"), ("second", "A2"), ("difference", "A1 - lambda A2")]
        largest = max(abs(value) for name, _ in names if name in maps for row in maps[name] for value in row)
        pictures = "".join(
            f"<figure>{map_picture(maps[name], largest, f'{title} of {run.name}')}"
            f"<figcaption>{title}</figcaption></figure>"
            for name, title in names
            if name in maps
        )
        head = f"layer {maps['layer']}, head {maps['head']}"
        lam = f", lambda {maps['lambda']:.2f}" if "lambda" in maps else ""
        where = ", ".join(map(str, maps["answer"]))
        caption = f"{head}{lam}; the answer is in column {where}, the last row is the query."
        blocks.append(
            f'<div><h3>{escape(group_title(group))}: {escape(run.name)}</h3><div class="maps">{pictures}</div>'
            f"<figcaption>{escape(caption)}</figcaption></div>"
        )
    if not blocks:
        return ""
    note = "White is 0, blue above, red below; the root of the share, so that small ones are seen."
    return f"<p>{note}</p>{grid(blocks)}"


def outlier_section(groups: Sequence[Group]) -> str:
    """Largest magnitudes beside the paper's Table 5."""
    table = paper_figures()["table5_activations"]
    parts = []
    for task in _tasks_with(groups, "logits_top_1", "hidden_top_1"):
        for what, title in (("logits", "attention logits"), ("hidden", "hidden states")):
            rows = []
            for group in groups:
                values = [group_estimate(group, f"eval/{task}/{what}_{rank}") for rank in table["ranks"]]
                if any(values):
                    rows.append([group_title(group), *("-" if value is None else str(value) for value in values)])
            rows += [[name, *(short(value, 4) for value in table[model][what])] for model, name in PAPER_NAMES.items()]
            heads = [title, *(rank.replace("_", " ") for rank in table["ranks"])]
            parts.append(table_html(heads, rows, paper=2))
    return "".join(parts)


def bits_section(groups: Sequence[Group], styles: dict[str, Style]) -> str:
    """The accuracy (or, without one, the first figure) of other tasks by bits of the attention logits."""
    pattern = re.compile(r"eval/([^/]+)/(.+)_(\d+)bit$")
    found: dict[str, dict[str, dict[int, str]]] = {}
    for group in groups:
        for run in group.runs:
            for name in run.series:
                if match := pattern.match(name):
                    task, measured, bits = match.groups()
                    found.setdefault(task, {}).setdefault(measured, {})[int(bits)] = name
    figures = []
    for task, measures in found.items():
        measured = "accuracy" if "accuracy" in measures else next(iter(measures))
        lines = []
        for group in groups:
            means = [(bits, group_estimate(group, name)) for bits, name in sorted(measures[measured].items())]
            points = [(float(bits), value.mean) for bits, value in means if value is not None]
            halves = [value.half for _, value in means if value is not None]
            style = styles[group.label]
            lines.append(Line(group_title(group), points, style.colour, style.dash, markers=True, halves=halves))
        chart = line_chart([line for line in lines if line.points], x_label="bits", y_label=measured)
        figures.append(figure(chart, task, "Mean over runs and its 95% interval. At 16 the logits are not rounded."))
    if not any(figures):
        return ""
    beside = line_chart(paper_lines("fig8_hellaswag_vs_bits"), x_label="bits", y_label="accuracy, %")
    return grid([*figures, figure(beside, "The paper: HellaSwag, 3B (Fig. 8)")])


def group_title(group: Group) -> str:
    """The kind of attention in words, and what else tells the recipe from the others."""
    name = KIND_NAMES.get(group.kind, group.kind)
    return name if group.label == group.kind else f"{name} ({group.label.removeprefix(f'{group.kind}, ')})"


def _tasks_with(groups: Sequence[Group], *figures: str) -> list[str]:
    """Tasks of which some run has all of some figures."""
    tasks: dict[str, None] = {}
    for group in groups:
        for run in group.runs:
            suffix = f"/{figures[0]}"
            for name in run.series:
                task = name.removeprefix("eval/").removesuffix(suffix)
                if name == f"eval/{task}{suffix}" and all(f"eval/{task}/{figure}" in run.series for figure in figures):
                    tasks[task] = None
    return list(tasks)


def group_estimate(group: Group, metric: str) -> Estimate | None:
    """The last value of a metric over the runs of a group; None where no run has it."""
    values = [value for run in group.runs if (value := run.last(metric)) is not None]
    return estimate(values) if values else None


def _samples_with(group: Group, *names: str) -> dict[str, list[dict[str, Any]]]:
    return _samples_of([sample for run in group.runs for sample in run.samples()], *names)


def _samples_of(samples: Sequence[dict[str, Any]], *names: str) -> dict[str, list[dict[str, Any]]]:
    """Samples that have all of some fields, by task."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        if all(name in sample for name in names):
            by_task.setdefault(str(sample["task"]), []).append(sample)
    return by_task
