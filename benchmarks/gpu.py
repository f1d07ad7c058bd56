"""All that a GPU is needed for, in one command and one file: tests, the table of attention, a training step.

python -m benchmarks.gpu [--budget-s 530] [--out benchmarks/results] [--toy]

Needs nothing but the checkout and a Python with torch and transformers; without pytest the tests are skipped, which the
file says. Each part is a process of its own with a share of the time, so that one that hangs or crashes costs its part
alone; the file is written after each of them, and says what was skipped. Speed is measured only if no test fails.
`--toy` tries the command itself on the CPU, the kernels in Triton's interpreter.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, environment

OUT_OF_TIME = 124
# Of the tests only those of the operators: the rest needs packages that such a machine may lack, and no GPU. What
# compiles for other GPUs is counted, not run. Every variant of a kernel compiles first, so many processes pay.
TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops", "--ignore=tests/ops/triton/test_resources.py"]
TESTS += ["--ignore=tests/ops/triton/test_decode_resources.py", "-m", "gpu"]
if importlib.util.find_spec("xdist"):
    TESTS += ["-n", "8", "--dist", "worksteal"]
ATTENTION = ["-m", "benchmarks.attention"]
STEP = ["-m", "benchmarks.step"]
TOY_TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_shapes.py"]
TOY = {
    "attention": "--device cpu --dtype float32 --rounds 1 --tokens 16 --lengths 16 --head-dims 32 --heads 1",
    "step": "--device cpu --dtype float32 --layers 1 --hidden-size 64 --heads 2 --intermediate-size 64 --vocab-size 64 "
    "--rows 1 --seq-len 16 --steps 1 --no-compile",
}


def run_part(command: list[str], timeout_s: float, toy: bool) -> tuple[int, str]:
    """Run one part, print what it prints, and return its code (124: out of time) and output."""
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **({"TRITON_INTERPRET": "1"} if toy else {}),
    }
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    print(f"$ {' '.join(['python', *command])}", flush=True)
    with tempfile.TemporaryFile("w+") as output:
        # A group of its own, so that a timeout ends the children too, which would hold the GPU.
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(1.0, timeout_s))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = OUT_OF_TIME
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    return code, text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=530, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--toy", action="store_true", help="on the CPU, at sizes that take seconds")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.budget_s
    if missing := [name for name in ("torch", "transformers") if not _has(name)]:
        raise SystemExit(f"{sys.executable} has no {' and no '.join(missing)}; name one that has: make gpu PYTHON=...")
    found: dict[str, Any] = {"environment": environment("transformers", "lightning"), "toy": args.toy, "parts": {}}
    if not args.toy and not _has_cuda():
        raise SystemExit("no CUDA device here; `--toy` tries the command on the CPU")
    date = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    device = re.sub(r"\W+", "-", found["environment"]["device"]).strip("-").lower()
    target = args.out / f"{'toy-' if args.toy else ''}{device}-{date}.json"
    args.out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        # Each part may use so much of what is left.
        for name, command, share in (("tests", TESTS, 0.4), ("attention", ATTENTION, 0.7), ("step", STEP, 1.0)):
            left = deadline - time.monotonic()
            earlier = found["parts"].get("tests", {}).get("code", 0)
            part: dict[str, Any] = {}
            if reason := _why_skipped(name, left, earlier):
                part["skipped"] = reason
                print(f"{name}: skipped, {part['skipped']}", flush=True)
            else:
                results = Path(folder) / f"{name}.json"
                full = list(TOY_TESTS if args.toy and name == "tests" else command)
                if name != "tests":
                    full += TOY[name].split() if args.toy else []
                    # What is begun within the budget ends before the limit.
                    full += ["--budget-s", str(round(0.8 * share * left)), "--json", str(results)]
                start = time.monotonic()
                part["code"], output = run_part(full, share * left, args.toy)
                part["seconds"] = round(time.monotonic() - start, 1)
                part["last_lines"] = output.splitlines()[-15:]
                if results.is_file():
                    part["found"] = json.loads(results.read_text())
            found["parts"][name] = part
            target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {target}")
    return int(any(part.get("code") for part in found["parts"].values()))


def _why_skipped(part: str, left_s: float, tests_code: int) -> str | None:
    """Why a part is not run; None where it is."""
    if left_s < 10:
        return "no time left"
    if part == "tests":
        without = "pytest is not installed; attention is compared with the equation before it is timed"
        return None if _has("pytest") else without
    return None if tests_code in (0, OUT_OF_TIME) else "a test fails: no speed of a wrong result"


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
