from types import SimpleNamespace

import pytest

from benchmarks import evaluation_share


def test_a_small_run_prints_the_share_of_every_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_share, "LIMIT", 0.0)
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "evaluation.max_new_tokens=4", "data.seq_len=64"]
    assert evaluation_share.main(["--steps", "6", "--threads", "1", *small]) == 1, "no share is under 0"
    printed = capsys.readouterr().out
    assert (
        "| answers | 600 x " in printed and "| traces " in printed and "5 x " in printed and "200 problems" in printed
    )
    assert printed.count("%") == 3 + 2 and "under 0% are required" in printed


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"before": True, "every_fraction": 0.25}, 5),
        ({"before": False, "every_fraction": 0.25}, 4),
        ({"before": True, "every_n_steps": 30}, 5),
        ({"before": False}, 1),
    ],
)
def test_evaluations_of_a_stage_are_counted(settings: dict[str, object], count: int) -> None:
    options = {"at_end": True, "every_n_tokens": None, "every_n_steps": None, "every_fraction": None, **settings}
    assert evaluation_share._evaluations(SimpleNamespace(**options), 100) == count


@pytest.mark.parametrize(
    ("evaluation_s", "training_s", "missed"),
    [(5.0, 345.0, False), (9.9, 90.1, False), (10.0, 90.0, True), (0, 0, True)],
)
def test_a_tenth_of_the_time_is_too_much(evaluation_s: float, training_s: float, missed: bool) -> None:
    said = evaluation_share.missed_limit(evaluation_s, training_s)
    assert bool(said) == missed
    if evaluation_s:
        assert not missed or said == "scheduled evaluation takes 10.0% of the time, under 10% are required"
