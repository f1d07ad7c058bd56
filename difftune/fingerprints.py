"""Hashes of what a result or a run is made of, so that something else in its place is seen."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def files_hash(folder: str | Path, files: Iterable[Path]) -> str:
    """A hash of files and their places below a folder, wherever that lies; large ones are read side by side."""
    folder, paths = Path(folder), sorted(files)
    with ThreadPoolExecutor(4) as threads:
        hashes = list(threads.map(file_hash, paths))
    return value_hash([[str(path.relative_to(folder)), one] for path, one in zip(paths, hashes, strict=True)])


def path_hash(path: str | Path) -> str:
    """A hash of the content of a file, or of all files of a folder but hidden ones."""
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    shown = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
    return files_hash(path, [file for file in shown if file.is_file()])


def value_hash(value: Any) -> str:
    """A hash of a value made of numbers, text, containers and dataclasses; of other objects their type alone counts."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_plain(item), sort_keys=True) for item in value)
    if type(value).__name__ == "SimpleNamespace":
        return _plain(vars(value))
    return type(value).__qualname__
