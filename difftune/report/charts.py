"""Charts as SVG text: lines, heat maps, pictures of attention maps; so that a page needs nothing else."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 500, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 28, 38
MOST_POINTS = 500
"""A curve of more points is drawn by the means of neighbours."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    """In the tip that follows the pointer."""
    points: Sequence[tuple[float, float]]
    """x and y; a gap where y is NaN."""
    colour: str
    """CSS colour."""
    dash: str = ""
    """SVG dash pattern; empty: solid."""
    markers: bool = False
    """Draw the points too."""
    halves: Sequence[float] = ()
    """Half of an interval around each y, drawn as a bar; NaN for none. Empty: no bars. For few points only."""


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    marks: Sequence[tuple[float, str]] = (),
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """Curves over a common x axis.

    Args:
        lines: The curves; those without a finite point are left out.
        x_label: What x is.
        y_label: What y is.
        log_y: Logarithmic y axis, where all values are above 0.
        y_range: Lowest and highest y. Default: those of the points, with a margin.
        bounds: What y cannot leave, such as (0, 1) of a share: the axis stays inside.
        marks: x and a word: a vertical line where something began, such as a stage.
        width: Of the drawing, in pixels at its natural size.
        height: Of the drawing.

    Returns:
        An `<svg>` element; empty text where there is nothing to draw.
    """
    drawn = [(line, thin([p for p in line.points if math.isfinite(p[0])])) for line in lines]
    finite = [(x, y) for _, points in drawn for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    log_y = log_y and min(y for _, y in finite) > 0
    x_low, x_high = _widened(min(x for x, _ in finite), max(x for x, _ in finite), 0)
    reached = [y for _, y in finite] + [end for line, _ in drawn for _, bounds in _bars(line) for end in bounds]
    low, high = y_range or _within(_widened(min(reached), max(reached), 0 if log_y else 0.06), bounds)
    if log_y:
        low, high = math.log10(low), math.log10(high)
        low, high = _widened(low, high, 0.05)

    def x_at(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (width - _LEFT - _RIGHT), 1)

    def y_at(y: float) -> float:
        y = math.log10(y) if log_y else y
        return round(height - _BOTTOM - (y - low) / (high - low) * (height - _TOP - _BOTTOM), 1)

    parts = []
    ticks = log_ticks(low, high) if log_y else nice_ticks(low, high)
    for tick in ticks:
        y = y_at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5}" text-anchor="end">{short(tick)}</text>')
    for tick in nice_ticks(x_low, x_high, 6):
        parts.append(
            f'<text class="tick" x="{x_at(tick)}" y="{height - _BOTTOM + 16}" text-anchor="middle">{short(tick)}</text>'
        )
    base = height - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="{_LEFT - 44}" y="12">{escape(y_label)}</text>')
    for x, word in marks:
        # The word stands where there is room for it: beside the line, on the side of the middle.
        side, anchor = (4, "start") if x_at(x) < middle else (-4, "end")
        parts.append(f'<line class="mark" x1="{x_at(x)}" x2="{x_at(x)}" y1="{_TOP}" y2="{base}"/>')
        parts.append(
            f'<text class="tick" x="{x_at(x) + side}" y="{_TOP + 9}" text-anchor="{anchor}">{escape(word)}</text>'
        )
    parts.append(f'<line class="cross" y1="{_TOP}" y2="{base}"/>')
    for line, points in drawn:
        parts += [
            f'<line class="bar" x1="{x_at(x)}" x2="{x_at(x)}" y1="{y_at(bounds[0])}" y2="{y_at(bounds[1])}" '
            f'stroke="{line.colour}"/>'
            for x, bounds in _bars(line)
        ]
        parts += _curve(line, points, x_at, y_at)
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)} over '
        f'{escape(x_label)}" data-x="{escape(x_label)}">{"".join(parts)}</svg>'
    )


def _bars(line: Line) -> list[tuple[float, tuple[float, float]]]:
    """x, and the ends of the interval around y, where there is one."""
    return [
        (x, (y - half, y + half))
        for (x, y), half in zip(line.points, line.halves or [math.nan] * len(line.points), strict=True)
        if math.isfinite(y) and math.isfinite(half)
    ]


def _curve(
    line: Line,
    points: Sequence[tuple[float, float]],
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
) -> list[str]:
    """The path of a curve, its markers, and its values for the tip."""
    places = [(x_at(x), y_at(y), x, y) if math.isfinite(y) else None for x, y in points]
    path, pen = "", "M"
    for place in places:
        if place is None:
            pen = "M"
            continue
        path += f"{pen}{place[0]} {place[1]}"
        pen = "L"
    data = json.dumps([[p[0], p[1], short(p[2]), short(p[3], 4)] for p in places if p is not None])
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    parts = [
        f'<path class="curve" d="{path}" stroke="{line.colour}"{dash} data-name="{escape(line.name)}" '
        f"data-points='{escape(data, quote=True)}'/>"
    ]
    shown = [place for place in places if place is not None]
    if line.markers or len(shown) == 1:
        parts += [f'<circle cx="{p[0]}" cy="{p[1]}" r="2.6" fill="{line.colour}"/>' for p in shown]
    return parts


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float]], *, x_label: str, y_label: str
) -> str:
    """A grid of shares in 0..1, each with its number, from white (0) to a deep green (1); NaN is left empty."""
    cell_width = max(34, min(64, (WIDTH - 70) // max(1, len(columns))))
    cell_height, left, top = 28, 52, 22
    width = left + cell_width * len(columns) + 10
    height = top + cell_height * len(rows) + 40
    parts = []
    for row, (name, values) in enumerate(zip(rows, cells, strict=True)):
        y = top + row * cell_height
        parts.append(f'<text class="tick" x="{left - 7}" y="{y + 18}" text-anchor="end">{escape(name)}</text>')
        for column, value in enumerate(values):
            if not math.isfinite(value):
                continue
            x = left + column * cell_width
            ink = "#fff" if value > 0.55 else "#23303d"
            parts.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{cell_width - 2}" height="{cell_height - 2}" rx="2" '
                f'fill="{shade(value)}"/><text class="cell-text" x="{x + cell_width / 2 - 1}" y="{y + 17.5}" '
                f'text-anchor="middle" fill="{ink}">{value:.2f}</text>'
            )
    for column, name in enumerate(columns):
        centre = left + (column + 0.5) * cell_width - 1
        y = top + cell_height * len(rows) + 13
        parts.append(f'<text class="tick" x="{centre}" y="{y}" text-anchor="middle">{escape(name)}</text>')
    middle = left + cell_width * len(columns) / 2
    parts.append(f'<text class="label" x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="{left - 44}" y="13">{escape(y_label)}</text>')
    label = f"{y_label} by {x_label}"
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def map_picture(values: Sequence[Sequence[float]], largest: float, title: str) -> str:
    """An attention map as a PNG inside the page: white is 0, blue above, red below.

    Args:
        values: Rows of numbers.
        largest: The magnitude that is drawn darkest. The root of the share is shown, so that small ones are seen.
        title: For those who cannot see it.
    """
    scanlines = b""
    for row in values:
        scanlines += b"\0" + b"".join(bytes(_signed_colour(value / largest if largest else 0.0)) for value in row)
    size = struct.pack(">IIBBBBB", len(values[0]), len(values), 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", size)
        + _chunk(b"IDAT", zlib.compress(scanlines, 9))
        + _chunk(b"IEND", b"")
    )
    data = base64.b64encode(png).decode()
    return f'<img class="map" alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _signed_colour(value: float) -> tuple[int, int, int]:
    strength = min(1.0, abs(value)) ** 0.5
    end = (24, 66, 140) if value >= 0 else (176, 44, 38)
    red, green, blue = (round(255 + (channel - 255) * strength) for channel in end)
    return red, green, blue


def shade(value: float) -> str:
    """CSS colour of a share."""
    value = min(1.0, max(0.0, value))
    low, high = (243, 245, 244), (23, 105, 92)
    red, green, blue = (round(a + (b - a) * value) for a, b in zip(low, high, strict=True))
    return f"rgb({red},{green},{blue})"


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: means of as many neighbours as it takes.

    Example:
        >>> thin([(1.0, 2.0), (2.0, 4.0)])
        [(1.0, 2.0), (2.0, 4.0)]
    """
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two bounds.

    Example:
        >>> nice_ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten, whose exponents are given.

    1, 2 and 5 of each power, whole powers where there are many, and equal distances where the axis covers so little
    that none or one of those is on it.

    Example:
        >>> log_ticks(0.36, 0.43)
        [2.3, 2.4, 2.5, 2.6]
    """
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [f * 10.0**p for p in powers for f in factors if low <= math.log10(f * 10.0**p) <= high]
    return ticks if len(ticks) > 2 else nice_ticks(10.0**low, 10.0**high)


def short(value: float, digits: int = 3) -> str:
    """A number in few characters.

    Example:
        >>> short(12000), short(0.25), short(3.14159), short(2500000)
        ('12k', '0.25', '3.14', '2.5M')
    """
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = {"B": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{value / scale:.{digits}g}{unit}"
    return f"{value:.{max(digits, len(str(int(abs(value)))))}g}"


def _widened(low: float, high: float, margin: float) -> tuple[float, float]:
    """Bounds with a margin on either side, and never the same."""
    if low == high:
        gap = abs(low) * 0.1 or 1.0
        return low - gap, high + gap
    return low - (high - low) * margin, high + (high - low) * margin


def _within(ends: tuple[float, float], bounds: tuple[float, float]) -> tuple[float, float]:
    """The ends of an axis, none of them outside the bounds."""
    return max(ends[0], bounds[0]), min(ends[1], bounds[1])
