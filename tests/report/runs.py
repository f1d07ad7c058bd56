"""Run folders as training and evaluation write them, with planted numbers."""

import json
from pathlib import Path
from typing import Any

import yaml


def write_run(
    path: Path, metrics: dict[str, list[tuple[int, float]]], *, seed: int = 0, stage: str = "main", **config: Any
) -> Path:
    """A run folder; `metrics` are values by step."""
    path.mkdir(parents=True)
    recipe = {
        "seed": seed,
        "run_dir": str(path),
        "resume": "auto",
        "model": {"path": None, "attention": "diff_v1"},
        "optim": {"lr": 0.001},
        "stages": [{"name": stage, "seed": seed}],
        **config,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(recipe))
    (path / "environment.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}, "cpu_count": 2}))
    write_metrics(path, metrics, stage)
    return path


def write_metrics(path: Path, metrics: dict[str, list[tuple[int, float | None]]], stage: str = "main") -> None:
    """Append metrics of a stage."""
    lines = [
        {"step": step, "tokens": 100 * step, "name": name, "value": value, "stage": stage, "time": 1.0 * step}
        for name, values in metrics.items()
        for step, value in values
    ]
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"]))
