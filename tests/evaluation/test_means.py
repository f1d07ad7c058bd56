from dataclasses import dataclass

import pytest

from difftune.evaluation.means import mean_accuracy


@dataclass
class Named:
    name: str
    kind: str = "math"


@dataclass
class Figures:
    accuracy: float
    complete: bool = True

    def metrics(self) -> dict[str, float]:
        return {"accuracy": self.accuracy}


def test_the_mean_is_over_sets_and_not_over_problems() -> None:
    tasks = [Named("a"), Named("b"), Named("c", "needle")]
    results = {"a": Figures(0.5), "b": Figures(0.1), "c": Figures(1.0)}
    assert mean_accuracy(tasks, results) == {"eval/mean/accuracy": pytest.approx(0.3)}


def test_there_is_no_mean_of_one_set_or_of_sets_that_are_not_complete() -> None:
    assert mean_accuracy([Named("a")], {"a": Figures(0.5)}) == {}
    assert mean_accuracy([Named("a"), Named("b")], {"a": Figures(0.5), "b": Figures(0.1, complete=False)}) == {}
    assert mean_accuracy([Named("a"), Named("b")], {"a": Figures(0.5)}) == {}
