"""Fields of a recipe's dataclasses, with what can be checked of a value without looking at another key."""

from dataclasses import field
from typing import Any


def key(default: Any, **constraint: Any) -> Any:
    """Field with a default and constraints: `choices`, `low`, `high` (inclusive), `above` (exclusive), `length`."""
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=constraint)
    return field(default=default, metadata=constraint)
