"""What a run changed, in a few lines: figures before and after, answers before and after, how to load the model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from difftune.report.runs import Run
from difftune.report.summary import read_json_lines

# Figures that sum a task up, the first that it has; what is lower when it is better.
_FIGURES = ("accuracy", "nll", "signal_to_noise", "faithful")
_LOWER = ("nll",)
_UNITS = {"nll": " nats a token"}
_ANSWERS = 3
_WIDTH = 160
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Change:
    """One task, before the first step and after the last one."""

    task: str
    """Its name."""
    figure: str
    """What was measured, such as `accuracy`."""
    before: float
    """At step 0 of the first stage."""
    after: float
    """At the last evaluation of the run."""
    interval: tuple[float, float] | None
    """95% interval of after - before over the items that both evaluations have; None where they have none."""
    items: int
    """How many these are."""

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or that the interval holds no answer."""
        if self.interval is None:
            return "no interval is known"
        if self.interval[0] <= 0 <= self.interval[1]:
            return "no difference shown"
        return "better" if (self.after > self.before) != (self.figure in _LOWER) else "worse"

    def __str__(self) -> str:
        """One line of text."""
        change = f"{self.after - self.before:+.3f}"
        if self.interval is not None:
            change += f", 95% interval {self.interval[0]:+.3f} to {self.interval[1]:+.3f} over {self.items:,} items"
        values = f"{self.before:.3f} before, {self.after:.3f} after"
        return f"{self.task}: {self.verdict}. {self.figure} {values}{_UNITS.get(self.figure, '')} ({change})"


@dataclass(frozen=True)
class Answer:
    """One problem, and what the model wrote."""

    question: str
    """As it was asked."""
    right: str
    """The reference answer."""
    before: str
    """Text before training."""
    after: str
    """Text after training."""
    verdicts: tuple[str, str]
    """How the two were graded."""


@dataclass(frozen=True)
class Headline:
    """What a run changed."""

    changes: list[Change]
    """One for each task that was measured before and after."""
    answers: list[Answer]
    """A few problems with both answers."""
    model: Path | None
    """The exported folder, where there is one."""


def headline_of(run: Run) -> Headline:
    """What a run changed, from its folder.

    Args:
        run: A run folder; a folder of results has no before and after, and an empty headline.

    Returns:
        Changes, answers, and the folder to load.
    """
    files = run.sample_files() if run.config else []
    before = read_json_lines(files[0]) if len(files) > 1 and files[0].stem.endswith("-0") else []
    after = read_json_lines(files[-1]) if before else []
    exported = run.path / "export"
    is_there = (exported / "config.json").is_file() or (exported / "adapter_config.json").is_file()
    return Headline(_changes(run, before, after), _answers(before, after), exported if is_there else None)


def headline_text(headline: Headline) -> str:
    """The headline for a terminal; empty where nothing is known."""
    lines = [f"  {change}" for change in headline.changes]
    if lines:
        lines.insert(0, "What changed")
    for answer in headline.answers:
        lines += [
            "",
            f"  question  {_one_line(answer.question)}   (answer: {_one_line(answer.right)})",
            f"  before    {_one_line(answer.before) or '(nothing)'}   [{answer.verdicts[0]}]",
            f"  after     {_one_line(answer.after) or '(nothing)'}   [{answer.verdicts[1]}]",
        ]
    if headline.model is not None:
        lines += ["", "Load it", *(f"  {line}" for line in loading_lines(headline.model))]
    return "\n".join(lines)


def headline_html(headline: Headline) -> str:
    """The headline for the page; empty where nothing is known."""
    parts = []
    for change in headline.changes:
        tone = {"better": "good", "worse": "bad"}.get(change.verdict, "")
        parts.append(
            f'<li><span class="verdict {tone}">{escape(change.verdict)}</span> <b>{escape(change.task)}</b>: '
            f"{escape(str(change).partition('. ')[2])}</li>"
        )
    body = f'<ul class="headline">{"".join(parts)}</ul>' if parts else ""
    for answer in headline.answers:
        rows = (
            ("question", answer.question, ""),
            ("answer", answer.right, ""),
            ("before", answer.before, answer.verdicts[0]),
            ("after", answer.after, answer.verdicts[1]),
        )
        items = "".join(
            f"<dt>{name}</dt><dd>{escape(text) or '(nothing)'} <small>{escape(verdict)}</small></dd>"
            for name, text, verdict in rows
        )
        body += f'<dl class="sample">{items}</dl>'
    if headline.model is not None:
        body += f"<pre>{escape(chr(10).join(loading_lines(headline.model)))}</pre>"
    return body


def loading_lines(folder: Path) -> list[str]:
    """How plain transformers, or PEFT, loads an exported folder."""
    if not (folder / "config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        return ["from difftune import load_model", f'model = load_model("{folder}")  # an adapter of {base}']
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    trust = ", trust_remote_code=True" if "auto_map" in config else ""
    return [
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})',
    ]


def paired_change(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """95% interval of the change of a ratio of sums over the same items.

    The ratio is ``sum(value) / sum(weight)``: an accuracy with weights of 1, nats a token with the tokens as weights.
    The variance of the difference is that of the ratio estimator, over the items::

        change = sum(after - before) / sum(weight)
        se^2   = n / (n - 1) * sum((after_i - before_i - change * weight_i)^2) / sum(weight)^2

    Args:
        before: Sum of each item, before.
        after: Sum of each item, after.
        weights: Weight of each item, above 0.

    Returns:
        Low and high end; infinite for fewer than two items.

    Source:
        Cochran, "Sampling Techniques", 3rd edition (1977), section 6.4.

    Example:
        >>> low, high = paired_change([0, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1])
        >>> round(low, 2), round(high, 2)
        (-0.07, 1.07)
    """
    n, total = len(weights), sum(weights)
    if n < 2:
        return -math.inf, math.inf
    differences = [b - a for a, b in zip(before, after, strict=True)]
    change = sum(differences) / total
    squares = sum((d - change * w) ** 2 for d, w in zip(differences, weights, strict=True))
    half = _Z95 * math.sqrt(n / (n - 1) * squares) / total
    return change - half, change + half


def _changes(run: Run, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[Change]:
    """One for each task with a figure at step 0 and a later one."""
    found = []
    tasks = dict.fromkeys(
        match[1] for name in run.series if (match := re.fullmatch(r"eval/(.+)/[^/]+", name)) is not None
    )
    for task in tasks:
        figure = next((name for name in _FIGURES if f"eval/{task}/{name}" in run.series), None)
        points = [] if figure is None else [p for p in run.series[f"eval/{task}/{figure}"] if p.value is not None]
        if figure is None or len(points) < 2 or points[0].step != 0 or points[-1].step == 0:
            continue
        first, last = points[0].value, points[-1].value
        assert first is not None and last is not None
        pairs = _pairs(before, after, task)
        interval = paired_change(*zip(*pairs, strict=True)) if len(pairs) > 1 else None
        found.append(Change(task, figure, first, last, interval, len(pairs)))
    return found


def _pairs(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], task: str
) -> list[tuple[float, float, float]]:
    """Value before, value after and weight of each item of a task that both evaluations have."""
    old, new = (
        {s["index"]: s for s in samples if s.get("task") == task and "index" in s} for samples in (before, after)
    )
    pairs = []
    for index in old.keys() & new.keys():
        values = [_value(sample) for sample in (old[index], new[index])]
        if values[0] is not None and values[1] is not None:
            pairs.append((values[0][0], values[1][0], values[1][1]))
    return pairs


def _value(sample: dict[str, Any]) -> tuple[float, float] | None:
    """Sum and weight of an item: right or wrong, the share that was found, or the NLL of its tokens."""
    if "verdict" in sample:
        return float(sample["verdict"] == "correct"), 1.0
    if "found" in sample:
        return fmean(sample["found"]), 1.0
    if sample.get("sums"):
        return float(sum(sample["sums"])), float(sample["num_tokens"])
    return None


def _answers(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[Answer]:
    """A few problems with both answers: first those that became right, then those that became wrong, then the rest."""
    fields = ("question", "text", "gold", "verdict")
    old = {(s.get("task"), s.get("index")): s for s in before if all(name in s for name in fields)}
    both = [
        Answer(s["question"], str(s["gold"]), old[key]["text"], s["text"], (old[key]["verdict"], s["verdict"]))
        for s in after
        if all(name in s for name in fields) and (key := (s.get("task"), s.get("index"))) in old
    ]
    gained = [one for one in both if one.verdicts[0] != "correct" and one.verdicts[1] == "correct"]
    lost = [one for one in both if one.verdicts[0] == "correct" and one.verdicts[1] != "correct"]
    rest = [one for one in both if one not in gained and one not in lost]
    # One that became wrong is shown where there is one: a choice of the best alone would flatter.
    chosen = [*gained[: _ANSWERS - min(1, len(lost))], *lost, *gained[_ANSWERS - min(1, len(lost)) :], *rest]
    return chosen[:_ANSWERS]


def _one_line(text: str) -> str:
    """A text on one line, cut in its middle where it is long: the beginning and the final answer are what one reads."""
    text = " ".join(text.split())
    if len(text) <= _WIDTH:
        return text
    return f"{text[: _WIDTH // 2]} ... {text[-_WIDTH // 2 :]}"
