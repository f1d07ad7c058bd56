"""One promise, and what was found of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from difftune.verification.budget import Deviation


@dataclass(frozen=True)
class Claim:
    """A promise and what was found: it holds, it fails, or it could not be tried here."""

    what: str
    """The promise, such as "cached = whole"."""
    on: str
    """What was computed."""
    state: Literal["holds", "fails", "not tried"]
    found: str
    """The figures, or why it was not tried."""


def judged(what: str, on: str, deviations: Sequence[Deviation]) -> Claim:
    """A claim that holds where every result is within its budget; the figures are those of the worst one.

    Args:
        what: The promise.
        on: What was computed.
        deviations: At least one.

    Example:
        >>> judged("a = b", "a number", [Deviation("x", 0.5, 1.0, 0.0)]).found
        'x differs by 5.0e-01, allowed 1.0e+00'
    """
    assert deviations, what
    worst = max(deviations, key=lambda found: found.share)
    text = f"{worst.name} differs by {worst.error:.1e}, allowed {worst.budget:.1e}"
    return Claim(what, on, "holds" if all(found.holds for found in deviations) else "fails", text)


def not_tried(what: str, on: str, why: str) -> Claim:
    """A claim that this machine gives no answer to."""
    return Claim(what, on, "not tried", why)
