"""Configs as text: the resolved recipe of a run, and the reference of all keys.

`python -m difftune.config.text > docs/reference/config.md` writes the reference anew.
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from typing import Any

import yaml

from difftune.config.field import describe_kind, describe_range
from difftune.config.recipe import Config, StageConfig
from difftune.config.references import Reference, references_of


def to_yaml(config: Config) -> str:
    """The config with every value resolved, as a recipe that loads to an equal config.

    Stages show what differs from the top level. A value of an environment variable stays the reference to it.
    """
    tree = _with_references(dataclasses.asdict(config), references_of(config))
    tree["stages"] = [
        {
            "name": stage.name,
            **_difference(
                _with_references(dataclasses.asdict(stage), references_of(stage)), {**tree, "name": stage.name}
            ),
        }
        for stage in config.stages
    ]
    return yaml.safe_dump(_escape(tree), sort_keys=False, allow_unicode=True, width=110)


def _with_references(value: Any, references: dict[tuple[str | int, ...], str], path: tuple[str | int, ...] = ()) -> Any:
    """Nested values with the references in their places."""
    if path in references:
        return Reference(references[path])
    if isinstance(value, dict):
        return {key: _with_references(item, references, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_references(item, references, (*path, index)) for index, item in enumerate(value)]
    return value


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Entries of nested `ours` that are not the same in `theirs`."""
    changed = {}
    for key, value in ours.items():
        other = theirs[key]
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _difference(value, other):
                changed[key] = inner
        elif value != other:
            changed[key] = value
    return changed


def _escape(value: Any) -> Any:
    """Protect `${` in resolved text from being read as an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, Reference):
        return str(value)
    return value.replace("${", "\\${") if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True)
class Key:
    """One documented key of a recipe."""

    path: str
    kind: str
    default: str
    meaning: str


def documented_keys(target: type = Config, prefix: str = "") -> list[Key]:
    """Every key with its documentation, sections before what is in them; an item of a list has `[]` in its path."""
    hints = typing.get_type_hints(target)
    meanings = _field_strings(target)
    keys = []
    for field in dataclasses.fields(target):
        path = prefix + field.name
        meaning = meanings[field.name]
        if "choices" in field.metadata:
            meaning += f" One of {', '.join(f'`{choice}`' for choice in field.metadata['choices'])}."
        if limits := describe_range(field.metadata):
            meaning += f" Range: {limits}."
        keys.append(Key(path, describe_kind(hints[field.name]), _default(field), meaning))
        section = _section(hints[field.name])
        is_list = typing.get_origin(hints[field.name]) is list
        # A variant inside a variant (a task that runs another one) has the keys that are told of the list already.
        nested = section is StageConfig or (hasattr(section, "variants") and not is_list)
        if section is not None and not nested:
            keys += _section_keys(section, f"{path}{'[]' if is_list else ''}")
    return keys


def _section_keys(section: Any, path: str) -> list[Key]:
    """The keys of a section; of one with variants, those of every kind, `path[kind].key` but for the default kind."""
    if not hasattr(section, "variants"):
        return documented_keys(section, f"{path}.")
    default = next(field.default for field in dataclasses.fields(section) if field.name == "kind")
    keys = []
    for kind, variant in section.variants().items():
        where = path if kind == default else f"{path.removesuffix('[]')}[{kind}]"
        keys += documented_keys(variant, f"{where}.")
    return keys


def reference_markdown() -> str:
    """The content of docs/reference/config.md."""
    lines = [
        "# Recipe keys",
        "",
        "Made from the dataclasses of `difftune/config/` by `make docs`; a test keeps it current.",
        "A recipe holds only what differs from these defaults. `null` is none. `[]` stands for each item of a list,",
        "`evaluation.tasks[needle]` for those of the kind `needle` (the kind is `math` if none is given).",
        "",
    ]
    keys = documented_keys()
    # One that may be null has a default, and stands at the top level too.
    sections = [key for key in keys if key.default == "" or any(k.path.startswith(f"{key.path}.") for k in keys)]
    general = [key for key in keys if "." not in key.path and key.default != ""]
    lines += ["## Top level", "", *_table(general)]
    for section in sections:
        inside = [
            key for key in keys if key.path.startswith((section.path + ".", section.path + "[")) and key.default != ""
        ]
        lines += ["", f"## {section.path}", "", section.meaning, "", *_table(inside)]
    return "\n".join(lines) + "\n"


def key_list() -> str:
    """Every key for a terminal: `path (kind, default)` and its meaning beneath."""
    lines = []
    for key in documented_keys():
        default = f", default {key.default}" if key.default not in ("", "required") else ""
        lines.append(f"{key.path} ({key.kind}{', required' if key.default == 'required' else default})")
        lines += textwrap.wrap(key.meaning, width=100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _table(keys: list[Key]) -> list[str]:
    rows = [f"| `{key.path}` | {key.kind} | `{key.default}` | {key.meaning} |" for key in keys]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows]


def _field_strings(target: type) -> dict[str, str]:
    """The string beneath each field of a dataclass, on one line."""
    found = _field_strings(target.__base__) if dataclasses.is_dataclass(target.__base__) else {}
    (definition,) = ast.parse(inspect.getsource(target)).body
    assert isinstance(definition, ast.ClassDef)
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _section(hint: Any) -> type | None:
    """The dataclass that a field holds: itself, an optional one, or the items of a list."""
    return next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)  # type: ignore[return-value]


def _default(field: Any) -> str:
    """The default as YAML; "required", or nothing for a section."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return ""
    return yaml.safe_dump(value, default_flow_style=True).replace("...", "").strip()


if __name__ == "__main__":
    print(reference_markdown(), end="")
