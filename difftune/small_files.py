"""The small files of a run, read with a message where they are damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file of ours holds.

    Raises:
        ValueError: If it is damaged, or holds no mapping.
        FileNotFoundError: If it is not there.
    """
    return _read(path, yaml.safe_load)


def read_json_mapping(path: Path) -> dict[str, Any]:
    """What a JSON file of ours holds.

    Raises:
        ValueError: If it is damaged, or holds no object.
        FileNotFoundError: If it is not there.
    """
    return _read(path, json.loads)


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file of ours; none if it is not there.

    A line that is torn, as a power cut or a full disk leaves it, is left out: it is written again when its work is done
    again.
    """
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _read(path: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): name another folder, or put a copy in its place") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ValueError(f"{path} must hold a mapping, got {found}: name another folder, or put a copy in its place")
    return content
