import sys
from contextlib import contextmanager
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from difftune import rank_errors
from difftune.rank_errors import is_told_by_first
from tests.ranks import run_group


def test_an_error_of_all_processes_is_printed_once(tmp_path):
    program = tmp_path / "program.py"
    # However unequally fast the two start.
    program.write_text(
        "import sys\nfrom datetime import timedelta\nfrom difftune import cli, rank_errors\n"
        "rank_errors._PATIENCE = timedelta(seconds=200)\n"
        "sys.exit(cli.main(['fit', 'trainer.max_stepz=3']))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    output = run_group(command, check=False, env={"PYTHONPATH": "."}).output
    assert output.count("difftune: error: ") == 1


@pytest.fixture
def become(monkeypatch):
    """Has this process be a rank of a run of torchrun, whose store is there."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    yield lambda rank: monkeypatch.setenv("RANK", str(rank))
    del store


@contextmanager
def impatient(monkeypatch):
    """Where nobody answers, however long one waits."""
    with monkeypatch.context() as patch:
        patch.setattr(rank_errors, "_PATIENCE", timedelta(seconds=0.2))
        yield


def test_an_error_is_compared_with_that_of_the_first(become, monkeypatch):
    become(1)
    with impatient(monkeypatch):
        assert not is_told_by_first(ValueError("x")), "the first has none, or not yet"
    become(0)
    assert not is_told_by_first(ValueError("x"))
    become(1)
    assert is_told_by_first(ValueError("x"))
    assert not is_told_by_first(ValueError("y"))
    assert not is_told_by_first(TypeError("x"))


def test_a_first_process_that_cannot_be_asked_hides_nothing(become, monkeypatch):
    become(1)
    monkeypatch.setenv("MASTER_PORT", "1")
    with impatient(monkeypatch):
        assert not is_told_by_first(ValueError("x"))


def test_a_process_without_torchrun_says_its_errors(become, monkeypatch):
    become(0)
    assert not is_told_by_first(ValueError("x"))
    become(1)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert not is_told_by_first(ValueError("x"))
