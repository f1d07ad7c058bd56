"""Trainings on two ranks that are killed and signalled at random, resumed, and compared with one that was left alone.

    python -m tests.faults --rounds 50 --seed 0

A round resumes the training and, at a random moment of a random kind, hits it: kill -9 of one rank while a checkpoint
is written; SIGTERM or SIGUSR1 to one rank or to both, in a step, in an evaluation (of some trainings, while texts are
generated) or while a checkpoint is written. A
launcher would then end the ranks that are left: so does this. A loss is a round after which a checkpoint that was
complete is not there or not whole any more, a signal that did not lead to a checkpoint of the last step and the exit
code 143 (138), or a training whose loss at some step, or whose end, is not that of the one left alone.
"""

import argparse
import json
import os
import random
import select
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from difftune.training.checkpoint_io import AtomicCheckpointIO, find_damage, find_resumable, list_checkpoints, step_of
from tests.ranks import become_rank, free_port
from tests.training import fault_ranks

RANKS = 2
TOLERANCE = 1e-5
# As torchrun: first SIGTERM to those that are left, then SIGKILL.
GRACE_S, ORDERLY_S = 180.0, 60.0
LIMIT_S = 600.0
KINDS = ("kill -9 in a save", "signal in a step", "signal in an evaluation", "signal in a save")
EVENTS = {"step": "step", "evaluation": "evaluation", "save": "save"}


@dataclass
class Fault:
    """What is done to a training, and when."""

    kind: str
    event: str
    """The event that it waits for, on any rank."""
    count: int
    """How many of these it lets pass."""
    delay_s: float
    number: signal.Signals
    targets: tuple[int, ...]

    @classmethod
    def random(cls, generator: random.Random) -> "Fault":
        kind = generator.choice(KINDS)
        kill = kind.startswith("kill")
        number = signal.SIGKILL if kill else generator.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1])
        targets = generator.choice([(0,), (1,)] if kill else [(0,), (1,), (0, 1)])
        event = EVENTS[kind.split()[-1]]
        count = {
            "step": generator.randint(4, 14),
            "evaluation": generator.randint(0, 3),
            "save": generator.randint(0, 14),
        }
        return cls(kind, event, count[event], generator.uniform(0, 0.03), number, targets)

    def __str__(self) -> str:
        ranks = "both ranks" if len(self.targets) == RANKS else f"rank {self.targets[0]}"
        return f"{self.kind} ({self.number.name} to {ranks})"


@dataclass
class Run:
    """How a training ended."""

    codes: list[int] = field(default_factory=lambda: [0] * RANKS)
    """Exit codes; minus the number of a signal that ended a rank."""
    hit: bool = False
    steps: int = 0
    """The last step that was begun."""
    saved: int = 0
    """The last step whose checkpoint was announced as complete."""
    late: bool = False
    """Whether a rank had to be ended by SIGKILL."""
    output: str = ""


def run(folder: Path, strategy: str, steps: int, background: bool, task: str, fault: Fault | None) -> Run:
    """Fork the ranks, watch what they say, do the fault, and wait for their end."""
    folder.mkdir(parents=True, exist_ok=True)
    read, write = os.pipe()
    mode = "background" if background else "waiting"
    port, pids = free_port(), []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            arguments = [str(folder), strategy, str(steps), mode, task, str(write)]
            become_rank(fault_ranks.__name__, rank, RANKS, port, folder / f"rank-{rank}.log", arguments)
        pids.append(child)
    os.close(write)
    result, alive = Run(), dict(enumerate(pids))
    begun, first_end, passed, open_pipe, rest = time.monotonic(), float("inf"), 0, True, b""
    told = False
    while alive or open_pipe:
        if open_pipe and select.select([read], [], [], 0.02)[0]:
            block = os.read(read, 65536)
            open_pipe = bool(block)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                _, event, step = line.decode().split()
                result.steps = max(result.steps, int(step)) if event == "step" else result.steps
                result.saved = max(result.saved, int(step) + 1) if event == "saved" else result.saved
                if fault is not None and event == fault.event and not result.hit:
                    passed += 1
                    if passed > fault.count and len(alive) == RANKS:
                        time.sleep(fault.delay_s)
                        for target in fault.targets:
                            os.kill(pids[target], fault.number)
                        result.hit = True
        for rank, pid in list(alive.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                result.codes[rank] = os.waitstatus_to_exitcode(status)
                del alive[rank]
                if result.codes[rank]:
                    first_end = min(first_end, time.monotonic())
        # Those that stop together need a moment for it.
        orderly = any(code > 128 for code in result.codes)
        if alive and not told and time.monotonic() > first_end + (ORDERLY_S if orderly else 0):
            told = True
            for pid in alive.values():
                os.kill(pid, signal.SIGTERM)
        if alive and (time.monotonic() > first_end + GRACE_S or time.monotonic() > begun + LIMIT_S):
            result.late = True
            for pid in alive.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    os.close(read)
    logs = (folder / f"rank-{rank}.log" for rank in range(RANKS))
    result.output = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}" for log in logs)
    return result


def judge(folder: Path, fault: Fault, result: Run, before: int) -> list[str]:
    """What was lost in a round that began with a checkpoint of the step ``before`` (0: none)."""
    losses = []
    checkpoints = folder / "checkpoints"
    losses += [f"{path.name}: {damage}" for path in list_checkpoints(checkpoints) if (damage := find_damage(path))]
    newest = find_resumable(checkpoints) if not losses else None
    step = 0 if newest is None else step_of(newest)
    if step < before:
        losses.append(f"the newest checkpoint is of step {step}, and one of step {before} was there")
    if result.late:
        losses.append("a rank did not end")
    if result.hit and fault.number != signal.SIGKILL and not (folder / "done").exists():
        expected = 128 + fault.number
        if any(code != expected for code in result.codes):
            losses.append(f"exit codes {result.codes} instead of {expected}")
        if step < result.steps:
            losses.append(f"stopped in or after step {result.steps}, and the checkpoint is of step {step}")
    if not result.hit and any(result.codes):
        losses.append(f"failed by itself: {result.codes}")
    return losses


def compare(folder: Path, alone: Path) -> tuple[float, list[str]]:
    """The largest difference to the training left alone, and what is wrong."""
    ours, theirs = _losses(folder), _losses(alone)
    if ours.keys() != theirs.keys():
        return float("inf"), [f"steps {sorted(ours.keys() ^ theirs.keys())} are logged in one of the trainings alone"]
    worst = max(abs(ours[step] - theirs[step]) for step in theirs)
    weights = [
        AtomicCheckpointIO().load_checkpoint(find_resumable(one / "checkpoints") or one)["state_dict"]
        for one in (folder, alone)
    ]
    worst = max(worst, *(float((tensor - weights[0][name]).abs().max()) for name, tensor in weights[1].items()))
    return worst, [] if worst <= TOLERANCE else [f"differs by {worst:.3g} from the training left alone"]


def campaign(root: Path, rounds: int, seed: int, per_training: int = 10, steps: int = 60) -> int:
    """Do all the rounds, print each, and return the number of losses."""
    generator = random.Random(seed)
    alone: dict[str, Path] = {}
    lost, done, number = 0, 0, 0
    begun = time.monotonic()
    while done < rounds:
        # Three of five trainings are sharded.
        strategy = ("fsdp", "ddp", "fsdp")[number % 3] if rounds > 1 else "fsdp"
        if strategy not in alone:
            alone[strategy] = root / f"alone-{strategy}"
            result = run(alone[strategy], strategy, steps, False, "slow", None)
            assert not any(result.codes), result.output
        folder, background = root / f"training-{number}", number % 2 == 0
        # Every other sharded training generates; what is evaluated leaves no trace in a training.
        task = "math" if number % 3 == 0 else "slow"
        folder.mkdir(parents=True)
        count = 0
        while done < rounds and count < per_training and not (folder / "done").exists():
            fault = Fault.random(generator)
            newest = find_resumable(folder / "checkpoints")
            before = 0 if newest is None else step_of(newest)
            started = time.monotonic()
            result = run(folder, strategy, steps, background, task, fault)
            losses = judge(folder, fault, result, before)
            done, count, lost = done + 1, count + 1, lost + bool(losses)
            newest = find_resumable(folder / "checkpoints")
            after = 0 if newest is None else step_of(newest)
            state = "" if result.hit else ", not hit: the training ended before"
            mode = "in the background" if background else "waited for"
            print(
                f"round {done}: {strategy}, {task} evaluation, saves {mode}: {fault}{state}; checkpoint {before}, "
                f"then {after}; exit codes {result.codes}, {time.monotonic() - started:.1f} s{_told(losses)}",
                flush=True,
            )
            if losses:
                print(result.output, flush=True)
        last = run(folder, strategy, steps, background, task, None)
        worst, losses = compare(folder, alone[strategy]) if not any(last.codes) else (float("inf"), [last.output])
        lost += bool(losses)
        print(
            f"training {number} ({strategy}), {count} rounds: resumed to its end; largest difference of a loss or a "
            f"weight to the one left alone {worst:.3g}{_told(losses)}",
            flush=True,
        )
        number += 1
    print(f"{done} rounds in {number} trainings, {time.monotonic() - begun:.0f} s, losses: {lost}", flush=True)
    return lost


def _losses(folder: Path) -> dict[int, float]:
    """Training loss by step, the last one logged."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["value"] for line in lines if line["name"] == "train/loss"}


def _told(losses: list[str]) -> str:
    return f": LOST: {'; '.join(losses)}" if losses else ""


def main() -> int:
    """Run from the command line: 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-training", type=int, default=10, help="rounds that hit one training")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of a training")
    parser.add_argument("--folder", type=Path, help="where to keep what is written; default: nowhere")
    found = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        root = found.folder or Path(temporary)
        return int(campaign(root, found.rounds, found.seed, found.per_training, found.steps) > 0)


if __name__ == "__main__":
    sys.exit(main())
