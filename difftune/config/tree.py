"""Recipes as trees that remember where each value stands: YAML with line numbers, `base:` chains, overrides."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COMMAND_LINE = "command line"


@dataclass
class Node:
    """A value of a recipe (mapping, list or scalar; the items of the first two are nodes) and its place."""

    value: Any
    where: str

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def copy(self) -> "Node":
        """A tree of its own, to be edited."""
        if isinstance(self.value, dict):
            return Node({key: node.copy() for key, node in self.value.items()}, self.where)
        if isinstance(self.value, list):
            return Node([node.copy() for node in self.value], self.where)
        return Node(self.value, self.where)


def make_node(value: Any, where: str) -> Node:
    """A tree of plain values, all of the same place."""
    if isinstance(value, dict):
        return Node({key: make_node(item, where) for key, item in value.items()}, where)
    if isinstance(value, list):
        return Node([make_node(item, where) for item in value], where)
    return Node(value, where)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: `1e-4` is a number; `yes`, `1:30` and dates are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_value(text: str) -> Any:
    """One YAML value, as after the `=` of an override."""
    return yaml.load(text, Loader=_Loader)


def read_tree(path: Path) -> Node:
    """Read a YAML file into nodes whose place is `file:line`.

    Raises:
        ValueError: If it is not YAML, not a mapping, or has a key twice.
        FileNotFoundError: If it is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"recipe not found: {path}")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ValueError(f"{path}: not a text file in UTF-8: {error}") from error
    try:
        root = loader.get_single_node()
        tree = Node({}, f"{path}:1") if root is None else _convert(root, loader, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree.value, dict):
        raise ValueError(f"{tree.where}: a recipe is a mapping of keys, got {type(tree.value).__name__}")
    return tree


def _convert(node: yaml.Node, loader: _Loader, path: Path) -> Node:
    where = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(item, loader, path) for item in node.value], where)
    if not isinstance(node, yaml.MappingNode):
        return Node(loader.construct_object(node), where)
    own_keys: set[str] = set()
    for key, _ in node.value:
        if key.value in own_keys:
            raise ValueError(f"{path}:{key.start_mark.line + 1}: key '{key.value}' stands twice in the same mapping")
        own_keys.add(key.value)
    loader.flatten_mapping(node)
    mapping = {}
    for key, item in node.value:
        converted = _convert(item, loader, path)
        # An empty or multi-line value starts elsewhere; the key is what a reader looks for.
        converted.where = f"{path}:{key.start_mark.line + 1}"
        mapping[str(key.value)] = converted
    return Node(mapping, where)


def read_recipe(path: Path) -> list[Node]:
    """Read a recipe and the recipes that it names as `base:`, each relative to the file that names it; lowest first.

    Raises:
        ValueError: If the bases go round in a circle, or one is not a path.
        FileNotFoundError: If one is not there.
    """
    chain: list[Path] = []
    trees: list[Node] = []
    while True:
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
        path = path.parent / base.value
        if not path.is_file():
            raise FileNotFoundError(f"{base.where}: base recipe not found: {path}")


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
    try:
        return Override(keys, parse_value(value), f"{COMMAND_LINE} ({key}=...)")
    except yaml.YAMLError as error:
        raise ValueError(
            f"{COMMAND_LINE}: the value of {text!r} is not valid YAML; quote it: '{key}=\"...\"'"
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
    if key.isdecimal() and int(key) < len(items):
        return [int(key)]
    named = [item.value.get("name") if isinstance(item.value, dict) else None for item in items]
    names = [node.value if node is not None else None for node in named]
    if key in names:
        return [index for index, name in enumerate(names) if name == key]
    listed = f" ({', '.join(name for name in names if name)})" if any(names) else ""
    raise LookupError(f"{where}: '{path}' has no item '{key}': it has {len(items)}{listed}, counted from 0")


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` with the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
