"""References of a recipe to the environment (`${oc.env:NAME}`): the run reads the value, its config.yaml does not."""

import re
from typing import Any

from difftune.config.yaml_text import Node

Path = tuple[str | int, ...]

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")
_OTHER_KEY = re.compile(r"\$\{\s*([\w.\[\]]+)\s*\}")
_ATTRIBUTE = "_references"


class Reference(str):
    """A text that is written as it stands, to be resolved when it is read."""


def keep_references(config: Any, tree: Node) -> None:
    """Note at a config which of its values come from the environment, directly or by way of another key.

    Args:
        config: What was built; a copy by `dataclasses.replace` does not have the note.
        tree: What it was built from.
    """
    texts = {path: text for path, text in _texts(tree) if "${" in text}
    found = {path: text for path, text in texts.items() if _ENVIRONMENT.search(text)}
    while True:
        names = {".".join(map(str, path)) for path in found}
        more = {
            path: text
            for path, text in texts.items()
            if path not in found and any(_dotted(key) in names for key in _OTHER_KEY.findall(text))
        }
        if not more:
            break
        found |= more
    setattr(config, _ATTRIBUTE, found)


def references_of(config: Any) -> dict[Path, str]:
    """Text by place, as `keep_references` noted it."""
    found: dict[Path, str] = getattr(config, _ATTRIBUTE, {})
    return found


def _dotted(key: str) -> str:
    return key.replace("[", ".").replace("]", "")


def _texts(node: Node, path: Path = ()) -> list[tuple[Path, str]]:
    if isinstance(node.value, dict):
        return [item for key, child in node.value.items() for item in _texts(child, (*path, key))]
    if isinstance(node.value, list):
        return [item for index, child in enumerate(node.value) for item in _texts(child, (*path, index))]
    return [(path, node.value)] if isinstance(node.value, str) else []
