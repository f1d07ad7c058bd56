"""The picture of an attention-noise result: shares by depth, and the maps A1, A2 and their difference of one head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAPS = {"first": "A1", "second": "A2", "difference": "A1 - lambda A2"}


def draw_attention(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """A row a model: attention to answer and noise by depth, then the maps of the head that was kept.

    The colour of a map shows the root of the share, so that small ones are seen: blue above 0, red below.

    Args:
        results: Figures of a task of the kind `attention_noise`, as in results.json, by label.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 3.4 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 4, squeeze=False)
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    for axes, (label, result) in zip(grid, results.items(), strict=True):
        _draw_shares(axes[0], label, result)
        maps = result.get("maps") or {}
        present = [name for name in _MAPS if name in maps]
        for place, panel in enumerate(axes[1:]):
            if place >= len(present):
                panel.set_visible(False)
                continue
            name = present[place]
            values = [[_sign(value) * float(norm(abs(value))) for value in row] for row in maps[name]]
            panel.imshow(values, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
            title = _MAPS[name] if len(present) > 1 else "A"
            panel.set_title(f"{title}, layer {maps['layer']}, head {maps['head']}", fontsize=10)
            panel.set_xlabel("key (answer: " + ", ".join(map(str, maps["answer"])) + ")")
            panel.set_ylabel("query")
    return figure


def _draw_shares(axes: Any, label: str, result: Mapping[str, Any]) -> None:
    depths = sorted(int(found[1]) for name in result if (found := re.fullmatch(r"answer_depth_(\d+)", name)))
    for name, colour in (("answer", "#0072b2"), ("noise", "#999999")):
        axes.plot(
            depths, [result[f"{name}_depth_{depth:03d}"] for depth in depths], marker="o", color=colour, label=name
        )
    axes.set_title(label, fontsize=10)
    axes.set_xlabel("depth of the answer, %")
    axes.set_ylabel("share of the attention")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()


def _sign(value: float) -> int:
    return -1 if value < 0 else 1
