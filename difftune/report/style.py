"""Colours and dashes: one colour a kind of attention on every page, a dash for each further recipe of that kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from difftune.report.compare import Group

COLOURS = {"diff_v1": "#2b5fb0", "diff_v2": "#14927f", "softmax": "#d2722b", "": "#6b7784"}
"""By kind of attention; told apart by the colour-blind too."""

_DASHES = ("", "6 4", "2 3", "9 3 2 3")
_RAMP_LOW, _RAMP_HIGH = (168, 198, 232), (18, 52, 110)


@dataclass(frozen=True)
class Style:
    """How a recipe is drawn."""

    colour: str
    """CSS colour."""
    dash: str
    """SVG dash pattern; empty: solid."""


def style_of(groups: Sequence[Group]) -> dict[str, Style]:
    """The style of each group by its label."""
    styles: dict[str, Style] = {}
    seen: dict[str, int] = {}
    for group in groups:
        place = seen.get(group.kind, 0)
        seen[group.kind] = place + 1
        styles[group.label] = Style(COLOURS.get(group.kind, COLOURS[""]), _DASHES[place % len(_DASHES)])
    return styles


def ramp(place: int, count: int) -> str:
    """A colour of a row from light (the first) to dark (the last), for layers."""
    share = place / (count - 1) if count > 1 else 1.0
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_RAMP_LOW, _RAMP_HIGH, strict=True))
    return f"rgb({red},{green},{blue})"
