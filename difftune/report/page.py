"""One self-contained page about runs: what they came to, how they got there, what they write, beside the paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from difftune.report.compare import Comparison, Group, compare_runs, group_runs, same_text, shown_name
from difftune.report.curves import evaluation_charts, lambda_charts, legend_item, loss_charts, speed_charts
from difftune.report.harness import harness_section
from difftune.report.headline import headline_html, headline_of
from difftune.report.many_shot import many_shot_section
from difftune.report.paper import paper_charts
from difftune.report.probes import (
    attention_section,
    bits_section,
    group_title,
    needle_section,
    nll_section,
    outlier_section,
)
from difftune.report.runs import Run, differing_keys, load_runs
from difftune.report.style import Style, style_of

SAMPLES_SHOWN = 8
"""Samples of each task and run; the folder has all."""

# The page asks nothing of any network, and the browser holds it to that.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_GOOD, _BAD = ("correct", "true", "found"), ("wrong", "unparsed", "timeout", "false", "error", "missed")


def write_report(paths: Sequence[str | Path], out: Path) -> Path:
    """Write the page.

    Args:
        paths: Run folders, or folders of results.
        out: The file to write; its folder is made.

    Returns:
        The file.

    Raises:
        ValueError: If a folder is no run, or is given twice.
    """
    page = render_report(paths)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def render_report(paths: Sequence[str | Path]) -> str:
    """The page as text; see `write_report`."""
    groups = group_runs(load_runs(paths))
    styles = style_of(groups)
    runs = [run for group in groups for run in group.runs]
    sections = [
        ("headline", "What changed", _headlines(runs)),
        ("summary", "Results", _summary(paths, groups)),
        ("loss", "Loss", loss_charts(groups, styles)),
        ("evaluations", "Evaluations during training", evaluation_charts(groups, styles)),
        ("lambda", "Lambda by layer", lambda_charts(groups)),
        ("needle", "Retrieval by depth and length", needle_section(groups)),
        ("many-shot", "Many-shot learning", many_shot_section(groups, styles)),
        ("nll", "Likelihood by position", nll_section(groups, styles)),
        ("attention", "Attention to the answer and to the noise", attention_section(groups)),
        ("outliers", "Outliers of the activations", outlier_section(groups)),
        ("bits", "Attention logits in few bits", bits_section(groups, styles)),
        ("harness", "Zero-shot tasks of the lm-evaluation-harness", harness_section(groups)),
        ("speed", "Speed and memory", speed_charts(groups, styles)),
        ("samples", "Samples", "".join(_samples(run) for run in runs)),
        ("recipes", "How the runs differ", _recipes(runs)),
        ("paper", "The paper's figures", paper_charts()),
    ]
    present = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in present)
    bodies = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>' for key, title, body in present)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs of {len(groups)} recipe{'s' * (len(groups) > 1)}"
    assets = resources.files("difftune.report")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - difftune</title>"
        f"<style>{assets.joinpath('page.css').read_text(encoding='utf-8')}</style>"
        f"</head><body><main><h1>{escape(title)}</h1><p>{_subtitle(runs)}</p><nav>{links}</nav>"
        f"{_legend(groups, styles)}{bodies}<footer>{_footer(runs)}</footer></main>"
        f"<script>{assets.joinpath('page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _headlines(runs: list[Run]) -> str:
    parts = []
    for run in runs:
        body = headline_html(headline_of(run))
        parts.append(f"<h3>{escape(run.name)}</h3>{body}" if body and len(runs) > 1 else body)
    return "".join(parts)


def _subtitle(runs: list[Run]) -> str:
    steps = max((points[-1].step for run in runs for points in run.series.values() if points), default=0)
    tokens = max((points[-1].tokens for run in runs for points in run.series.values() if points), default=0)
    parts = [f"up to {steps:,} steps"] if steps else []
    parts += [f"{tokens:,} tokens"] if tokens else []
    machine = runs[0].environment
    parts += [", ".join(machine.get("devices") or [f"{machine.get('cpu_count', '?')} CPU cores"])] if machine else []
    return escape("; ".join(parts))


def _footer(runs: list[Run]) -> str:
    packages = runs[0].environment.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    folders = ", ".join(str(run.path) for run in runs)
    return f"Read from {escape(folders)}.{' Versions of the first: ' + escape(versions) + '.' if versions else ''}"


def _legend(groups: list[Group], styles: dict[str, Style]) -> str:
    items = []
    for group in groups:
        count = f"{len(group.runs)} runs" if len(group.runs) > 1 else group.runs[0].name
        items.append(legend_item(group_title(group), styles[group.label].colour, styles[group.label].dash, count))
    return f'<div class="legend">{"".join(items)}</div>'


def _summary(paths: Sequence[str | Path], groups: list[Group]) -> str:
    comparison = compare_runs(paths)
    seeds = max(len(group.runs) for group in groups)
    note = (
        "Mean and half of the 95% interval over runs that differ in their seed only (Student's t; the difference: "
        "Welch's). Differences whose interval leaves out 0 are on a grey ground."
        if seeds > 1
        else "One run of each recipe: chance between seeds is not known. The last value of each metric."
    )
    same = same_text(comparison)
    return f"<p>{note}</p>{_comparison_html(comparison)}{f'<p><small>{escape(same)}</small></p>' if same else ''}"


def _comparison_html(comparison: Comparison) -> str:
    heads = "".join(f'<th class="num">{escape(group.label)}</th>' for group in comparison.groups)
    last = '<th class="num">difference</th>' if comparison.differences else ""
    rows = []
    for name, estimates in comparison.rows.items():
        cells = "".join(f'<td class="num">{"-" if one is None else escape(str(one))}</td>' for one in estimates)
        found = comparison.differences.get(name)
        clear = found is not None and abs(found.mean) > found.half
        cells += (
            f'<td class="num">{"-" if found is None else escape(str(found))}</td>' if comparison.differences else ""
        )
        rows.append(f"<tr{' class=clear' if clear else ''}><td>{escape(shown_name(name))}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr><th>metric</th>{heads}{last}</tr>{"".join(rows)}</table></div>'


def _samples(run: Run) -> str:
    by_task: dict[str, list[dict]] = {}
    for sample in run.samples():
        if "text" in sample:
            by_task.setdefault(str(sample["task"]), []).append(sample)
    blocks = []
    for task, samples in by_task.items():
        shown = "".join(_sample(sample) for sample in samples[:SAMPLES_SHOWN])
        count = f"{min(SAMPLES_SHOWN, len(samples))} of {len(samples)}, the first ones"
        title = f"{escape(run.name)}: {escape(task)} <small>{count}</small>"
        blocks.append(f"<details><summary>{title}</summary>{shown}</details>")
    return "".join(blocks)


def _sample(sample: dict) -> str:
    verdict = sample.get("verdict")
    if verdict is None and "found" in sample:
        verdict = "found" if all(sample["found"]) else "missed"
    tone = "good" if verdict in _GOOD else "bad" if verdict in _BAD else ""
    rows = [(name, sample[name]) for name in ("question", "text", "answer", "gold", "numbers") if sample.get(name)]
    body = "".join(f"<dt>{_SAMPLE_NAMES.get(name, name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows)
    grade = f'<dt>verdict</dt><dd><span class="verdict {tone}">{escape(str(verdict))}</span></dd>' if verdict else ""
    return f'<dl class="sample">{body}{grade}</dl>'


_SAMPLE_NAMES = {"text": "model", "answer": "answer found", "gold": "right answer", "numbers": "right answer"}


def _recipes(runs: list[Run]) -> str:
    runs = [run for run in runs if run.config]  # a folder of results has no recipe
    if len(runs) < 2:
        return ""
    keys = differing_keys(runs)
    rows = [("seed", [run.seed for run in runs]), *keys.items()]
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    lines = "".join(
        f"<tr><td>{escape(key)}</td>{''.join(f'<td>{escape(str(value))}</td>' for value in values)}</tr>"
        for key, values in rows
    )
    note = "Every key of the resolved recipes in which the runs differ." if keys else "The recipes differ in nothing."
    return f'<p>{note}</p><div class="scroll"><table><tr><th>key</th>{heads}</tr>{lines}</table></div>'
