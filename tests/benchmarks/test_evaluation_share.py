from types import SimpleNamespace

import pytest

from benchmarks import evaluation_share


def test_a_small_run_prints_the_share_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "evaluation.max_new_tokens=4", "data.seq_len=64"]
    evaluation_share.main(["--steps", "6", "--threads", "1", *small])
    printed = capsys.readouterr().out
    assert (
        "| answers | 600 x " in printed and "| traces " in printed and "5 x " in printed and "200 problems" in printed
    )
    assert printed.count("%") == 3


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
