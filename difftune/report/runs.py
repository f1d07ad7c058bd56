"""A run as its folder tells it: config, metrics, samples. Everything that is shown of a run comes through here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftune.report.summary import read_json_lines, read_metrics
from difftune.small_files import read_json_mapping, read_yaml_mapping

KIND_NAMES = {
    "diff_v1": "Differential, V1",
    "diff_v2": "Differential, V2",
    "softmax": "Softmax, the baseline",
    "": "unknown attention",
}
"""Kinds of attention, as they are shown."""

_NOT_THE_RECIPE = ("seed", "run_dir", "resume", "logging")


@dataclass(frozen=True)
class Point:
    """One logged number."""

    step: int
    """Optimiser steps since the beginning of the run, over all stages."""
    tokens: int
    """Training positions so far, as logged."""
    value: float | None
    """None where it was not finite."""
    stage: str
    """The stage that logged it."""


@dataclass
class Run:
    """One run folder, or a folder of results that `difftune evaluate --out` wrote."""

    path: Path
    """Where it is."""
    config: dict[str, Any]
    """The resolved recipe; empty for a folder of results."""
    environment: dict[str, Any]
    """Versions and hardware; empty where unknown."""
    settings: dict[str, Any]
    """What a folder of results was measured with; empty for a run."""
    series: dict[str, list[Point]] = field(default_factory=dict)
    """Logged numbers by name, in the order of the steps."""
    stages: list[str] = field(default_factory=list)
    """Names of the stages, in the order in which they logged something."""
    stage_starts: dict[str, int] = field(default_factory=dict)
    """Optimiser steps of the run before each of its stages."""
    others: list[Path] = field(default_factory=list)
    """More folders of results of the same model; see :func:`load_runs`."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def kind(self) -> str:
        """Kind of attention: `diff_v1`, `diff_v2`, `softmax`, or "" where the folder does not tell."""
        named = self.config.get("model", {}).get("attention")
        if named:
            return str(named)
        candidates = [self.path / "export", *sorted(self.path.glob("checkpoints/*/*"))]
        if self.settings.get("model"):
            candidates.append(Path(str(self.settings["model"])))
        for folder in candidates:
            file = folder / "config.json"
            if file.is_file():
                config = json.loads(file.read_text(encoding="utf-8"))
                return str(config.get("attention", "diff_v1" if config.get("model_type") == "diffllama" else ""))
        fresh = bool(self.config) and self.config["model"].get("path") is None
        return "diff_v1" if fresh else ""

    @property
    def seed(self) -> int | None:
        """Of the data order and the fresh model."""
        return self.config.get("seed")

    def recipe(self) -> dict[str, Any]:
        """The config without what differs between runs of the same recipe: seed and place. Keys have dots."""
        config = {key: value for key, value in self.config.items() if key not in _NOT_THE_RECIPE}
        stages = config.get("stages")
        if isinstance(stages, list):
            config["stages"] = [{key: value for key, value in stage.items() if key != "seed"} for stage in stages]
        if not config:
            config = {"model": self.settings.get("model", str(self.path)), "tasks": self.settings.get("tasks", {})}
        return flatten(config)

    def last(self, name: str) -> float | None:
        """The last value of a metric; None where there is none."""
        points = self.series.get(name)
        return points[-1].value if points else None

    def sample_files(self) -> list[Path]:
        """Files of samples: of a run, one an evaluation in the order of the training; of results, one a task."""
        files = [file for folder in (self.path, *self.others) for file in sorted((folder / "samples").glob("*.jsonl"))]
        order = {stage: place for place, stage in enumerate(self.stages)}

        def when(file: Path) -> tuple[int, int]:
            stage, _, step = file.stem.rpartition("-")
            return order.get(stage, -1), int(step) if step.isdigit() else -1

        return sorted(files, key=when) if self.config else files

    def samples(self) -> list[dict[str, Any]]:
        """What was generated and how it was graded: of a run, at the last evaluation."""
        files = self.sample_files()
        found = []
        for file in files[-1:] if self.config else files:
            found += [{"task": file.stem, **sample} for sample in read_json_lines(file)]
        return found


_METRIC: dict[str, Any] = {"step": int, "tokens": int, "name": str, "stage": str, "value": (int, float, type(None))}
"""What a line of metrics must hold."""


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run folders; folders of results of one model that measured different tasks are one run.

    Args:
        paths: The folders.

    Raises:
        ValueError: If one is neither a run nor a folder of results, or is named twice.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError(f"a run is named twice: it would count as two seeds ({', '.join(map(str, paths))})")
    runs: list[Run] = []
    for run in map(load_run, paths):
        same = next((known for known in runs if _measured_together(known, run)), None)
        if same is None:
            runs.append(run)
            continue
        same.series.update(run.series)
        same.settings = {**same.settings, "tasks": {**same.settings["tasks"], **run.settings["tasks"]}}
        same.others.append(run.path)
    return runs


def _measured_together(known: Run, run: Run) -> bool:
    """Whether both are results of one model with the same settings, and no figure stands in both."""
    if known.config or run.config or not known.settings or known.series.keys() & run.series.keys():
        return False
    return all(known.settings.get(key) == run.settings.get(key) for key in {*known.settings, *run.settings} - {"tasks"})


def load_run(path: str | Path) -> Run:
    """Read a run folder, or a folder of results.

    Args:
        path: The folder; its run may still be going on.

    Raises:
        ValueError: If it is neither.
    """
    path = Path(path)
    metrics = read_metrics(path)
    for number, line in enumerate(metrics, 1):
        wrong = [key for key, kinds in _METRIC.items() if not isinstance(line.get(key, ...), kinds)]
        if wrong:
            raise ValueError(
                f"{path / 'metrics.jsonl'}, line {number}: no metric, {', '.join(wrong)} missing or of another type: "
                "take the line out, or name another folder"
            )
    run = Run(path, _yaml(path / "config.yaml"), _json(path / "environment.json"), _json(path / "settings.json"))
    if not metrics or not (run.config or run.settings):
        lacking = "no metrics.jsonl" if path.is_dir() else "no such folder"
        if metrics:
            lacking = "neither config.yaml nor settings.json"
        raise ValueError(
            f"{path} is not a run ({lacking}): name the run_dir of a difftune fit, or the --out of a difftune evaluate"
        )
    offset, stage, reached = 0, metrics[0]["stage"], 0
    for line in metrics:
        if line["stage"] != stage:
            offset, stage, reached = offset + reached, line["stage"], 0
        if stage not in run.stages:
            run.stages.append(stage)
            run.stage_starts[stage] = offset
        reached = max(reached, line["step"])
        point = Point(offset + line["step"], line["tokens"], line["value"], stage)
        run.series.setdefault(line["name"], []).append(point)
    return run


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by dotted path.

    Example:
        >>> flatten({"a": {"b": 1}, "c": [2, {"d": 3}]})
        {'a.b': 1, 'c.0': 2, 'c.1.d': 3}
    """
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    return {
        key: leaf
        for name, inner in items
        for key, leaf in flatten(inner, f"{path}.{name}" if path else str(name)).items()
    }


def differing_keys(runs: list[Run]) -> dict[str, list[Any]]:
    """Recipe keys in which runs differ, with the value of each run; seed and folder are not among them."""
    recipes = [run.recipe() for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _yaml(path: Path) -> dict[str, Any]:
    return read_yaml_mapping(path) if path.is_file() and path.stat().st_size else {}


def _json(path: Path) -> dict[str, Any]:
    return read_json_mapping(path) if path.is_file() else {}
