"""YAML text to nodes with places, within bounds: plain values only, no tags, no circles, no depth that ends Python."""

import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20
"""Of a recipe: far more than a person writes."""
MAX_DEPTH = 64
"""Of mappings and lists in one another."""
MAX_VALUES = 20_000
"""Of a recipe, with every alias written out."""
MAX_DIGITS = 64
"""Of a number."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = ("null", "bool", "int", "float", "str")


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


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: `1e-4` is a number; `yes`, `1:30` and dates are text."""

    depth = values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        # A parser that calls itself for every level would end in a RecursionError.
        self.depth += 1
        self.values += 1
        if self.depth > MAX_DEPTH + 1:
            raise _refused(self.peek_event(), f"too deep: mappings and lists may stand {MAX_DEPTH} deep; flatten it")
        if self.values > 2 * MAX_VALUES:
            raise _refused(self.peek_event(), f"more than {MAX_VALUES:,} values; a recipe has a few hundred")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


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
    _Loader.add_implicit_resolver(_TAG + _tag, re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str, source: str, *, lines: bool = True) -> Node | None:
    """Read one YAML document.

    Args:
        text: YAML.
        source: What it is, for places and errors: a file.
        lines: Whether places have a line.

    Returns:
        The value, or None if there is none.

    Raises:
        ValueError: If it is not YAML, or holds what a recipe cannot: tags, values that contain themselves, keys that
            are no text or stand twice, more or deeper values than a recipe has.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return None if root is None else _Converter(loader, source, lines).convert(root)
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"{source}: not valid YAML: the character U+{error.character:04X} cannot stand in a text"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark is not None and lines else source
        raise ValueError(f"{place}: not valid YAML: {_reason(error)}") from error


def read_yaml_file(path: Path, what: str = "recipe") -> Node | None:
    """Read a YAML file.

    Args:
        path: The file.
        what: What it is, for errors.

    Raises:
        ValueError: As :func:`read_yaml`; also if it is no file, too large, or not UTF-8.
        FileNotFoundError: If it is not there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{what} not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file, and a {what} is one; name the YAML file itself")
    if path.stat().st_size > MAX_BYTES:
        size = path.stat().st_size / 2**20
        raise ValueError(
            f"{path} has {size:.1f} MiB, and a {what} at most {MAX_BYTES / 2**20:g} MiB: is it another file?"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8: {error}") from error
    return read_yaml(text, str(path))


class _Converter:
    """From PyYAML's nodes to ours."""

    def __init__(self, loader: _Loader, source: str, lines: bool) -> None:
        self.loader, self.source, self.lines = loader, source, lines
        self.values = 0
        self.around: list[yaml.Node] = []

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source

    def convert(self, node: yaml.Node) -> Node:
        self.values += 1
        if self.values > MAX_VALUES:
            raise _refused(node, f"more than {MAX_VALUES:,} values; a recipe has a few hundred")
        if not isinstance(node, yaml.CollectionNode):
            return Node(self.scalar(node), self.where(node))
        self.enter(node)
        own: Any = self.mapping(node) if isinstance(node, yaml.MappingNode) else [self.convert(n) for n in node.value]
        self.around.pop()
        return Node(own, self.where(node))

    def enter(self, node: yaml.Node) -> None:
        if any(outer is node for outer in self.around):
            raise _refused(node, "a value contains itself through its own anchor; write it out")
        kind = "seq" if isinstance(node, yaml.SequenceNode) else "map"
        if node.tag != _TAG + kind:
            raise _refused(node, _no_tag(node))
        self.around.append(node)

    def mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        merged: dict[str, Node] = {}
        own: dict[str, Node] = {}
        for key, item in node.value:
            if key.tag == _TAG + "merge":
                # A mapping's own keys win over merged ones, and earlier merged ones over later ones.
                for source in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                    if not isinstance(source, yaml.MappingNode):
                        raise _refused(key, "<< merges a mapping, or a list of mappings; name one by its *anchor")
                    merged = {**self.convert(source).value, **merged}
                continue
            name = self.key(key)
            if name in own:
                raise ValueError(f"{self.where(key)}: key '{name}' stands twice in the same mapping")
            own[name] = self.convert(item)
            # An empty or multi-line value starts elsewhere; the key is what a reader looks for.
            own[name].where = self.where(key)
        return {**merged, **own}

    def key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag == _TAG + "null":
            raise _refused(node, "a key must be a text, such as seed; quote it if it looks like something else")
        self.scalar(node)
        return str(node.value)

    def scalar(self, node: yaml.Node) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind not in _SCALARS:
            raise _refused(node, _no_tag(node))
        if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
            raise _refused(node, f"a number of {len(node.value)} digits; one has at most {MAX_DIGITS}")
        try:
            return self.loader.construct_object(node)
        except (ValueError, KeyError, LookupError, binascii.Error):
            raise _refused(node, f"{node.value[:40]!r} is not a value of the tag !!{kind}; leave the tag out") from None


def _refused(node: Any, text: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _no_tag(node: yaml.Node) -> str:
    tag = node.tag.replace(_TAG, "!!")
    return f"could not determine a constructor for the tag {tag}: a recipe has plain values only; leave it out"


def _reason(error: yaml.MarkedYAMLError) -> str:
    text = str(error.problem)
    if "'\\t'" in text:
        return f"{text}: indent by blanks, a tab is not allowed there"
    if "another document" in text:
        return f"{text}: a recipe is one document, without a second ---"
    return text
