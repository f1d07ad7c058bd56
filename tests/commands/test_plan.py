"""The command: its options, and what its exit code says."""

import json

import pytest

from difftune.cli import main

SMALL = [
    "plan",
    "tokenizer=digits",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "data.seq_len=64",
]


def test_the_exit_code_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--gpus", "2", "--gpu-memory", "24", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["machine"]["devices"] == 2 and found["available"] == 22 * 2**30
    # Two GiB are set aside, which leaves nothing.
    assert main([*SMALL, "--gpu-memory=2.0001"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus must be a whole number between 1 and 1000000, got 0"),
        (["--gpus", "many"], "--gpus must be a number, got 'many'"),
        (["--gpu-memory", "-1"], "--gpu-memory must be above 0 and at most 1000000 GiB, got -1"),
        (["--mfu", "40"], "--mfu must be above 0 and at most 1, got 40"),
        (["--gpu", "H1000"], "--gpu H1000 is unknown: choose one of"),
    ],
)
def test_options_that_are_wrong_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_needs_a_recipe_or_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "plan needs a recipe" in capsys.readouterr().err
