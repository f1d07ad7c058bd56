"""A row of a source, and a row that cannot be used."""

import re
from dataclasses import dataclass
from typing import Any

BAD_ROWS = ("raise", "drop")


@dataclass(frozen=True)
class Row:
    """One row as its source holds it, and where it stands there, for error messages."""

    columns: dict[str, Any]
    where: str
    bad: "BadRow | None" = None
    """Why nothing can be read of it; its columns are empty then."""


class BadRow(ValueError):
    """A row that cannot be used, whatever is wrong with it.

    Args:
        where: Names the row.
        text: What is wrong, and what to do.

    Attributes:
        reason: The first words of the text, by which such rows are counted.
    """

    def __init__(self, where: str, text: str) -> None:
        super().__init__(where, text)
        self.where, self.text = where, text
        self.reason = re.split(r"[:;,(]| for ['\"]", text)[0].strip()

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"
