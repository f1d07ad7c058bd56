import signal

import pytest

from difftune.training.slurm import requeue_if_asked


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A `scontrol` that writes down what it was asked, in a batch job."""
    program, calls = tmp_path / "bin" / "scontrol", tmp_path / "calls"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ ! -e {tmp_path}/broken ] || {{ echo no such job >&2; exit 1; }}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_JOB_NAME", "maths")
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def test_usr1_requeues_the_job(queue):
    assert requeue_if_asked(signal.SIGUSR1)
    assert queue() == ["requeue 41"]


def test_a_task_of_an_array_is_requeued_by_the_number_of_the_array(queue, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue_if_asked(signal.SIGUSR1)
    assert queue() == ["requeue 40_3"]


def test_term_does_not_since_scancel_sends_it_too(queue):
    assert not requeue_if_asked(signal.SIGTERM)
    assert queue() == []


@pytest.mark.parametrize("where", ["no job", "interactive"])
def test_outside_of_a_batch_job_nothing_is_requeued(queue, monkeypatch, where):
    if where == "no job":
        monkeypatch.delenv("SLURM_JOB_ID")
    else:
        monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert not requeue_if_asked(signal.SIGUSR1)
    assert queue() == []


def test_a_failure_says_what_to_do(queue, tmp_path, caplog):
    (tmp_path / "broken").touch()
    assert not requeue_if_asked(signal.SIGUSR1)
    assert "job 41 is NOT in the queue again (no such job): submit it once more" in caplog.text
