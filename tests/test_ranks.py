import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.processes import is_gone
from tests.ranks import run_group, run_ranks


def main(arguments):
    """The worker of the tests below."""
    rank, (what, *folder) = int(os.environ["RANK"]), arguments
    print(f"I am {rank} of {os.environ['WORLD_SIZE']}", flush=True)
    if what == "end":
        return
    told = Path(*folder) / "told"
    if rank == 1:
        while not told.exists():
            time.sleep(0.01)
        raise RuntimeError("this rank is broken")
    told.touch()
    time.sleep(3600)


def test_every_rank_runs_with_the_environment_of_torchrun():
    done = run_ranks("tests.test_ranks", "end", ranks=3)
    assert all(f"--- rank {rank}\nI am {rank} of 3" in done.output for rank in range(3))


def test_a_rank_that_fails_ends_the_others_and_shows_its_error(tmp_path):
    # Were the other one not ended, it would be a hang.
    with pytest.raises(AssertionError, match=r"exit code 1(.|\n)*I am 0(.|\n)*RuntimeError: this rank is broken"):
        run_ranks("tests.test_ranks", "fail", str(tmp_path), env={"DIFFTUNE_TEST_GRACE_S": "0.5"})


def test_a_hang_is_killed_with_all_it_started(tmp_path):
    program = (
        "import json, os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
        f"json.dump(child.pid, open({str(tmp_path / 'pid')!r}, 'w'))\n"
        "print('started', flush=True)\ntime.sleep(3600)\n"
    )
    # As long as an interpreter may take to start.
    with pytest.raises(AssertionError, match=r"hung, nothing was written for 5 s(.|\n)*started"):
        run_group([sys.executable, "-c", program], timeout_s=5)
    child = json.loads((tmp_path / "pid").read_text())
    assert is_gone(child)
