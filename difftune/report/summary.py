"""Accuracies of a run as a table, before training and after each stage, and how long the training took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

_TORN = "take the line out, or name another folder"


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, each with step, tokens, name, value, stage and time.

    A last line without its end, in a run that is being written, is left for the next look.

    Raises:
        ValueError: If a line holds no JSON object; it names file and line.
    """
    path = Path(run_dir) / "metrics.jsonl"
    return read_json_lines(path) if path.is_file() else []


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line without its end, in a file that is being written, is left out.

    Raises:
        ValueError: If a line holds no JSON object; it names file and line.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}): {_TORN}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object, but {str(entry)[:40]!r}: {_TORN}")
        found.append(entry)
    return found


def accuracies(run_dir: str | Path) -> list[dict[str, Any]]:
    """The first evaluation of the first stage and the last one of each stage, by task.

    Returns:
        Dicts with ``when``, ``task``, ``step`` and what was logged of the task, such as ``accuracy``,
        ``accuracy_low``, ``accuracy_high``, ``n``.
    """
    evaluations: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in read_metrics(run_dir):
        if line["name"].startswith("eval/"):
            task, figure = line["name"].removeprefix("eval/").rsplit("/", 1)
            evaluations.setdefault((line["stage"], task, line["step"]), {})[figure] = line["value"]
    stages = list(dict.fromkeys(stage for stage, _, _ in evaluations))
    rows = []
    for stage in stages:
        for task in dict.fromkeys(name for of_stage, name, _ in evaluations if of_stage == stage):
            steps = sorted(step for of_stage, name, step in evaluations if (of_stage, name) == (stage, task))
            chosen = [("before training", steps[0])] if stage == stages[0] and steps[0] == 0 else []
            if steps[-1] > 0:
                chosen.append((f"after {stage}", steps[-1]))
            for when, step in chosen:
                rows.append({"when": when, "task": task, "step": step, **evaluations[stage, task, step]})
    return rows


def training_minutes(run_dir: str | Path) -> dict[str, float]:
    """Minutes of training by stage, without evaluation and saving: step times as logged, summed over the steps."""
    minutes: dict[str, float] = {}
    last: dict[str, int] = {}
    for line in read_metrics(run_dir):
        if line["name"] == "perf/step_time_s":
            stage, step = line["stage"], line["step"]
            minutes[stage] = minutes.get(stage, 0.0) + line["value"] * (step - last.get(stage, 0)) / 60
            last[stage] = step
    return minutes


def accuracy_table(run_dir: str | Path) -> Table | None:
    """The table that ends a run; None where nothing was evaluated."""
    rows = accuracies(run_dir)
    if not rows:
        return None
    minutes = training_minutes(run_dir)
    times = ", ".join(f"{stage} {value:.1f}" for stage, value in minutes.items())
    table = Table(
        title="accuracy on held-out problems",
        title_justify="left",
        caption=f"minutes of training: {sum(minutes.values()):.1f} ({times})" if minutes else None,
        caption_justify="left",
    )
    for column in ("", "task", "step", "accuracy", "95% interval", "n"):
        table.add_column(column, justify="left" if column in ("", "task") else "right")
    for row in rows:
        table.add_row(row["when"], row["task"], str(row["step"]), *_figures(row))
    return table


def _figures(row: dict[str, Any]) -> tuple[str, str, str]:
    """Accuracy (or NLL), interval and count as text, as far as the task has them."""
    accuracy, nll, n = row.get("accuracy"), row.get("nll"), row.get("n")
    figure = f"{accuracy:.3f}" if accuracy is not None else f"{nll:.4f} nats" if nll is not None else ""
    low, high = row.get("accuracy_low"), row.get("accuracy_high")
    interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
    return figure, interval, "" if n is None else f"{n:.0f}"
