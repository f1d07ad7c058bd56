"""The folder of a run: the interface between what trains and everything that looks at a run later.

::

    config.yaml        the recipe, resolved: `difftune fit --config RUN/config.yaml` is the same run
    environment.json   versions, hardware, git commit of the last start
    metrics.jsonl      one object a line: step, tokens, name, value, stage, time
    tokenizer/         so that every checkpoint below can be evaluated
    checkpoints/STAGE/ step-*, best, and done.json once the stage has ended
    samples/           what was generated and how it was graded, STAGE-STEP.jsonl
    cache/             tokenised data, keyed by content
    export/            the finished model; export.json lists its files
"""

import hashlib
import json
import logging
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from difftune.environment import describe_environment
from difftune.small_files import read_json_mapping, read_yaml_mapping
from difftune.training.checkpoint_io import MANIFEST, find_damage, find_resumable, step_of
from difftune.writing import one_writer, write_whole

log = logging.getLogger(__name__)

_EXPORTED = "export.json"
_BEGINNING = 2**20
_SAME_RUN = ("model", "tokenizer", "adapter")
_PREPARED = ("cache", "data_check.json", "data_check.png")
"""What `prepare` writes before there is a run."""


class RunFolder:
    """Reads and writes what belongs to a run as a whole.

    Args:
        path: The folder; made by `open`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def writing(self, *, is_first: bool) -> AbstractContextManager[None]:
        """Hold the folder as its one writer: all processes of a run are one, for which the first stands.

        Raises:
            ValueError: If another process writes there, or if it holds files and no run.
        """
        if not is_first:
            return nullcontext()
        return one_writer(self.path, name="run_dir", what="run", is_ours=self.is_run, parts=_PREPARED)

    def is_run(self) -> bool:
        """Whether the folder holds a run."""
        if any((self.path / "checkpoints").glob(f"*/step-*/{MANIFEST}")):
            return True
        try:
            return "difftune" in read_json_mapping(self.path / "environment.json")["packages"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def open(self, config_yaml: str, *, may_go_on: bool) -> None:
        """Write the config and the environment.

        Args:
            config_yaml: The resolved recipe.
            may_go_on: Whether the folder may hold a run already.

        Raises:
            ValueError: If it holds one and may not, or if that one trains another model.
        """
        old = self.path / "config.yaml"
        if any((self.path / "checkpoints").glob("*/step-*")):
            if not may_go_on:
                raise ValueError(
                    f"{self.path} holds a run already, and resume is never: choose another run_dir, or resume=auto"
                )
            if old.is_file():
                _check_same_run(read_yaml_mapping(old), yaml.safe_load(config_yaml), self.path)
        # First: it says of a folder that it is a run's.
        write_json(self.path / "environment.json", describe_environment())
        write_whole(old, config_yaml)

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def check_resume(self, resume: str) -> None:
        """Raise unless ``resume`` is a word that is known, or a checkpoint of this run.

        Raises:
            ValueError: If it is neither.
        """
        if resume in ("auto", "never"):
            return
        named, checkpoints = Path(resume).expanduser(), self.path / "checkpoints"
        try:
            is_there = named.is_dir() and named.resolve().parent.parent == checkpoints.resolve()
        except (OSError, RuntimeError):  # links that lead to one another
            is_there = False
        if not is_there:
            found = sorted(path.as_posix() for path in checkpoints.glob("*/step-*"))
            example = f", such as {found[-1]}" if found else ", of which there is none yet"
            raise ValueError(
                f"resume must be auto, never, or a checkpoint of this run ({checkpoints}/STAGE/step-*{example}), "
                f"got {resume!r}"
            )

    def resume_point(self, stage: str, resume: str) -> Path | None:
        """The checkpoint that a stage goes on from, or None to begin.

        Args:
            stage: Name of the stage.
            resume: A checkpoint, which counts for the stage that it lies in; else the newest whole one is taken.

        Raises:
            ValueError: If the checkpoint that was named is damaged, or if all of the stage's are.
        """
        named = Path(resume)
        if named.parent.resolve() != self.checkpoints(stage).resolve():
            return find_resumable(self.checkpoints(stage))
        damage = find_damage(named)
        if damage:
            raise ValueError(f"resume={named}: {damage}; resume=auto finds the newest whole checkpoint")
        return named

    def last_checkpoint(self, stage: str) -> Path:
        """The newest whole checkpoint of a stage that has ended.

        Raises:
            ValueError: If there is none.
        """
        last = find_resumable(self.checkpoints(stage))
        if last is None:
            raise ValueError(f"{self.checkpoints(stage)} has no checkpoint, although stage {stage} has ended")
        return last

    def finished_checkpoint(self, stage: str) -> Path:
        """What a stage came to: its best checkpoint where one was chosen, else its last."""
        best = self.checkpoints(stage) / "best"
        return best if best.is_dir() else self.last_checkpoint(stage)

    def clear_export(self) -> None:
        """Make `export/` free to be replaced: where it holds anything but what was exported, it is set aside."""
        export = self.path / "export"
        if not export.is_dir():
            return
        try:
            listed = read_json_mapping(self.path / _EXPORTED)
        except (FileNotFoundError, ValueError):
            listed = {}
        changed = sorted(name for name, entry in _listing(export).items() if listed.get(name) != entry)
        if changed:
            number = next(n for n in count(1) if not (self.path / f"export-kept-{n}").exists())
            kept = export.rename(self.path / f"export-kept-{number}")
            log.warning("export/ holds files that were not exported, such as %s: all of it is now %s", changed[0], kept)

    def list_export(self) -> None:
        """Note what was exported."""
        write_json(self.path / _EXPORTED, _listing(self.path / "export"))

    def mark_ended(self, stage: str, step: int, end: dict[str, Any]) -> None:
        """Note that a stage ran to its end.

        Args:
            stage: Name of the stage.
            step: Optimiser steps done.
            end: The limits that it was given.
        """
        write_json(self.checkpoints(stage) / "done.json", {"step": step, "end": end})

    def has_ended(self, stage: str, end: dict[str, Any]) -> bool:
        """Whether a stage ran to the end that it is given now; with a later one it goes on."""
        done = self.checkpoints(stage) / "done.json"
        return done.is_file() and read_json_mapping(done).get("end") == end

    def has_its_end(self, stage: str) -> bool:
        """Whether the newest whole checkpoint of a stage that has ended is that of its end, and not an older one.

        Raises:
            ValueError: If none of its checkpoints is whole.
        """
        step = read_json_mapping(self.checkpoints(stage) / "done.json").get("step")
        return step_of(self.last_checkpoint(stage)) == step


def _listing(folder: Path) -> dict[str, list[Any]]:
    """Size, and hash of the first MiB, of every file."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_BEGINNING)).hexdigest()
        found[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and its folder."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def _check_same_run(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    for key in _SAME_RUN:
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{path} holds a run with {key}={old.get(key)}, this one has {key}={new.get(key)}: "
                "checkpoints of the one cannot go on as the other; choose another run_dir"
            )
