"""Means over several tasks."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from difftune.evaluation.task import Result, Task


def mean_accuracy(tasks: Sequence[Task[Any]], results: Mapping[str, Result]) -> dict[str, float]:
    """`eval/mean/accuracy`: the unweighted mean over the tasks of the kind `math`, as the paper has it for its eight.

    Args:
        tasks: What was to be evaluated.
        results: What came out, by task name.

    Returns:
        The one metric; none at all with fewer than two such tasks, or where one of them is not complete.

    Source:
        Ye et al., "Differential Transformer", arXiv:2410.05258, Fig. 10.
    """
    names = [task.name for task in tasks if task.kind == "math"]
    if len(names) < 2 or not all(name in results and results[name].complete for name in names):
        return {}
    return {"eval/mean/accuracy": fmean(results[name].metrics()["accuracy"] for name in names)}
