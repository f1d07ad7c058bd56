"""Several ranks of one worker, as tests start them: imports paid once, a hang is ended, every rank's output shown.

A worker is a module with ``main(arguments)``. Its imports run once, in a process that then forks the ranks, each with
the environment that torchrun would give it. Many scenarios go into one worker, which writes what a test judges::

    run_ranks("tests.training.fsdp_ranks", str(folder), ranks=2)
"""

import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300.0
# What the ranks that are left get when one has failed, before they are killed.
_GRACE_S = float(os.environ.get("DIFFTUNE_TEST_GRACE_S", 60))


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    returncode: int
    """0, or that of the first rank to fail; a rank ended by a signal counts 128 + its number."""
    output: str
    """Standard output and error of all ranks, each under its heading."""


def run_ranks(
    module: str,
    *arguments: str,
    ranks: int = 2,
    timeout_s: float = TIMEOUT_S,
    check: bool = True,
    env: dict[str, str] | None = None,
) -> Finished:
    """Run ``module.main(arguments)`` on some ranks, and end them all when one fails or the time is over.

    Args:
        module: Importable from the root of the project.
        arguments: What ``main`` gets, a list of texts.
        ranks: How many.
        timeout_s: Seconds without a word from any rank after which they hang; then the whole process group is killed.
        check: Whether a rank that fails fails the test.
        env: Variables to add.
    """
    with TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "tests.ranks", module, str(ranks), logs, *arguments]
        code, output = _run(command, timeout_s, env, Path(logs))
        parts = [f"--- rank {rank}\n{_tail(Path(logs) / str(rank))}" for rank in range(ranks)]
    return _judged(code, "\n".join([*parts, output]), f"{ranks} ranks of {module}", timeout_s, check)


def run_group(
    command: list[str], *, timeout_s: float = TIMEOUT_S, check: bool = True, env: dict[str, str] | None = None
) -> Finished:
    """Run a command and whatever it starts; when it hangs, all of it is killed and the test fails.

    Args:
        command: Program and arguments, run in the root of the project.
        timeout_s: Seconds without output after which it hangs.
        check: Whether another exit code than 0 fails the test.
        env: Variables to add.
    """
    code, output = _run(command, timeout_s, env)
    return _judged(code, output, " ".join(command), timeout_s, check)


def free_port() -> int:
    """A port that nobody listens on now.

    Not one of those that a system gives to whoever asks for any: until the ranks listen, it would give it again.
    """
    while True:
        # Not of the seeded generator: the tests of another process draw from the same.
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def _run(
    command: list[str], timeout_s: float, env: dict[str, str] | None, logs: Path | None = None
) -> tuple[int | None, str]:
    """Exit code, None if it hung, and output. A slow machine is no hang: whoever writes is alive."""
    with TemporaryDirectory() as folder, (Path(folder) / "output").open("w+b") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **(env or {})},
        )
        code: int | None = None
        written, deadline = -1, 0.0
        try:
            while (code := process.poll()) is None:
                files = [Path(output.name), *(logs.iterdir() if logs else ())]
                size = sum(file.stat().st_size for file in files)
                if size != written:
                    written, deadline = size, time.monotonic() + timeout_s
                elif time.monotonic() > deadline:
                    # Where every thread stands, by faulthandler.
                    _signal_group(process.pid, signal.SIGABRT)
                    time.sleep(1)
                    break
                time.sleep(0.05)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
        return code, _tail(Path(output.name))


def _judged(code: int | None, output: str, what: str, timeout_s: float, check: bool) -> Finished:
    assert code is not None, f"{what}: hung, nothing was written for {timeout_s:g} s\n{output}"
    assert not check or code == 0, f"{what}: exit code {code}\n{output}"
    return Finished(code, output)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _tail(path: Path, size: int = 20_000) -> str:
    return path.read_text(errors="replace")[-size:] if path.is_file() else ""


def become_rank(module: str, rank: int, ranks: int, port: int, log: Path, arguments: list[str]) -> None:
    """The rest of the life of a forked process."""
    code = 1
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
        if "lightning.pytorch" in sys.modules:
            # It read the rank when it was imported, before the fork.
            from lightning.pytorch.utilities import rank_zero_only

            rank_zero_only.rank = rank
        sys.modules[module].main(arguments)  # type: ignore[attr-defined]  # that is what makes it a worker
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # No handler of the launcher's may run in a rank.
        os._exit(code)


def _supervise(module: str, ranks: int, logs: Path, arguments: list[str]) -> int:
    """Fork the ranks and wait for them; when one fails the others get a moment, as from torchrun, and are killed."""
    import torch

    torch.set_num_threads(1)
    importlib.import_module(module)
    port = free_port()
    alive = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            become_rank(module, rank, ranks, port, logs / str(rank), arguments)
        alive.add(child)
    failed, deadline = 0, float("inf")
    while alive:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            if time.monotonic() > deadline:
                for other in alive:
                    os.kill(other, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.05)
            continue
        alive.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed, deadline = code if code > 0 else 128 - code, time.monotonic() + _GRACE_S
    return failed


if __name__ == "__main__":
    name, count, folder, *rest = sys.argv[1:]
    sys.exit(_supervise(name, int(count), Path(folder), rest))
