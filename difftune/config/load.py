"""From recipe trees to dataclasses, strictly: every unknown key and wrong value is found, with its place."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from difftune.config.checks import cross_field_problems
from difftune.config.field import Constraints, all_keys, describe_kind
from difftune.config.recipe import RUN_TIME_MODEL_KEYS, Config, StageConfig
from difftune.config.references import keep_references
from difftune.config.tree import (
    Override,
    apply_override,
    make_node,
    merge,
    nearest,
    parse_override,
    parse_value,
    read_recipe,
    select_items,
)
from difftune.config.values import ValueProblem, check_value
from difftune.config.yaml_text import Node

_CONTEXT_KEYS = {"rope_parameters", "max_position_embeddings"}
"""Keys of `model` that extend a model that is loaded, where nothing else of an architecture stands beside them."""

_UNRESOLVED = "<unresolved>"
_REQUIRED = "???"
"""OmegaConf's sign for a value that the user has to give."""


class _InvalidError(Exception):
    """A value was refused and its problem noted; the object around it cannot be built."""


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, command: str = "fit") -> Config:
    """Merge defaults, a recipe and overrides into a checked :class:`Config`.

    Args:
        path: The recipe; `base:` in it names another one to start from, relative to the file. None: defaults only.
        overrides: `key=value` with dotted keys and YAML values. They win in every stage; `stages.<name or number>.key`
            reaches one stage. An item of a list is addressed by number, by its name, or all of them by `*`.
        command: What the config is for. `fit` needs data and an end; `evaluate`, `generate` and `export` a model;
            `plan` an architecture alone.

    Raises:
        ValueError: With every problem found, each with its file and line: unknown keys (and the nearest known one),
            wrong types, values out of range, keys that do not fit together.
        FileNotFoundError: If the recipe or a base is not there.

    Example:
        >>> load_config(None, ["model.path=my-model", "trainer.devices=2"], command="export").trainer.devices
        2
    """
    config, problems = build_config(path, overrides)
    if config is not None:
        problems = cross_field_problems(config, command)
    if config is None or problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        source = f"in {path}" if path is not None else "in the configuration"
        raise ValueError("\n  ".join([f"{count} {source}:", *problems]))
    return config


def build_config(path: str | Path | None, overrides: Sequence[str]) -> tuple[Config | None, list[str]]:
    """Merge defaults, recipe and overrides (these last, at the top level and in every stage) and convert them.

    Returns:
        The config, or None, and the problems found.
    """
    parsed = [parse_override(text) for text in overrides]
    for_one = [o for o in parsed if o.keys[0] == "stages" and len(o.keys) > 1]
    for_all = [o for o in parsed if o not in for_one]

    top = make_node(dataclasses.asdict(Config()), "default")
    if path is not None:
        top.value["run_dir"] = Node(f"runs/{Path(path).stem}", "default")
        for tree in read_recipe(Path(path)):
            top = _overlay(top, tree)
    if any(o.keys == ("model", "path") and o.value is not None for o in for_all):
        _forget_architecture(top)
    for override in for_all:
        if override.keys == ("stages",):
            apply_override(top, override)
    stages_node = top.value.pop("stages")

    builder = _Builder()
    stages = builder.stage_nodes(stages_node)
    trees = _apply_overrides(top, stages, for_all, for_one)
    config = builder.build(trees[0], Config)
    built = [
        builder.build(tree, StageConfig, prefix=f"stages.{stage.value['name'].value}.", root=top)
        for stage, tree in zip(stages, trees[1:], strict=True)
    ]
    if builder.problems:
        return None, sorted(builder.problems, key=_reading_order)
    config.stages = built
    for one, tree in zip((config, *built), trees, strict=True):
        keep_references(one, tree)
    return config, []


def _overlay(lower: Node, upper: Node) -> Node:
    """Merge a recipe over what it is based on; a model path in it replaces the architecture described below."""
    model = upper.value.get("model")
    if model is not None and isinstance(model.value, dict):
        path = model.value.get("path")
        if path is not None and path.value not in (None, _REQUIRED):
            _forget_architecture(lower)
    return merge(lower, upper)


def _forget_architecture(tree: Node) -> None:
    model = tree.value["model"]
    if isinstance(model.value, dict):
        described = {key for key in model.value.keys() - set(RUN_TIME_MODEL_KEYS) if model.value[key].value is not None}
        if described <= _CONTEXT_KEYS:
            return
        for key in model.value.keys() - set(RUN_TIME_MODEL_KEYS):
            model.value[key] = Node(None, model.where)


def _apply_overrides(top: Node, stages: list[Node], for_all: list[Override], for_one: list[Override]) -> list[Node]:
    """The top level and each stage merged over it, overridden; an override has to find its place in at least one."""
    shared = [f.name for f in dataclasses.fields(StageConfig) if f.name != "name"]
    trees = [top, *(merge(Node({name: top.value[name] for name in shared}, top.where), stage) for stage in stages)]
    for override in for_all:
        if override.keys == ("stages",):
            continue
        reached = trees if override.keys[0] in shared else trees[:1]
        missing = []
        for tree in reached:
            try:
                apply_override(tree, override)
            except LookupError as error:
                missing.append(error)
        if len(missing) == len(reached):
            raise ValueError(str(missing[-1])) from missing[-1]
    for override in for_one:
        if not stages:
            raise ValueError(f"{override.where}: the recipe has no stages; leave out 'stages.{override.keys[1]}.'")
        if len(override.keys) == 2:
            raise ValueError(
                f"{override.where}: name a key of the stage, as in stages.{override.keys[1]}.optim.lr=1e-4"
            )
        try:
            for index in select_items(stages, override.keys[1], "stages", override.where):
                apply_override(trees[1 + index], dataclasses.replace(override, keys=override.keys[2:]))
        except LookupError as error:
            raise ValueError(str(error)) from error
    return trees


class _Builder:
    """Converts trees to dataclasses and notes what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._noted: set[tuple[str, str]] = set()
        self._prefix = ""

    def note(self, where: str, path: str, text: str) -> None:
        """Keep a problem; one that a stage inherits from the top level is told once."""
        if (where, path) not in self._noted:
            self._noted.add((where, path))
            self.problems.append(f"{where}: {text}")

    def stage_nodes(self, stages: Node) -> list[Node]:
        """The stages as written, each with a name; keys that a stage cannot have are noted and left out."""
        if stages.value is None:
            return []
        if not isinstance(stages.value, list) or not all(isinstance(node.value, dict) for node in stages.value):
            self.note(stages.where, "stages", "stages must be a list of mappings, one for each stage")
            return []
        allowed = {f.name for f in dataclasses.fields(StageConfig)}
        whole_run = {f.name for f in dataclasses.fields(Config)} - allowed
        nodes = []
        for index, node in enumerate(stages.value):
            mapping = {"name": Node(f"stage{index}", node.where), **node.value}
            for key in whole_run & set(mapping):
                path = f"stages.{index}.{key}"
                where = mapping.pop(key).where
                self.note(where, path, f"'{path}': '{key}' is one for all stages; set it at the top level")
            nodes.append(Node(mapping, node.where))
        return nodes

    def build(self, tree: Node, target: type, prefix: str = "", root: Node | None = None) -> Any:
        """Resolve the interpolations of a tree and convert it.

        Args:
            tree: What to convert.
            target: The dataclass to make.
            prefix: What to put before the paths in messages.
            root: Tree whose other keys interpolations may name.
        """
        self._prefix = prefix
        whole = Node({**root.value, **tree.value}, tree.where) if root is not None else tree
        resolved = self._resolve(whole)
        own = {key: resolved[key] for key in tree.value}
        try:
            return self._dataclass(own, target, tree, "")
        except _InvalidError:
            return None

    def _resolve(self, whole: Node) -> dict[str, Any]:
        """Plain values with all interpolations replaced; one that cannot be is noted and becomes `_UNRESOLVED`."""
        while True:
            try:
                resolved = OmegaConf.to_container(OmegaConf.create(whole.plain()), resolve=True)
            except OmegaConfBaseException as error:
                key = str(error.full_key or "")
                place = _find(whole, key)
                assert isinstance(place.value, str), f"no interpolation at {key!r}"
                reason = str(error.msg or error).splitlines()[0]
                self.note(place.where, key, f"{self._prefix}{key}: cannot resolve '{place.value}': {reason}")
                place.value = _UNRESOLVED
            else:
                assert isinstance(resolved, dict)
                return {str(key): value for key, value in resolved.items()}

    def _dataclass(self, value: Any, target: type, node: Node, path: str) -> Any:
        if not isinstance(value, dict):
            raise self._invalid(node, path, f"must be a mapping of keys, got {value!r}")
        if hasattr(target, "variants"):
            target = self._variant(value, target, node, path)
        hints = typing.get_type_hints(target)
        fields = {f.name: f for f in dataclasses.fields(target)}
        arguments, valid = {}, True
        for key, item in value.items():
            child = _child(node, key)
            inner = f"{path}.{key}" if path else key
            if key not in fields:
                suggestion = self._suggest(key, path, list(fields))
                self.note(child.where, inner, f"unknown key '{self._prefix}{inner}'{suggestion}")
                valid = False
                continue
            try:
                arguments[key] = self._convert(item, hints[key], child, inner, fields[key].metadata)
            except _InvalidError:
                valid = False
        for name, f in fields.items():
            if f.default is f.default_factory is dataclasses.MISSING and name not in value:
                valid = False
                self._invalid(node, f"{path}.{name}", "is missing and has no default")
        if not valid:
            raise _InvalidError
        return target(**arguments)

    def _variant(self, value: dict[str, Any], target: Any, node: Node, path: str) -> type:
        """The dataclass that a mapping's `kind` chooses among the variants of `target`."""
        variants = target.variants()
        kind = value.get("kind", next(f.default for f in dataclasses.fields(target) if f.name == "kind"))
        if not isinstance(kind, str) or kind not in variants:
            hint = nearest(str(kind), list(variants))
            where = _child(node, "kind")
            raise self._invalid(where, f"{path}.kind", f"must be one of {', '.join(variants)}, got {kind!r}{hint}")
        return variants[kind]

    def _convert(self, value: Any, hint: Any, node: Node, path: str, constraints: Constraints) -> Any:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if _UNRESOLVED in (node.value, value):
            raise _InvalidError
        if value == _REQUIRED:
            raise self._invalid(node, path, f"has to be given; add {path}=VALUE to the command")
        if isinstance(value, str) and isinstance(node.value, str) and "${" in node.value and str not in options:
            # An environment variable is always text; read it as the recipe would have.
            try:
                value = parse_value(value)
            except ValueError:
                raise self._invalid(node, path, f"must be {describe_kind(hint)}, got {value!r}") from None
        for option in options:
            if dataclasses.is_dataclass(option) and value is not None:
                assert isinstance(option, type)
                return self._dataclass(value, option, node, path)
            if typing.get_origin(option) is list and isinstance(value, list):
                return self._list(value, typing.get_args(option)[0], node, path, constraints)
            if _is_a(value, option):
                self._check_items(value, option, node, path)
                try:
                    return check_value(option(value) if option in (int, float) else value, constraints)
                except ValueProblem as error:
                    raise self._invalid(node, path, str(error)) from None
        raise self._invalid(node, path, f"must be {describe_kind(hint)}, got {value!r}")

    def _check_items(self, value: Any, hint: Any, node: Node, path: str) -> None:
        """Of a mapping from names to one kind of value: that they are of it."""
        if typing.get_origin(hint) is not dict:
            return
        kind = typing.get_args(hint)[1]
        wrong = [key for key, item in value.items() if kind is not Any and not _is_a(item, kind)]
        for key in wrong:
            self._invalid(_child(node, key), f"{path}.{key}", f"must be {describe_kind(kind)}, got {value[key]!r}")
        if wrong:
            raise _InvalidError

    def _list(self, value: list[Any], hint: Any, node: Node, path: str, constraints: Constraints) -> list[Any]:
        length = constraints.get("length")
        if length is not None and len(value) != length:
            raise self._invalid(node, path, f"must have {length} items, got {value!r}")
        items, valid = [], True
        for index, item in enumerate(value):
            try:
                items.append(self._convert(item, hint, _child(node, index), f"{path}.{index}", constraints))
            except _InvalidError:
                valid = False
        if not valid:
            raise _InvalidError
        return items

    def _invalid(self, node: Node, path: str, text: str) -> _InvalidError:
        self.note(node.where, path, f"{self._prefix}{path} {text}")
        return _InvalidError()

    def _suggest(self, key: str, path: str, siblings: list[str]) -> str:
        """The nearest key in the same section, else the section where such a key lives, else all keys of this one."""
        if "." in key:
            outer, _, inner = key.rpartition(".")
            return f"; in a file, keys are nested: write '{outer}:' and, indented, '{inner}:'"
        if hint := nearest(key, siblings):
            close = hint.split("'")[1]
            return hint.replace(f"'{close}'", f"'{self._prefix}{path}.{close}'" if path else f"'{self._prefix}{close}'")
        elsewhere = [dotted for dotted in all_keys(Config) if dotted.rpartition(".")[2] == key]
        if elsewhere:
            return f"; did you mean '{elsewhere[0]}'?"
        return f"; known here: {', '.join(siblings)}"


def _reading_order(problem: str) -> list[tuple[int, str]]:
    """Sort key by place: files by name, lines by number."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in problem.split(":")[:2]]


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value may stand in a field of this kind: 3.0 for an integer and 3 for a number, true for neither."""
    if kind in (int, float):
        whole = isinstance(value, float) and value.is_integer()
        number = isinstance(value, int) or whole if kind is int else isinstance(value, (int, float))
        return number and not isinstance(value, bool)
    kind = typing.get_origin(kind) or kind
    return kind is Any or isinstance(value, kind)


def _child(node: Node, key: Any) -> Node:
    """The node below, or this one where an interpolation put a whole mapping or list in one place."""
    if isinstance(node.value, dict) and key in node.value:
        return node.value[key]
    if isinstance(node.value, list) and isinstance(key, int):
        return node.value[key]
    return node


def _find(node: Node, dotted: str) -> Node:
    """The node at a path in OmegaConf's writing, such as `data.train[0].path`, as far as the tree goes."""
    for part in dotted.replace("[", ".").replace("]", "").split("."):
        node = _child(node, int(part) if isinstance(node.value, list) and part.isdecimal() else part)
    return node
