from types import SimpleNamespace

import pytest

from difftune.evaluation.early_stop import Patience


def trainer(step: int = 1) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, should_stop=False, is_global_zero=True)


def steps_until_stop(patience: Patience, values: list[float]) -> int | None:
    """Which evaluation ended the training, counted from 1; the first is before the first step."""
    for count, value in enumerate(values, 1):
        one = trainer(count - 1)
        patience.on_evaluation(one, {"eval/a/accuracy": value, "eval/b/accuracy": 9.0})
        if one.should_stop:
            return count
    return None


@pytest.mark.parametrize(
    ("mode", "values", "end"),
    [
        ("max", [0.1, 0.2, 0.2, 0.3, 0.3, 0.2], 6),
        ("max", [0.1, 0.2, 0.3, 0.4], None),
        ("min", [3.0, 2.0, 2.5, 1.9, 1.9, 2.0], 6),
        ("max", [0.1, float("nan"), float("nan"), 0.2], None),
    ],
)
def test_training_ends_after_so_many_evaluations_in_vain(mode: str, values: list[float], end: int | None) -> None:
    assert steps_until_stop(Patience("eval/a/accuracy", mode, 2), values) == end


def test_an_evaluation_without_the_metric_does_not_count() -> None:
    patience = Patience("eval/a/accuracy", "max", 1)
    for metrics in ({"eval/a/accuracy": 0.5}, {}, {"eval/b/accuracy": 0.1}):
        one = trainer()
        patience.on_evaluation(one, metrics)
        assert not one.should_stop


def test_the_count_survives_a_checkpoint() -> None:
    first = Patience("eval/a/accuracy", "max", 2)
    steps_until_stop(first, [0.5, 0.4])
    second = Patience("eval/a/accuracy", "max", 2)
    second.load_state_dict(first.state_dict())
    one = trainer()
    second.on_evaluation(one, {"eval/a/accuracy": 0.5})
    assert one.should_stop


def test_no_patience_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="patience must be at least 1 evaluation, got 0"):
        Patience("eval/a/accuracy", "max", 0)
