"""A few rounds of the campaign of faults; `make test-faults` does fifty."""

import sys

from tests.ranks import run_group


def test_a_training_that_is_hit_at_random_loses_nothing():
    command = [sys.executable, "-m", "tests.faults", "--rounds", "2", "--seed", "5", "--steps", "20"]
    # A round says nothing before it has ended.
    result = run_group(command, timeout_s=1200)
    assert "2 rounds in 1 trainings" in result.output and "losses: 0" in result.output
