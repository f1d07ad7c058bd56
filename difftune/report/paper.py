"""The paper's figures as data, and as charts in the colours of ours."""

from __future__ import annotations

import json
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from difftune.report.charts import Line, heat_map, line_chart
from difftune.report.curves import figure, grid, legend_item, table_html
from difftune.report.style import COLOURS

OURS = {"diff": "diff_v1", "transformer": "softmax"}
"""Our kinds of attention for the paper's two models."""

_NAMES = {"diff": "DIFF", "transformer": "Transformer"}
_ORDERS = {
    ("trec", "random"): "fig7a_trec_random_order_seeds",
    ("trec", "alternating"): "fig7b_trec_alternate_by_class_seeds",
    ("trec_fine", "random"): "fig11b_trecfine_seeds",
    ("banking77", "random"): "fig11c_banking77_seeds",
    ("clinic150", "random"): "fig11d_clinic150_seeds",
}
_MANY_SHOT = {
    "trec": "fig6a_trec",
    "trec_fine": "fig6b_trecfine",
    "banking77": "fig6c_banking77",
    "clinic150": "fig6d_clinic150",
}
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


def paper_orders(labelled_set: str, order: str) -> list[list[str]]:
    """Model, number of orders, mean, best, worst and margin for a set and a kind of order; none if it has none."""
    name = _ORDERS.get((labelled_set, order))
    if name is None:
        return []
    rows = []
    for model in _NAMES:
        values = [value / 100 for _, value in paper_figures()[name][model]]
        figures = (sum(values) / len(values), max(values), min(values), max(values) - min(values))
        rows.append([_NAMES[model], str(len(values)), *(f"{value:.3f}" for value in figures)])
    return rows


def paper_many_shot(labelled_set: str) -> str:
    """The paper's many-shot curves of a set as a chart; empty for a set that it does not have."""
    return _curve(_MANY_SHOT[labelled_set]) if labelled_set in _MANY_SHOT else ""


def paper_harness() -> tuple[list[str], dict[str, list[float | None]]]:
    """Tasks of the zero-shot tables as the harness names them, and shares by model, the mean last; None: no figure."""
    data = paper_figures()["table1_and_table8_harness"]
    shares = {}
    for model, values in data["models"].items():
        mean = None if None in values else sum(values) / len(values)
        shares[model] = [None if value is None else value / 100 for value in [*values, mean]]
    return data["tasks"], shares


def paper_charts() -> str:
    """All curves, and the heat maps of the retrieval, with their source."""
    data = paper_figures()
    figures = [_curve(name) for name in _CURVES]
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
    legend = "".join(legend_item(_NAMES[model], COLOURS[OURS[model]]) for model in _NAMES)
    return (
        f"<details><summary>{len(figures)} charts and {_tables().count('<table>')} tables</summary>"
        f'<p>{escape(data["source"])} {note}</p><div class="legend">{legend}</div>{grid(figures)}{_tables()}</details>'
    )


def _curve(name: str) -> str:
    title, x, y = _CURVES[name]
    return figure(line_chart(paper_lines(name), x_label=x, y_label=y), title)


def _tables() -> str:
    """What the paper has as single figures: zero-shot, maths and hallucination by set, needles at 4K, orders."""
    data = paper_figures()
    tasks, shares = paper_harness()
    rows = [[model, *("-" if v is None else f"{v:.3f}" for v in values)] for model, values in shares.items()]
    heads = ["", *tasks, "mean"]
    parts = [f"<h3>lm-evaluation-harness, zero-shot where not said (Tables 1 and 8)</h3>{table_html(heads, rows)}"]
    for name, title in (
        ("fig10_math_by_set", "Maths by set after stage 2 (Fig. 10), accuracy"),
        ("section_3_6_hallucination", "Share of texts free of hallucination, judged by GPT-4o (section 3.6)"),
    ):
        rows = [[_NAMES[m], *(f"{value:.3g}" for value in data[name][m])] for m in _NAMES]
        parts.append(f"<h3>{title}</h3>{table_html(['', *data[name]['sets']], rows)}")
    needles = data["table2_needles_4k"]
    heads = ["needles, queried", *(", ".join(map(str, pair)) for pair in needles["needles_and_queries"])]
    rows = [[_NAMES[m], *(f"{value:.2f}" for value in needles[m])] for m in _NAMES]
    parts.append(f"<h3>Retrieval at 4K (Table 2), accuracy</h3>{table_html(heads, rows)}")
    rows = [[", ".join(which), *row] for which in _ORDERS for row in paper_orders(*which)]
    heads = ["set, order", "", "orders", "mean", "best", "worst", "margin"]
    parts.append(f"<h3>Orders of the demonstrations (Fig. 7 and 11), accuracy</h3>{table_html(heads, rows)}")
    return "".join(parts)
