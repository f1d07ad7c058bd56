"""What every benchmark shares: the machine in words, interleaved timing, children, one table, refusal when wrong."""

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_RESULT = "benchmark result: "


def machine(threads: int, *packages: str) -> str:
    """The hardware, threads and versions that a table was measured with."""
    parts = [f"{_cpu_name()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB, {threads} threads", platform.system()]
    parts.append(f"Python {platform.python_version()}")
    for package in ("torch", *packages):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    return ", ".join(parts)


def require_close(name: str, actual: Any, expected: Any, tolerance: float) -> None:
    """Leave with an error, before any table, unless two tensors agree to ``tolerance * max|expected|``."""
    difference = (actual - expected).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    # Written so that NaN fails too.
    if not difference <= allowed:
        raise SystemExit(
            f"{name} is wrong: differs by {difference:.3e} from its reference, allowed {allowed:.3e}. "
            "No speed is printed for a wrong result; run the tests."
        )


def in_one_line(error: BaseException) -> str:
    """Kind and first line of an error, for a table that goes on without what failed."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, in turn, so that a slow spell of the machine hits all alike.

    Every call runs once untimed first.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def cuda_interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, round_s: float = 0.05
) -> dict[str, list[float]]:
    """As :func:`interleaved`, by CUDA's events: each call as often in a row as fills ``round_s``."""
    import torch

    def timed(call: Callable[[], Any], times: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    # Compiled and tuned first, then timed once for the number of repetitions.
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(200, int(round_s / max(timed(call, 1), 1e-5))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call, repeats[name]))
    return seconds


def ratio(amount: float, measured: float) -> float:
    """``amount / measured``; NaN where a clock or a counter was too coarse to measure anything."""
    return amount / measured if measured > 0 else math.nan


def ratios(baseline: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Baseline over ours within each round: above 1 where ours is faster (or smaller)."""
    return [ratio(b, o) for b, o in zip(baseline, ours, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range, as ``1.23 (1.10-1.40)``."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rendered = [f"| {' | '.join(cells)} |" for cells in padded]
    rendered.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(rendered)


def run_child(module: str, arguments: Sequence[str], threads: int, timeout_s: float = 900) -> dict[str, Any]:
    """Run ``python -m module arguments`` in a fresh process and return what it gave to :func:`report`."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    results = [line[len(_RESULT) :] for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not results:
        raise SystemExit(f"{' '.join([module, *arguments])} failed with code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(results[-1])


def report(**values: Any) -> None:
    """Give values from a child back to the process that ran it."""
    print(_RESULT + json.dumps(values), flush=True)


class PeakMemory:
    """Peak resident memory of this process from here on, in GiB, beyond what it held before.

    Linux counts the peak of the address space (``VmHWM``) and lets it be reset; elsewhere the peak of the
    whole process is all there is, which this class then uses, so that ``above_start`` may be too small.
    """

    def __init__(self) -> None:
        """Reset the counter where that is possible."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.start_gib = _status_gib("VmRSS")

    @property
    def total_gib(self) -> float:
        """Peak of the whole process."""
        return _status_gib("VmHWM")

    @property
    def above_start_gib(self) -> float:
        """Peak beyond what was held when this object was made."""
        return self.total_gib - self.start_gib


def _status_gib(field: str) -> float:
    """A memory field of this process."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def git_commit() -> str:
    """Commit of the checkout, with "+" where files differ from it; "unknown" outside one."""
    command = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run([*command, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.strip() else "")


def environment(*packages: str) -> dict[str, str]:
    """Device, versions and commit, for a file of results."""
    import torch

    cuda = torch.cuda.is_available()
    found = {"device": torch.cuda.get_device_name() if cuda else _cpu_name(), "python": platform.python_version()}
    if cuda:
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in ("torch", "triton", *packages):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"commit": git_commit()}


def _cpu_name() -> str:
    """Model of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
