"""Fields of a recipe's dataclasses, with what can be checked of a value without looking at another key."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "a mapping",
    type(None): "null",
}

LARGEST = 10**12
"""Of a whole number that has no other bound: more than any run has of anything."""

Constraints = Mapping[str, Any]
"""Metadata of a field; see :func:`key`."""


def key(default: Any, **constraint: Any) -> Any:
    """Field with a default and constraints.

    Args:
        default: Of the field.
        constraint: `choices`; `low` and `high` (inclusive), `above` (exclusive): the range, which is documented;
            `most`: a bound that no sensible value comes near, else `LARGEST`; `length` of a list; `is_path`: a text
            that is a path, in which `~` is the home folder.
    """
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=constraint)
    return field(default=default, metadata=constraint)


def required(**constraint: Any) -> Any:
    """Field without a default, with constraints as of :func:`key`."""
    return field(metadata=constraint)


def describe_range(constraints: Constraints) -> str:
    """The range of a field in words, or an empty text."""
    parts = []
    if "above" in constraints:
        parts.append(f"greater than {constraints['above']}")
    if "low" in constraints and "high" in constraints:
        parts.append(f"between {constraints['low']} and {constraints['high']}")
    elif "low" in constraints:
        parts.append(f"at least {constraints['low']}")
    elif "high" in constraints:
        parts.append(f"at most {constraints['high']}")
    return " and ".join(parts)


def describe_kind(hint: Any) -> str:
    """The kinds of value that a field takes, in words."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    words = []
    for option in options:
        if typing.get_origin(option) is list:
            words.append("a list")
        elif dataclasses.is_dataclass(option):
            words.append("a mapping")
        else:
            words.append(_KINDS[typing.get_origin(option) or option])
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[:-1] else words)


def all_keys(target: type, prefix: str = "") -> list[str]:
    """Every dotted key of a nested dataclass, without those inside lists."""
    keys = []
    for name, hint in typing.get_type_hints(target).items():
        inner = next((h for h in (*typing.get_args(hint), hint) if dataclasses.is_dataclass(h)), None)
        keys.append(prefix + name)
        if inner is not None and typing.get_origin(hint) is not list:
            keys += all_keys(inner, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys
