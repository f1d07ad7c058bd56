"""Ranks that reach one another, and some that do not."""

import pytest

from difftune.commands import doctor_ranks
from difftune.commands.doctor_ranks import reach_ranks


def test_two_processes_reach_one_another_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    (reached,) = reach_ranks(use_cuda=False)
    assert reached.works and reached.backend == "gloo" and "reached one another" in reached.text


def test_processes_that_die_are_reported_with_their_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_ranks, "__name__", "difftune.no_such_module")
    found = doctor_ranks._two_processes("gloo")
    assert not found.works and "no_such_module" in found.text


def test_the_ranks_of_torchrun_are_counted_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {**variables, "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, value)
    (reached,) = reach_ranks(use_cuda=False)
    assert reached.works and "all 1 ranks of torchrun" in reached.text
    monkeypatch.setattr(doctor_ranks, "TIMEOUT_S", 1)
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    (reached,) = reach_ranks(use_cuda=False)
    assert not reached.works and "do not reach one another" in reached.text
