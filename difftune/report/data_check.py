"""One picture of a data check: how long the documents are, what is kept, how their traces are delimited."""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE_NAME = "data_check.json"
"""The file in a run folder that a check writes."""


def draw_data_check(path: Path) -> Path | None:
    """Draw a check beside its file, as PNG, a row a stage.

    Args:
        path: The `data_check.json`.

    Returns:
        The picture; None, with a word in the log, where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no picture of the check: it needs matplotlib (pip install 'difftune[report]')")
        return None
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    figure = Figure(figsize=(11, 3.4 * len(stages)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(stages), 2, squeeze=False, width_ratios=[3, 2])
    for stage, (left, right) in zip(stages, axes, strict=True):
        _draw_lengths(left, stage)
        _draw_rows(right, stage)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture


def _draw_lengths(axis: Any, stage: dict[str, Any]) -> None:
    edges, counts = stage["histogram"]["edges"], stage["histogram"]["counts"]
    axis.stairs(counts, edges, fill=True, color="#4c78a8")
    axis.axvline(stage["seq_len"], color="#e45756", label=f"seq_len {stage['seq_len']:,}")
    axis.set(title=f"stage {stage['stage']}", xlabel="tokens of a document", ylabel="documents")
    axis.legend(frameon=False)


def _draw_rows(axis: Any, stage: dict[str, Any]) -> None:
    statistics = stage["statistics"]
    bars = {"learned": statistics["kept"], **statistics["dropped"]}
    for source in stage["sources"]:
        for kind in ("duplicates", "unfinished", "known_wrong"):
            if source[kind]:
                bars[kind.replace("_", " ")] = bars.get(kind.replace("_", " "), 0) + source[kind]
        for name, count in source["contaminated"].items():
            bars[f"in test set {name}"] = bars.get(f"in test set {name}", 0) + count
    colours = ["#54a24b", *["#e45756"] * (len(bars) - 1)]
    container = axis.barh(list(bars), list(bars.values()), color=colours)
    axis.bar_label(container, fmt="{:,.0f}", padding=3)
    axis.invert_yaxis()
    axis.set(title="rows", xlim=(0, 1.2 * max(1, *bars.values())))
