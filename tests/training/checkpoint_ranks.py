"""Trainings that save and resume, by name: alone in the process of a test, or on several ranks by `ranks.py`."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything

from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.training import checkpoint_io
from difftune.training.checkpoint import Checkpointing
from difftune.training.checkpoint_io import list_checkpoints
from difftune.training.strategies import build_strategy
from tests.training.scale_ranks import Curve, tiny_model
from tests.training.toy import ToyData, build_module, build_trainer

HALF, WHOLE = 4, 8
TIED = {"tie_word_embeddings": True}
SCENARIOS = {"full": {}, "lora": {"lora": True, "architecture": TIED}, "tied": {"architecture": TIED}}


class FullDisk(Callback):
    """From one step to another, writing fails on one rank."""

    def __init__(self, rank, first, last):
        self.rank, self.first, self.last = rank, first, last
        self.write = checkpoint_io.HashingFile.write

    def on_train_batch_end(self, trainer, pl_module, *args):
        full = self.first <= trainer.global_step <= self.last and trainer.global_rank == self.rank

        def write(file, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        checkpoint_io.HashingFile.write = write if full else self.write


class SlowDisk(Callback):
    """Writing takes until the training has gone on, if it does; counts the optimiser steps that are done meanwhile."""

    def __init__(self):
        self.meanwhile, self.writing, self.most = 0, 0, 0

    def setup(self, trainer, pl_module, stage):
        io, lock = trainer.strategy.checkpoint_io.io, threading.Lock()
        save = io.save_checkpoint

        def slow(*arguments):
            with lock:
                self.writing += 1
                self.most = max(self.most, self.writing)
            begun, patience = trainer.global_step, time.monotonic() + 60
            while trainer.global_step == begun < trainer.max_steps and time.monotonic() < patience:
                time.sleep(0.01)
            self.meanwhile += trainer.global_step - begun
            save(*arguments)
            with lock:
                self.writing -= 1

        io.save_checkpoint = slow


def build(strategy, devices):
    """``tensor`` is ``fsdp`` with two ranks that share each layer."""
    if strategy == "tensor":
        return build_strategy("fsdp", devices=devices, tensor_parallel_size=2)
    return build_strategy(strategy, devices=devices)


def train(folder, strategy, *, steps=WHOLE, every=HALF, resume=None, lora=False, architecture=None, **options):
    """Train into ``folder``; rank 0 writes the curve to ``curve.json``, which is returned."""
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    model = tiny_model(**(architecture or {}))
    adapter_config = None
    if lora:
        seed_everything(4, verbose=False)
        adapter_config = {"peft_type": "LORA", "r": 4}
        add_adapter(model, AdapterSettings(rank=4, alpha=8))
    curve = Curve()
    callbacks = options.pop("callbacks", [])
    checkpointing = Checkpointing(folder / "checkpoints", every_n_steps=every, keep_last=9, **options)
    trainer = build_trainer(
        # Those that change the writer are set up after it is there.
        [curve, *(c for c in callbacks if isinstance(c, FullDisk)), checkpointing],
        devices=devices,
        strategy=build(strategy, devices),
        max_steps=steps,
        log_every_n_steps=1,
    )
    # Lightning puts checkpoint callbacks last.
    trainer.callbacks += [c for c in callbacks if not isinstance(c, FullDisk)]
    module = build_module(model=model, lr=3e-3, adapter_config=adapter_config)
    trainer.fit(module, ToyData(rows=8), ckpt_path=resume)
    if trainer.is_global_zero:
        (folder / "curve.json").write_text(json.dumps(curve.loss))
    return curve.loss


def case_straight(folder, strategy, scenario):
    train(folder, strategy, **SCENARIOS[scenario])


def case_resume(folder, strategy, scenario, *source):
    path = folder.parent / "-".join(source) / "checkpoints" / f"step-{HALF:08d}"
    train(folder, strategy, resume=path, **SCENARIOS[scenario])


def case_background(folder, strategy):
    slow = SlowDisk()
    train(folder, strategy, every=2, background=True, callbacks=[slow])
    if os.environ.get("RANK", "0") == "0":
        (folder / "slow.json").write_text(json.dumps({"meanwhile": slow.meanwhile, "most": slow.most}))


def case_fulldisk(folder, strategy, rank, kind):
    """The checkpoints of steps 2 and 4 cannot be written on one rank; that of 6 can."""
    train(folder, strategy, every=2, steps=6, background=kind == "background", callbacks=[FullDisk(int(rank), 2, 4)])


def case_fulldisklast(folder, strategy, rank):
    """Nor can the last one: every rank has to learn of it."""
    try:
        train(folder, strategy, every=2, steps=4, callbacks=[FullDisk(int(rank), 3, 4)])
    except OSError as error:
        (folder / f"error-{os.environ['RANK']}.txt").write_text(f"{error.errno} {error}")
    torch.distributed.barrier()


def main(arguments):
    """``FOLDER CASE-STRATEGY-...``: one after the other, each into the folder of its name."""
    root, *names = arguments
    for name in names:
        kind, *rest = name.split("-")
        folder = Path(root) / name
        folder.mkdir(exist_ok=True)
        globals()[f"case_{kind}"](folder, *rest)
        assert threading.active_count() < 20
        if torch.distributed.get_rank() == 0:
            print(name, [path.name for path in list_checkpoints(folder / "checkpoints")], flush=True)
