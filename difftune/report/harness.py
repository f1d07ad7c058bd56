"""Tasks of the lm-evaluation-harness that the paper has too, beside its Tables 1 and 8."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from difftune.report.compare import Group
from difftune.report.curves import table_html
from difftune.report.paper import paper_harness
from difftune.report.probes import group_estimate, group_title

_METRICS = ("acc", "acc_norm")


def harness_section(groups: Sequence[Group]) -> str:
    """A table for each task of the kind `lm_eval`: our recipes by metric, then the paper's models.

    Args:
        groups: The recipes.

    Returns:
        HTML; empty where no run measured any of the paper's seven tasks.
    """
    tasks, paper = paper_harness()
    parts = []
    for name in _measured(groups, tasks):
        rows = []
        for group in groups:
            for metric in _METRICS:
                found = [group_estimate(group, f"eval/{name}/{task}_{metric}") for task in tasks]
                if not any(found):
                    continue
                means = [estimate.mean for estimate in found if estimate is not None]
                mean = f"{sum(means) / len(means):.3f}" if len(means) == len(tasks) else "-"
                cells = ["-" if estimate is None else str(estimate) for estimate in found]
                rows.append([f"{group_title(group)}, {metric}", *cells, mean])
        rows += [
            [f"paper, {model}", *("-" if share is None else f"{share:.3f}" for share in shares)]
            for model, shares in paper.items()
        ]
        table = table_html(["accuracy", *tasks, "mean"], rows, paper=len(paper))
        parts.append(f"<h3>{escape(name)}</h3>{table}")
    if not parts:
        return ""
    note = (
        "The paper's Tables 1 and 8: 3B models, zero-shot where not said, tokens of their pretraining. It does not say "
        "which of acc and acc_norm it has for a task. Other tasks of the harness are among the metrics above."
    )
    return f"<p>{note}</p>{''.join(parts)}"


def _measured(groups: Sequence[Group], tasks: Sequence[str]) -> list[str]:
    """Names of our tasks that have a figure of some of the harness's."""
    endings = [f"/{task}_{metric}" for task in tasks for metric in _METRICS]
    found = {
        name.removeprefix("eval/").removesuffix(ending): None
        for group in groups
        for run in group.runs
        for name in run.series
        for ending in endings
        if name.startswith("eval/") and name.endswith(ending)
    }
    return list(found)
