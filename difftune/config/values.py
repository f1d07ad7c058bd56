"""Single values against the constraints of their field: where the numbers and paths of a recipe are checked."""

import math
from typing import Any

from difftune.config.field import LARGEST, Constraints, describe_range
from difftune.config.tree import nearest
from difftune.user_text import TextError, check_text, expand_path


class ValueProblem(ValueError):
    """What is wrong with a value; the message begins with what is said of its key, as in "must be at least 1"."""


def check_value(value: Any, constraints: Constraints) -> Any:
    """Check a value whose type is right already, with all that it holds.

    Args:
        value: Of a field; mappings and lists of any depth.
        constraints: Of the field.

    Returns:
        The value; a path with its `~` replaced.

    Raises:
        ValueProblem: If a number is not finite or out of range, a choice is unknown, a text is none that can be
            written, or a path cannot be one.
    """
    choices = constraints.get("choices")
    if value is not None and choices is not None and value not in choices:
        hint = nearest(str(value), list(choices))
        raise ValueProblem(f"must be one of {', '.join(choices)}, got {value!r}{hint}")
    if isinstance(value, str):
        try:
            if constraints.get("is_path"):
                return expand_path(value)
            check_text(value)
        except TextError as error:
            raise ValueProblem(str(error)) from error
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(value, constraints)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(str(key))
            _check_inside(key, item, constraints)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_inside(index, item, constraints)
    return value


def _check_inside(key: Any, item: Any, constraints: Constraints) -> None:
    try:
        check_value(item, constraints)
    except ValueProblem as error:
        raise ValueProblem(f"has {key}: {item!r}, which {error}") from error


def _check_number(value: int | float, constraints: Constraints) -> None:
    # Negated, so that a NaN is refused as well.
    within = (
        value >= constraints.get("low", -math.inf)
        and value <= constraints.get("high", math.inf)
        and value > constraints.get("above", -math.inf)
    )
    if describe_range(constraints) and not within:
        raise ValueProblem(f"must be {describe_range(constraints)}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueProblem(f"must be a finite number, got {value!r}")
    most = constraints.get("most", LARGEST if isinstance(value, int) else math.inf)
    if abs(value) > most:
        raise ValueProblem(f"must be at most {most}, got {value!r}")
