"""A training that says what it is doing while it does it, so that a fault can be aimed: a worker of `faults.py`."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback

from difftune.data.problems import load_problems
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.callback import ScheduledEvaluation
from difftune.evaluation.grading import Grade
from difftune.evaluation.math import MathTask
from difftune.training import checkpoint_io
from difftune.training.checkpoint import Checkpointing
from difftune.training.checkpoint_io import find_resumable
from difftune.training.loggers import MetricsLogger
from difftune.training.preemption import Preemption
from difftune.training.strategies import build_strategy
from tests.evaluation.scripted import tiny_model
from tests.training.toy import ToyData, build_module, build_trainer

SAVE_EVERY, EVALUATE_EVERY = 3, 4
TOKENIZER = build_tokenizer("digits")


class Announcer(Callback):
    """Writes what happens to a pipe, one line an event: ``rank event step``."""

    def __init__(self, pipe):
        self.pipe, self.step = pipe, 0

    def say(self, event):
        os.write(self.pipe, f"{os.environ['RANK']} {event} {self.step}\n".encode())

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step
        self.say("resumed")

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.step = trainer.global_step
        self.say("step")


class SlowTask:
    """An evaluation whose ranks end apart, and that looks every now and then whether it should stop."""

    name = kind = "slow"

    def __init__(self, say):
        self.say = say

    def run(self, model, tokenizer, *, part, should_stop, deadline, on_block=None):
        self.say("evaluation")
        for _ in range(4 + 8 * part[0]):
            if should_stop():
                break
            time.sleep(0.02)
        return []

    def summarise(self, samples):
        return SimpleNamespace(complete=True, samples=[], metrics=lambda: {"answered": 1.0})

    def close(self):
        """Nothing to end."""


class Sums(MathTask):
    """Real generation, on a copy of a sharded model; answers end apart, since ranks have different numbers of them."""

    say = None

    def run(self, *args, **settings):
        self.say("evaluation")
        return super().run(*args, **settings)


def build_task(kind, say):
    """`slow` or `math`, about as long as one another."""
    if kind == "slow":
        return SlowTask(say)
    problems = load_problems("synthetic:arithmetic", limit=3)
    task = Sums("sums", problems, max_new_tokens=12, batch_size=1, grader=Unread())
    task.say = say
    return task


class Unread:
    """A grader that needs no process: what is written is not the point."""

    def grade_all(self, pairs):
        return [Grade("wrong", None) for _ in pairs]

    def close(self):
        """Nothing to end."""


def announce_saves(say):
    """Every file takes a moment, and so does the renaming of the folder."""
    begin, replace = checkpoint_io.HashingFile.__init__, checkpoint_io._replace_folder

    def slow_begin(file, raw):
        say("save")
        time.sleep(0.01)
        begin(file, raw)

    def slow_replace(new, path):
        say("save")
        time.sleep(0.01)
        replace(new, path)
        say("saved")

    checkpoint_io.HashingFile.__init__ = slow_begin
    checkpoint_io._replace_folder = slow_replace


def main(arguments):
    """``FOLDER STRATEGY STEPS BACKGROUND TASK PIPE``: go on from what is in the folder."""
    folder, strategy, steps, background, task, pipe = arguments
    folder, announcer = Path(folder), Announcer(int(pipe))
    announce_saves(announcer.say)
    with Preemption() as preemption:
        evaluation = ScheduledEvaluation(
            [build_task(task, announcer.say)],
            TOKENIZER,
            every_n_steps=EVALUATE_EVERY,
            should_stop=preemption.is_preempted,
        )
        checkpointing = Checkpointing(
            folder / "checkpoints", every_n_steps=SAVE_EVERY, background=background == "background"
        )
        trainer = build_trainer(
            [announcer, evaluation, preemption, checkpointing],
            devices=2,
            strategy=build_strategy(strategy, devices=2),
            max_steps=int(steps),
            log_every_n_steps=1,
            logger=MetricsLogger(folder / "metrics.jsonl"),
        )
        module = build_module(model=tiny_model(), lr=3e-3, total_steps=int(steps))
        trainer.fit(module, ToyData(rows=8, delay=0.01), ckpt_path=find_resumable(folder / "checkpoints"))
    if preemption.exit_code is None and trainer.is_global_zero:
        (folder / "done").touch()
    torch.distributed.destroy_process_group()
    sys.exit(preemption.exit_code or 0)
