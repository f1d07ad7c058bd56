"""Recipes as trees that remember where each value stands: YAML with line numbers, `base:` chains, overrides."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftune.config.yaml_text import Node, read_yaml, read_yaml_file
from difftune.user_text import TextError, expand_path

COMMAND_LINE = "command line"
_MAX_BASES = 20


def make_node(value: Any, where: str) -> Node:
    """A tree of plain values, all of the same place."""
    if isinstance(value, dict):
        return Node({key: make_node(item, where) for key, item in value.items()}, where)
    if isinstance(value, list):
        return Node([make_node(item, where) for item in value], where)
    return Node(value, where)


def parse_value(text: str, where: str = "value") -> Any:
    """One YAML value, as after the `=` of an override.

    Raises:
        ValueError: If it is not YAML, or not plain.
    """
    node = read_yaml(text, where, lines=False)
    return None if node is None else node.plain()


def read_tree(path: Path) -> Node:
    """Read a YAML file into nodes whose place is `file:line`.

    Raises:
        ValueError: If it is not YAML, not a mapping, or has a key twice.
        FileNotFoundError: If it is not there.
    """
    tree = read_yaml_file(path) or Node({}, f"{path}:1")
    if not isinstance(tree.value, dict):
        kind = type(tree.value).__name__
        raise ValueError(f"{tree.where}: a recipe is a mapping of keys, got {kind} {str(tree.plain())[:40]!r}")
    return tree


def read_recipe(path: Path) -> list[Node]:
    """Read a recipe and the recipes that it names as `base:`, each relative to the file that names it; lowest first.

    Raises:
        ValueError: If the bases go round in a circle, or one is not a path.
        FileNotFoundError: If one is not there.
    """
    chain: list[Path] = []
    trees: list[Node] = []
    while True:
        # A circle of links is no file, and has no place that it could be resolved to.
        if not os.path.exists(path):
            raise FileNotFoundError(f"recipe not found: {path}" + (" (a link to nowhere)" if path.is_symlink() else ""))
        if path.resolve() in chain:
            circle = [*chain[chain.index(path.resolve()) :], path.resolve()]
            raise ValueError(f"base recipes go round in a circle: {' -> '.join(p.name for p in circle)}")
        chain.append(path.resolve())
        tree = read_tree(path)
        trees.insert(0, tree)
        base = tree.value.pop("base", None)
        if base is None or base.value is None:
            return trees
        if not isinstance(base.value, str):
            raise ValueError(f"{base.where}: base must be the path of a recipe, got {base.plain()!r}")
        if len(chain) == _MAX_BASES:
            raise ValueError(f"{base.where}: more than {_MAX_BASES} recipes, each with a base: {base.value}; join some")
        try:
            path = path.parent / expand_path(base.value)
        except TextError as error:
            raise ValueError(f"{base.where}: base {error}") from error
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "not found"
            raise FileNotFoundError(f"{base.where}: base recipe {what}: {path}")


def merge(lower: Node, upper: Node) -> Node:
    """The upper tree over the lower one: mappings merge key by key, anything else is replaced."""
    if not (isinstance(lower.value, dict) and isinstance(upper.value, dict)):
        return upper.copy()
    merged = {key: node.copy() for key, node in lower.value.items()}
    for key, node in upper.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node.copy()
    return Node(merged, upper.where)


@dataclass(frozen=True)
class Override:
    """One `key=value` of the command line."""

    keys: tuple[str, ...]
    value: Any
    where: str


def parse_override(text: str) -> Override:
    """Read `key=value` or `--key=value`.

    Raises:
        ValueError: If there is no key or no value, or the value is not YAML.
    """
    key, equals, value = text.removeprefix("--").partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    if not equals or not all(keys):
        raise ValueError(f"{COMMAND_LINE}: expected key=value with a dotted key, got {text!r}")
    if not value.strip():
        raise ValueError(f"{COMMAND_LINE}: {text!r} has no value; write {key}=null for none")
    where = f"{COMMAND_LINE} ({key[:80]}=...)"
    try:
        return Override(keys, parse_value(value, where), where)
    except ValueError as error:
        shown = f"{text[:77]}..." if len(text) > 80 else text
        reason = str(error).removeprefix(f"{where}: ").removeprefix("not valid YAML: ")
        raise ValueError(
            f"{COMMAND_LINE}: the value of {shown!r} is not valid YAML; quote it: '{key[:80]}=\"...\"' ({reason})"
        ) from error


def apply_override(tree: Node, override: Override) -> None:
    """Set the override's value in the tree. A mapping merges into what is there; missing mappings are made.

    Raises:
        LookupError: If it addresses an item that its list does not have.
        ValueError: If a key on the way is a plain value.
    """
    _apply(tree, override.keys, override)


def _apply(node: Node, keys: tuple[str, ...], override: Override) -> None:
    path = ".".join(override.keys[: len(override.keys) - len(keys)])
    if node.value is None:
        node.value = {}
    children: dict[Any, Node]
    if isinstance(node.value, list):
        children = {index: node.value[index] for index in select_items(node.value, keys[0], path, override.where)}
    elif isinstance(node.value, dict):
        children = {keys[0]: node.value.get(keys[0], Node({}, override.where))}
    else:
        raise ValueError(f"{override.where}: '{path}' is the value {node.value!r} and has no key '{keys[0]}'")
    for key, child in children.items():
        if len(keys) > 1:
            _apply(child, keys[1:], override)
            node.value[key] = child
        else:
            node.value[key] = merge(child, make_node(override.value, override.where))


def select_items(items: list[Node], key: str, path: str, where: str) -> list[int]:
    """Indices of the items that `key` means: a number from 0, `*` for all, or the `name` of an item.

    Raises:
        LookupError: If there is none.
    """
    if key == "*" and items:
        return list(range(len(items)))
    if key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < len(items):
        return [int(key)]
    named = [item.value.get("name") if isinstance(item.value, dict) else None for item in items]
    names = [node.value if node is not None else None for node in named]
    if key in names:
        return [index for index, name in enumerate(names) if name == key]
    listed = f" ({', '.join(name for name in names if name)})" if any(names) else ""
    raise LookupError(f"{where}: '{path}' has no item '{key[:40]}': it has {len(items)}{listed}, counted from 0")


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` with the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
