"""The paper's figures as data, and as charts in the colours of ours."""

from __future__ import annotations

import json
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from difftune.report.charts import Line, heat_map, line_chart
from difftune.report.curves import figure, grid
from difftune.report.style import COLOURS

OURS = {"diff": "diff_v1", "transformer": "softmax"}
"""Our kinds of attention for the paper's two models."""

_NAMES = {"diff": "DIFF", "transformer": "Transformer"}
_CURVES = {
    "fig3a_loss_vs_params_B": ("Loss by size (Fig. 3a)", "billions of parameters", "loss"),
    "fig3b_loss_vs_tokens_B": ("Loss by tokens (Fig. 3b)", "billions of tokens", "loss"),
    "fig6a_trec": ("Many-shot TREC (Fig. 6a)", "demonstrations", "accuracy, %"),
    "fig6b_trecfine": ("Many-shot TREC-fine (Fig. 6b)", "demonstrations", "accuracy, %"),
    "fig6c_banking77": ("Many-shot Banking-77 (Fig. 6c)", "demonstrations", "accuracy, %"),
    "fig6d_clinic150": ("Many-shot Clinic-150 (Fig. 6d)", "demonstrations", "accuracy, %"),
    "fig8_hellaswag_vs_bits": ("HellaSwag by bits of the logits (Fig. 8)", "bits", "accuracy, %"),
    "fig9_math_avg_vs_tokens_B": ("Maths by tokens of stage 1 (Fig. 9)", "billions of tokens", "accuracy, %"),
}


@cache
def paper_figures() -> dict[str, Any]:
    """The figures by name; `source` says where they are from."""
    text = resources.files("difftune.report").joinpath("paper_figures.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def paper_lines(name: str) -> list[Line]:
    """The two curves of a figure."""
    data = paper_figures()[name]
    return [
        Line(
            f"paper, {_NAMES[model]}",
            [(x, y) for x, y in data[model]],
            COLOURS[OURS[model]],
            markers=len(data[model]) < 12,
        )
        for model in ("diff", "transformer")
    ]


def paper_charts() -> str:
    """All curves, and the heat maps of the retrieval, with their source."""
    data = paper_figures()
    figures = [
        figure(line_chart(paper_lines(name), x_label=x, y_label=y), title) for name, (title, x, y) in _CURVES.items()
    ]
    needle = data["fig5_needle_8_of_which_1"]
    for model in ("diff", "transformer"):
        picture = heat_map(
            [f"{depth:.0%}" for depth in needle["depths"]],
            [f"{length // 1024}K" for length in needle["lengths"]],
            needle[model],
            x_label="length in tokens",
            y_label="depth",
        )
        figures.append(figure(picture, f"Retrieval, 1 of 8 needles, {_NAMES[model]} (Fig. 5)"))
    note = "Models of another size and data than the runs above: shapes compare, levels do not."
    return f"<p>{escape(data['source'])} {note}</p>{grid(figures)}"
