"""Paths and numbers as users write them, read in one place: `~` is the home folder; what cannot be one is refused."""

import math
from pathlib import Path

MAX_NAME_BYTES = 255
"""Of one name, on the file systems in use."""
MAX_PATH_BYTES = 4096
"""Of a whole path, on Linux."""


class TextError(ValueError):
    """What is wrong with a text; the message goes after the name of what it is said of, as in "is empty"."""


def expand_path(text: str) -> str:
    """The path that a text means, with `~` replaced; hub ids and names such as `synthetic:arithmetic` stay.

    Args:
        text: As a user wrote it.

    Raises:
        TextError: If it is empty, holds what no path holds, is too long, or names a user that is not there.

    Example:
        >>> expand_path("runs/main"), expand_path("synthetic:arithmetic")
        ('runs/main', 'synthetic:arithmetic')
    """
    if not text.strip():
        raise TextError(f"is empty ({text!r}): give a path, or leave it out")
    check_text(text)
    path = text
    if text.startswith("~"):
        try:
            path = str(Path(text).expanduser())
        except RuntimeError:
            raise TextError(
                f"is {text!r}: this machine knows no home folder of that name; write the folder out"
            ) from None
    longest = max(len(part.encode()) for part in path.split("/"))
    if longest > MAX_NAME_BYTES or len(path.encode()) > MAX_PATH_BYTES:
        raise TextError(
            f"is too long: a name may have {MAX_NAME_BYTES} bytes and a path {MAX_PATH_BYTES}, "
            f"and {text[:40]!r}... has {longest} and {len(path.encode())}"
        )
    return path


def check_text(text: str) -> None:
    """Refuse characters that no file and no tokenizer takes.

    Raises:
        TextError: If there is a NUL, or half of a surrogate pair.

    Example:
        >>> check_text("plain")
    """
    if "\0" in text:
        raise TextError(f"holds a NUL character ({text[:80]!r}): take it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TextError(
            f"holds half of a surrogate pair ({text[:80]!r}), which UTF-8 cannot write: take it out"
        ) from None


def finite_number(text: str) -> float:
    """A number of the command line; neither infinite nor NaN.

    Raises:
        TextError: If it is none.

    Example:
        >>> finite_number("1e-3")
        0.001
    """
    try:
        value = float(text)
    except ValueError:
        raise TextError(f"must be a number, got {text[:80]!r}") from None
    if not math.isfinite(value):
        raise TextError(f"must be a finite number, got {text!r}")
    return value
