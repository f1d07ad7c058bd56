"""The folder that `difftune evaluate --out` writes, while it measures, and goes on from.

::

    settings.json      the model and the tasks: what the results are of
    samples/TASK.jsonl a line a sample, written block by block
    results.json       the figures of each task, partial ones too (`complete` says so)
    metrics.jsonl      the figures as a run logs them: step, tokens, name, value, stage, time
    figures/           pictures, where a task draws some
"""

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from difftune.evaluation.task import Task
from difftune.small_files import read_json_mapping, read_whole_lines
from difftune.writing import one_writer, write_whole


class ResultFolder:
    """What was measured, on disk.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def writing(self, *, is_first: bool) -> AbstractContextManager[None]:
        """Hold the folder as its one writer, if this is the first process.

        Raises:
            ValueError: If another process writes there, or if it holds files and no results.
        """
        if not is_first:
            return nullcontext()
        return one_writer(self.path, name="--out", what="results", is_ours=self.is_results)

    def is_results(self) -> bool:
        """Whether the folder holds results, which may be damaged."""
        try:
            return "tasks" in read_json_mapping(self.path / "settings.json")
        except FileNotFoundError:
            return False
        except ValueError:
            return (self.path / "samples").is_dir()

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folder, or find that it holds results of the same settings, which then go on.

        Args:
            settings: The model and, under `tasks`, the settings of each task by name. Tasks can be added later; those
                that are there must not change.

        Raises:
            ValueError: If it holds results of another model or of other settings.
        """
        file = self.path / "settings.json"
        if file.is_file():
            old = read_json_mapping(file)
            wanted = json.loads(json.dumps(settings))
            changed = [key for key in {*old, *wanted} - {"tasks"} if old.get(key) != wanted.get(key)]
            both = old["tasks"].keys() & wanted["tasks"].keys()
            changed += [f"task {name}" for name in sorted(both) if old["tasks"][name] != wanted["tasks"][name]]
            if changed:
                raise ValueError(
                    f"{self.path} holds results with another {' and '.join(changed)}: they cannot be gone on with; "
                    "choose another --out, or delete that folder"
                )
            settings = {**wanted, "tasks": {**old["tasks"], **wanted["tasks"]}}
        self._write("settings.json", json.dumps(settings, indent=2) + "\n")

    def samples(self, task: Task[Any]) -> list[Any]:
        """The samples of a task that were written before; a last line that was cut off is taken out."""
        file = self._samples_file(task.name)
        if not file.is_file():
            return []
        whole = read_whole_lines(file)
        if file.read_bytes().count(b"\n") > len(whole) or not file.read_bytes().endswith(b"\n"):
            self._write(f"samples/{task.name}.jsonl", "".join(json.dumps(line) + "\n" for line in whole))
        return [task.sample_type(**line) for line in whole]

    def append(self, name: str, samples: Sequence[Any]) -> None:
        """Add samples of a task, and have them on disk when this returns."""
        file = self._samples_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self, name: str, samples: Sequence[Any]) -> None:
        """Write the samples of a complete task anew, in the order of its items."""
        self._write(f"samples/{name}.jsonl", "".join(json.dumps(asdict(sample)) + "\n" for sample in samples))

    def results(self) -> dict[str, Any]:
        """The figures by task name that were written before."""
        file = self.path / "results.json"
        return read_json_mapping(file)["tasks"] if file.is_file() else {}

    def write(self, model: str, results: dict[str, dict[str, Any]], metrics: dict[str, float], step: int) -> None:
        """Write results and metrics.

        Args:
            model: What was evaluated.
            results: Figures by task name; those of tasks that are not among them stay.
            metrics: Value by name, `eval/TASK/FIGURE`.
            step: Optimiser steps of the model, 0 where that is not known.
        """
        merged = {**self.results(), **results}
        self._write("results.json", json.dumps({"model": model, "tasks": merged}, indent=2) + "\n")
        file = self.path / "metrics.jsonl"
        old = read_whole_lines(file)
        shared = {"stage": "evaluate", "time": round(time.time(), 3)}
        new = [
            {
                "step": step,
                "tokens": 0,
                "name": name,
                "value": value if math.isfinite(value) else None,
                **shared,
            }
            for name, value in metrics.items()
        ]
        kept = [line for line in old if line.get("name") not in metrics]
        self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in [*kept, *new]))

    def _samples_file(self, name: str) -> Path:
        return self.path / "samples" / f"{name}.jsonl"

    def _write(self, name: str, text: str) -> None:
        """Write a file in one go: an interruption leaves the old one."""
        write_whole(self.path / name, text)
