"""Whether processes reach one another: an all-reduce among the ranks of torchrun, or among two started here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT_S = 60
"""Seconds that ranks wait for one another."""


@dataclass(frozen=True)
class Reached:
    """What became of an all-reduce."""

    backend: str
    works: bool
    text: str


def reach_ranks(*, use_cuda: bool) -> list[Reached]:
    """Sum a number over ranks.

    Args:
        use_cuda: Over NCCL too, where there is a GPU for each rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backends = ["nccl"] if use_cuda else ["gloo"]
        return [_of_torchrun(backend) for backend in backends]
    gpus = torch.cuda.device_count() if use_cuda else 0
    backends = ["gloo", *(["nccl"] if gpus > 1 else [])]
    return [_two_processes(backend) for backend in backends]


def _of_torchrun(backend: str) -> Reached:
    started = time.perf_counter()
    try:
        total = _sum_of_ranks(backend, "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except (RuntimeError, ValueError) as error:
        return Reached(backend, False, f"the ranks of torchrun do not reach one another: {_first_line(error)}")
    seconds = time.perf_counter() - started
    return Reached(backend, True, f"all {total} ranks of torchrun reached one another in {seconds:.1f} s")


def _two_processes(backend: str) -> Reached:
    started = time.perf_counter()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The launcher's variables would be taken for those of these ranks.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, backend, str(port), str(rank)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = []
    for process in processes:
        try:
            _, error = process.communicate(timeout=2 * TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            _, error = process.communicate()
            error += f"\nno answer in {2 * TIMEOUT_S} s"
        if process.returncode:
            lines = error.strip().splitlines()
            errors.append(lines[-1] if lines else f"exit code {process.returncode}")
    if errors:
        return Reached(backend, False, f"two processes of this machine do not reach one another: {errors[0]}")
    seconds = time.perf_counter() - started
    return Reached(
        backend, True, f"two processes of this machine reached one another in {seconds:.1f} s, start included"
    )


def _sum_of_ranks(backend: str, method: str, rank: int, world_size: int) -> int:
    """How many ranks there are, counted by themselves."""
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group(
        backend, init_method=method, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S)
    )
    try:
        count = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(count)
        found = int(count.item())
    finally:
        dist.destroy_process_group()
    if found != world_size:
        raise RuntimeError(f"{found} of {world_size} ranks were counted")
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    _sum_of_ranks(sys.argv[1], f"tcp://127.0.0.1:{sys.argv[2]}", int(sys.argv[3]), 2)
