"""The folder that `difftune evaluate --out` writes, while it measures, and resumes from.

::

    settings.json      what the results are of: hashes of the model, its tokenizer, and what each task asks
    samples/TASK.jsonl a line a sample, written block by block
    results.json       the figures of each task, partial ones too (`complete` says so)
    metrics.jsonl      the figures as a run logs them: step, tokens, name, value, stage, time
    figures/           pictures, where a task draws some
"""

import json
import logging
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

log = logging.getLogger(__name__)


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
        """Whether the folder holds results, one of whose files may be damaged."""
        for name in ("settings.json", "results.json"):
            try:
                if "tasks" in read_json_mapping(self.path / name):
                    return True
            except FileNotFoundError:
                continue
            except ValueError:
                if (self.path / "samples").is_dir():
                    return True
        return False

    def open(self, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        """Make the folder, or find that it holds results of the same inputs, to which the missing ones are added.

        Args:
            settings: What a figure depends on, by name, and under `tasks` the same of each task. `model` is where the
                model lies, and not compared. Tasks can be added later; those that are there must not change.
            overwrite: Remove the results of these tasks, and those of all tasks if anything else has changed.

        Raises:
            ValueError: If it holds results of something else, and may not be overwritten; says what has changed.
        """
        wanted = json.loads(json.dumps(settings))
        old, kept = self._settings(), {}
        if old is not None:
            shared, tasks = _changes(old, wanted)
            if overwrite:
                kept = {} if shared else {n: t for n, t in old["tasks"].items() if n not in wanted["tasks"]}
                self._remove([name for name in old["tasks"] if name not in kept])
            elif shared or tasks:
                raise ValueError(
                    f"{self.path} holds results of something else: changed since then: {'; '.join(shared + tasks)}. "
                    "Choose another --out, or measure anew with --overwrite"
                )
            else:
                kept = old["tasks"]
        elif self.results() or any(self.path.glob("samples/*.jsonl")):
            if not overwrite:
                raise ValueError(
                    f"{self.path} holds results, and no readable settings.json says what they are of: choose another "
                    "--out, or measure anew with --overwrite"
                )
            self._remove([*self.results(), *(file.stem for file in self.path.glob("samples/*.jsonl"))])
        self._write("settings.json", json.dumps({**wanted, "tasks": {**kept, **wanted["tasks"]}}, indent=2) + "\n")

    def _settings(self) -> dict[str, Any] | None:
        """What the results are of; None if nothing says so."""
        try:
            found = json.loads((self.path / "settings.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("tasks"), dict) else None

    def _remove(self, names: Sequence[str]) -> None:
        """Take the results of tasks out, the mean over all of them with them."""
        for name in names:
            for file in (self._samples_file(name), self.path / "figures" / f"{name}.png"):
                file.unlink(missing_ok=True)
        left = {name: figures for name, figures in self.results().items() if name not in names}
        if (file := self.path / "results.json").is_file():
            content = read_json_mapping(file)
            self._write("results.json", json.dumps({**content, "tasks": left}, indent=2) + "\n")
        if (file := self.path / "metrics.jsonl").is_file():
            gone = tuple(f"eval/{name}/" for name in (*names, "mean"))
            lines = read_whole_lines(file)
            stay = [json.dumps(line) + "\n" for line in lines if not str(line.get("name")).startswith(gone)]
            self._write("metrics.jsonl", "".join(stay))

    def samples(self, task: Task[Any]) -> list[Any]:
        """The samples of a task that were written before; lines that were cut off are taken out, and measured again."""
        file = self._samples_file(task.name)
        if not file.is_file():
            return []
        lines = file.read_bytes().split(b"\n")
        whole, samples = [], []
        for line in lines[:-1]:
            try:
                samples.append(task.sample_type(**json.loads(line)))
            except (ValueError, TypeError):
                continue
            whole.append(line)
        if len(whole) < len(lines) - 1 or lines[-1]:
            log.warning("%s: %d damaged lines are measured again", file, len(lines) - len(whole) - (not lines[-1]))
            self._write(f"samples/{task.name}.jsonl", b"".join(line + b"\n" for line in whole).decode())
        return samples

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
        return read_json_mapping(file).get("tasks", {}) if file.is_file() else {}

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


def _changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two settings: of all tasks, and of single ones."""
    apart = {"model", "tasks"}
    shared = sorted(key for key in {*old, *new} - apart if old.get(key) != new.get(key))
    tasks = []
    for name in sorted(old["tasks"].keys() & new["tasks"].keys()):
        before, now = old["tasks"][name], new["tasks"][name]
        keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if keys:
            tasks.append(f"{', '.join(keys)} of task {name}")
    return shared, tasks
