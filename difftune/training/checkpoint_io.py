"""Checkpoints on disk: written whole or not at all, and checked before they are read.

A checkpoint is a folder::

    step-00000200/
      checkpoint.pt         what torch.save wrote: weights (names start with "model."), optimiser, loops, position in
                            the data, random state
      config.json           the architecture, if the model has one: with it the weights load without the run
      generation_config.json   what ends its texts, and its defaults of sampling
      adapter_config.json   instead of them, if an adapter is trained: the weights are the adapter's alone
      shards/               if the model was sharded: weights and optimiser, a file a rank, and not in checkpoint.pt
      manifest.json         {"step": 200, "files": {"checkpoint.pt": {"bytes": ..., "sha256": ...}, ...}}

It is written under a hidden name beside its place, flushed to the disk, and renamed last. What has its final
name is therefore complete, whatever happened to the process; what the disk did to it later, the manifest
shows.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO

from difftune.shard_files import METADATA, SHARDS, ShardedTensors, is_sharded
from difftune.training.optimizer_state import is_optimizer_tensor, join_tensors
from difftune.writing import sync_folder

log = logging.getLogger(__name__)

WEIGHTS = "checkpoint.pt"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"


class AtomicCheckpointIO(CheckpointIO):
    """Saves, verifies and loads checkpoint folders; what Lightning calls for all its checkpoints.

    Everything in a checkpoint has to be plain (tensors, numbers, text, containers): it is loaded with
    ``weights_only=True``, so that a checkpoint from elsewhere cannot run code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to the folder ``path``, replacing one that is there.

        Args:
            checkpoint: What Lightning collected.
            path: The folder.
            storage_options: Must be None.

        Raises:
            OSError: If it cannot be written, a full disk for one; nothing is left behind and an old
                checkpoint at ``path`` is untouched.
        """
        assert storage_options is None, "no storage options exist"
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_of(path)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            commit(temporary, path, checkpoint["global_step"], write_files(checkpoint, temporary))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and load a checkpoint.

        Args:
            path: The folder.
            map_location: As in ``torch.load``. None: the CPU.
            weights_only: As in ``torch.load``. None: True.

        Returns:
            What was saved.

        Raises:
            ValueError: If ``path`` is no checkpoint, or damaged.
        """
        path = Path(path)
        reason = find_damage(path)
        if reason is not None:
            raise ValueError(
                f"{path} cannot be resumed from: {reason}; choose another, or resume=auto for the newest whole one"
            )
        checkpoint = torch.load(
            path / WEIGHTS,
            map_location="cpu" if map_location is None else map_location,
            weights_only=weights_only is not False,
        )
        if is_sharded(path):
            stored = ShardedTensors(path)
            tensors = stored.read(stored)
            weights = {name: tensor for name, tensor in tensors.items() if not is_optimizer_tensor(name)}
            checkpoint["state_dict"] = with_aliases(weights, checkpoint)
            checkpoint["optimizer_states"] = join_tensors(tensors, checkpoint["optimizer_states"])
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint; half removed, it already has no checkpoint's name."""
        path = Path(path)
        doomed = temporary_of(path)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        # What a busy file system keeps is removed by the next run.
        shutil.rmtree(doomed, ignore_errors=True)


def temporary_of(path: Path) -> Path:
    """The hidden folder in which a checkpoint is written."""
    return path.with_name(f"{_TEMPORARY}{path.name}")


def write_files(checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write what ``checkpoint`` holds, but for the manifest; return the manifest's entries."""
    files = {}
    written = (("model_config", CONFIG), ("generation_config", GENERATION_CONFIG), ("adapter_config", ADAPTER_CONFIG))
    for key, name in written:
        if key in checkpoint:
            content = (json.dumps(checkpoint[key], indent=2, sort_keys=True) + "\n").encode()
            files[name] = _write(folder / name, lambda file, content=content: file.write(content))
    files[WEIGHTS] = _write(folder / WEIGHTS, lambda file: torch.save(checkpoint, file))
    return files


def commit(temporary: Path, path: Path, step: int, files: dict[str, Any]) -> None:
    """Write the manifest of a folder whose files are all on the disk, and give it its name."""
    manifest = json.dumps({"step": step, "files": files}, indent=2) + "\n"
    _write(temporary / MANIFEST, lambda file: file.write(manifest.encode()))
    for folder in (temporary / SHARDS, temporary) if is_sharded(temporary) else (temporary,):
        sync_folder(folder)
    _replace_folder(temporary, path)


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints ``step-*`` of a folder, oldest step first, good or damaged."""
    directory = Path(directory)
    return sorted(p for p in directory.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())


def step_of(path: str | Path) -> int:
    """Optimiser steps done when a checkpoint was saved, from its manifest.

    Raises:
        ValueError: If there is no readable manifest.
    """
    return int(_read_manifest(Path(path))["step"])


def find_resumable(directory: str | Path) -> Path | None:
    """The newest checkpoint of a folder that is whole; each newer one that is not is named in a warning.

    Args:
        directory: Holds ``step-*`` folders; need not exist.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        ValueError: If there are checkpoints and every one is damaged: starting anew would hide that.
    """
    damaged: list[str] = []
    for path in reversed(list_checkpoints(directory)):
        reason = find_damage(path)
        if reason is None:
            if damaged:
                log.warning("falling back to checkpoint %s; not usable: %s", path, "; ".join(damaged))
            return path
        damaged.append(f"{path.name} ({reason})")
    if damaged:
        raise ValueError(f"{directory} has no usable checkpoint: {'; '.join(damaged)}; move it away to start anew")
    return None


def find_damage(path: str | Path, part: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint folder, by its manifest's sizes and hashes; None if it is whole.

    Args:
        path: The folder.
        part: Rank and number of ranks, where each rank looks into its share of the files.
    """
    path = Path(path)
    if not path.is_dir():
        return "it is not a checkpoint folder" if path.exists() else "it does not exist"
    try:
        files = _read_manifest(path)["files"]
        if WEIGHTS not in files:
            return f"its {MANIFEST} does not list {WEIGHTS}"
        if is_sharded(path) and f"{SHARDS}/{METADATA}" not in files:
            return f"its {MANIFEST} does not list {SHARDS}/{METADATA}"
        for name, expected in sorted(files.items())[part[0] :: part[1]]:
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _hash(path / name) != expected["sha256"]:
                return f"the content of {name} has changed since it was written"
    except ValueError as error:
        return str(error)
    return None


def with_aliases(weights: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Give tied weights, which a sharded checkpoint holds once, all of their names."""
    return weights | {alias: weights[name] for alias, name in checkpoint["aliases"].items() if name in weights}


def _hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError if it is missing or is not one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["step"], int):
            raise TypeError
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"its {MANIFEST} is not readable") from None
    return manifest


class HashingFile:
    """A file that hashes what is written to it, and remembers why writing failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write and hash."""
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """As of any file."""
        self.file.flush()

    def tell(self) -> int:
        """How much was written."""
        return self.size

    def fileno(self) -> int:
        """Asked for by whoever syncs: what is still in memory has to be in the file then."""
        self.file.flush()
        return self.file.fileno()

    def close(self) -> None:
        """Close the file; nothing that was written is lost."""
        self.file.close()

    def entry(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}


def _write(path: Path, write: Any) -> dict[str, Any]:
    """Call ``write(file)``, flush the file to the disk, and return its entry in the manifest."""
    with open(path, "wb") as raw:
        file = HashingFile(raw)
        try:
            write(file)
        except RuntimeError as error:
            # torch turns an error of write() into one of its own.
            raise (file.error or error) from None
        raw.flush()
        os.fsync(raw.fileno())
    return file.entry()


def _replace_folder(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; a folder there already is moved aside first and removed after."""
    old = None
    if path.exists():
        old = path.with_name(f"{_TEMPORARY}old-{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(new, path)
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
