import pytest

from benchmarks import sharded_evaluation


def test_a_small_run_prints_the_time_of_all_ways(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--prompts", "16", "--new-tokens", "6", "--hidden-size", "32", "--layers", "1"]
    sharded_evaluation.main([*size, "--rounds", "1"])
    printed = capsys.readouterr().out
    assert all(f"| {way} " in printed for way in ("sharded", "by layers", "whole")) and "times sharded" in printed


def test_unequal_shares_are_refused() -> None:
    with pytest.raises(SystemExit, match="must be a multiple of 16"):
        sharded_evaluation.main(["--prompts", "17"])
