import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from difftune.training.checkpoint import Checkpointing
from difftune.training.checkpoint_io import find_resumable, step_of
from difftune.training.loggers import MetricsLogger
from difftune.training.preemption import Preemption
from tests.training.toy import ToyData, build_module, build_trainer, parameters

ROOT = Path(__file__).parents[2]


def signalled(folder, number, *arguments, pick=lambda ranks: ranks[0]):
    """Run the toy as a program; send a signal to one process once it has passed step 3; return code and errors."""
    command = [sys.executable, "-m", "tests.training.toy", str(folder), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks, step = {}, 0
    try:
        for line in process.stdout:
            # Two ranks may write into one line.
            for rank, pid, at in re.findall(r"rank (\d) process (\d+) step (\d+)", line):
                ranks[int(rank)], step = int(pid), int(at)
            if step >= 3 and len(ranks) == (2 if "--devices" in arguments else 1):
                os.kill(pick(ranks), number)
                break
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, errors


def test_sigterm_in_mid_run_saves_exits_143_and_resumes_as_if_nothing_had_happened(tmp_path):
    code, errors = signalled(tmp_path, signal.SIGTERM)
    assert code == 128 + 15, errors
    path = find_resumable(tmp_path / "checkpoints")
    step = step_of(path)
    assert f"SIGTERM received: stopping after optimiser step {step}" in errors
    assert 3 <= step < 20

    finished = []
    for folder, resume in ((tmp_path / "straight", None), (tmp_path, path)):
        module = build_module(dropout=0.1)
        logger = MetricsLogger(folder / "metrics.jsonl", resume_step=step if resume else None)
        trainer = build_trainer(
            [Checkpointing(folder / "checkpoints", every_n_steps=6)], accumulate_grad_batches=2, logger=logger
        )
        trainer.fit(module, ToyData(), ckpt_path=resume)
        lines = [json.loads(line) for line in logger.path.read_text().splitlines()]
        metrics = [(line["step"], line["tokens"], line["name"], line["value"]) for line in lines]
        finished.append((parameters(module.model), metrics))
    (straight, metrics), (resumed, metrics_of_both) = finished
    assert torch.equal(straight, resumed)
    assert metrics == metrics_of_both


def test_a_signal_to_the_second_of_two_ranks_stops_both(tmp_path):
    code, errors = signalled(tmp_path, signal.SIGTERM, "--devices", "2", pick=lambda ranks: ranks[1])
    assert code == 143, errors
    assert find_resumable(tmp_path / "checkpoints") is not None


class Signal(Callback):
    """Signals this process during the third optimiser step, and looks at Lightning's own flag."""

    def __init__(self, number, batch=4):
        self.number, self.batch, self.lightning_saw = number, batch, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)

    def on_train_end(self, trainer, pl_module):
        self.lightning_saw = trainer.received_sigterm


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_optimiser_step_and_lightning_does_not_interfere(number, tmp_path):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        sender = Signal(number)
        trainer = build_trainer([sender, preemption, Checkpointing(tmp_path)], accumulate_grad_batches=2)
        trainer.fit(build_module(), ToyData())
        assert signal.getsignal(number) == preemption._note
        assert preemption.is_preempted()
    assert signal.getsignal(number) == before
    assert trainer.global_step == 3 and step_of(find_resumable(tmp_path)) == 3
    assert preemption.exit_code == 128 + number
    assert sender.lightning_saw is False


def test_a_signal_before_training_is_not_lost(tmp_path):
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        trainer = build_trainer([preemption, Checkpointing(tmp_path)])
        trainer.fit(build_module(), ToyData())
    assert trainer.global_step == 0 and preemption.exit_code == 143
    assert find_resumable(tmp_path) is None, "nothing was trained: the run begins anew"


@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_ctrl_c_saves_as_sigterm_does(tmp_path, steps):
    before = signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        assert signal.getsignal(signal.SIGINT) == before, "until a Trainer works, Ctrl-C ends at once"
        trainer = build_trainer([Signal(signal.SIGINT, steps), preemption, Checkpointing(tmp_path)])
        trainer.fit(build_module(), ToyData())
        assert signal.getsignal(signal.SIGINT) == before, "and after it again"
    assert trainer.global_step == steps + 1 == step_of(find_resumable(tmp_path))
    assert preemption.exit_code == 130


def test_a_second_ctrl_c_ends_at_once_and_a_sigterm_before_it_does_not_count(tmp_path, monkeypatch):
    with Preemption() as preemption:
        preemption._note(signal.SIGTERM, None)
        preemption._note(signal.SIGINT, None)
        with pytest.raises(KeyboardInterrupt):
            preemption._note(signal.SIGINT, None)
    assert preemption.exit_code == 143, "what came first"

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Preemption() as preemption:
        preemption._note(signal.SIGINT, None)
        preemption._note(signal.SIGINT, None)  # the launcher hands on what the rank has got already
        assert preemption.exit_code == 130
        monkeypatch.setattr("difftune.training.preemption._FORWARDED_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            preemption._note(signal.SIGINT, None)


def test_a_signal_before_the_first_resumed_step_takes_no_step(tmp_path):
    build_trainer([Checkpointing(tmp_path)], max_steps=3).fit(build_module(), ToyData())
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        trainer = build_trainer([preemption, Checkpointing(tmp_path)])
        trainer.fit(build_module(), ToyData(), ckpt_path=find_resumable(tmp_path))
    assert trainer.global_step == 3 == step_of(find_resumable(tmp_path))


def test_without_a_signal_there_is_no_exit_code():
    with Preemption() as preemption:
        trainer = build_trainer([preemption], max_steps=2)
        trainer.fit(build_module(), ToyData())
    assert trainer.global_step == 2 and preemption.exit_code is None and not preemption.is_preempted()
