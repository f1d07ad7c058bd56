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
