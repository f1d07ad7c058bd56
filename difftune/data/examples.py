"""What one row teaches, or why it is not learned; and how columns are read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Columns = Mapping[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """What one row teaches: a chat whose assistant turns are learned, or a text that is learned whole."""

    messages: list[Message]
    """Turns {"role": system | user | assistant, "content": text}. Empty for a text."""
    answer: str | None = None
    """The final answer, where the data knows it."""
    id: str | None = None
    """The row's name in its data set."""
    text: str | None = None
    """A document without roles, learned from its second token to its end."""
    tools: list[Any] | None = None
    """Descriptions of the tools that the chat may call, for the template."""


@dataclass(frozen=True)
class Dropped:
    """Why a row is not learned."""

    reason: str
    """Beginning with "empty" or not: a row without text is bad, others are left out by what their columns say."""

    first: str | None = None
    """Of a bad row: where it is and what is wrong with it."""

    @property
    def is_bad(self) -> bool:
        """Whether the row is broken, and so a matter of `data.bad_rows`."""
        return self.reason.startswith("empty")


def text_of(columns: Columns, name: str) -> str:
    """A text column; null reads as empty, numbers of an answer as their digits."""
    if name not in columns:
        raise ValueError(f"no column {name!r}; there are {', '.join(sorted(columns))}")
    value = columns[name]
    if value is None:
        return ""
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"column {name!r} must be text or a finite number, got {value}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"column {name!r} must be text, got {type(value).__name__}")
    return value


def row_id(columns: Columns) -> str | None:
    """The row's own name, if it has one."""
    values = (columns.get(name) for name in ("id", "unique_id", "uuid"))
    return next((str(value) for value in values if value is not None), None)


def question_and_target(columns: Columns, question: str, target: str, answer: str | None = None) -> Example | Dropped:
    """One user turn and one assistant turn."""
    prompt = text_of(columns, question)
    if not prompt.strip():
        return Dropped(f"empty {question}")
    if not target.strip():
        return Dropped("empty target")
    turns = [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": target.strip()}]
    return Example(turns, answer=answer, id=row_id(columns))
