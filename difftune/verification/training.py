"""The same short training done in several ways, as a user would start it: the losses must be the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from difftune.checkpoints.load import load_model
from difftune.modeling import DiffTransformerConfig
from difftune.verification.budget import Deviation
from difftune.verification.claim import Claim, judged, not_tried
from difftune.verification.small import small_like

STEPS = 6
"""Optimiser steps of a training."""
LOSS_BUDGET = 1e-5
"""Largest difference of a step's loss in float32, nats a token, where sums are taken in another order."""
_ROWS = 8
_LIMIT_S = 600
# What torchrun and Slurm say of this process; the trainings would take it for their own.
_OF_LAUNCHER = re.compile(r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)$|MASTER_|TORCHELASTIC_|SLURM_")


def verify_training(config: DiffTransformerConfig, folder: Path, *, accelerator: str, devices: int) -> Iterator[Claim]:
    """Train a small model with the attention of another one, in float32 on sums of small numbers.

    Args:
        config: Of the other one.
        folder: Where the runs write.
        accelerator: ``cpu`` or ``gpu``.
        devices: How many there are; from 2 on, two of them also train together.

    Yields:
        A claim for each way: micro-batches, going on from a checkpoint, DDP and FSDP on two devices.
    """
    heads = f"{config.attention}, D={config.head_dim}"
    on = f"training of a model of two layers, {heads}: losses of {STEPS} steps in float32"
    alone = [f"data.micro_batch_size={_ROWS}", "trainer.devices=1"]
    recipe = [*_recipe(config), f"trainer.accelerator={accelerator}"]
    failure = _fit([*recipe, *alone], folder / "whole")
    if failure is not None:
        yield Claim("a training ends", on, "fails", failure)
        return
    half = STEPS // 2
    (middle,) = folder.glob(f"whole/checkpoints/*/step-{half:08d}")
    what = "micro-batches = one batch"
    parts = [f"data.micro_batch_size={_ROWS // 4}", "trainer.accumulate_grad_batches=4", "trainer.devices=1"]
    yield _compared(what, on, folder, "parts", _fit([*recipe, *parts], folder / "parts"))
    what = f"gone on from step {half} = straight through"
    # In a folder of its own: what the whole training wrote after it must not be there to be found.
    begun = folder / "gone-on" / "checkpoints" / middle.parent.name / middle.name
    shutil.copytree(middle, begun, dirs_exist_ok=True)
    gone_on = _fit([*recipe, *alone], folder / "gone-on")
    yield _compared(what, on, folder, "gone-on", gone_on, bitwise=accelerator == "cpu")
    for strategy in ("ddp", "fsdp"):
        what = f"two devices with {strategy} = one"
        if devices < 2:
            yield not_tried(what, on, f"needs two devices, found {devices}")
            continue
        shared = [f"data.micro_batch_size={_ROWS // 2}", "trainer.devices=2", f"trainer.strategy={strategy}"]
        yield _compared(what, on, folder, strategy, _fit([*recipe, *shared], folder / strategy, processes=2))


def _recipe(config: DiffTransformerConfig) -> list[str]:
    """What all the trainings have in common."""
    small = small_like(config)
    names = ["attention", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "head_dim", "max_position_embeddings", "subln", "qk_norm"]
    sums = {"path": "synthetic:arithmetic", "options": {"terms": [2, 3], "operands": [1, 20], "count": 200}}
    return [
        *(f"model.{name}={json.dumps(getattr(small, name))}" for name in names),
        "tokenizer=digits",
        f"data.train={json.dumps([sums])}",
        "data.seq_len=128",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "trainer.precision=32-true",
        f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=1",
        f"checkpoint.every_n_steps={STEPS // 2}",
        "logging.loggers=[jsonl]",
    ]


def _fit(recipe: list[str], folder: Path, processes: int = 1) -> str | None:
    """Run ``difftune fit`` in processes of its own; the end of what it said where it failed."""
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(several if processes > 1 else ()), "difftune", "fit"]
    environment = {name: value for name, value in os.environ.items() if not _OF_LAUNCHER.match(name)}
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [*command, *recipe, f"run_dir={folder}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {_LIMIT_S} s"
    if done.returncode == 0:
        return None
    return f"exit code {done.returncode}: " + "; ".join(done.stdout.strip().splitlines()[-3:])


def _compared(what: str, on: str, folder: Path, name: str, failure: str | None, *, bitwise: bool = False) -> Claim:
    """The losses of a run beside those of the whole one; bitwise its weights too."""
    if failure is not None:
        return Claim(what, on, "fails", failure)
    expected, found = _losses(folder / "whole"), _losses(folder / name)
    common = sorted(expected.keys() & found.keys())
    if not common or max(found) != STEPS:
        return Claim(what, on, "fails", f"steps {sorted(found)} are logged, of {STEPS}")
    distance = max(abs(expected[step] - found[step]) for step in common)
    deviations = [Deviation("a loss", distance, 0.0 if bitwise else LOSS_BUDGET, 0.0)]
    if bitwise:
        one, other = (_weights(folder / run) for run in ("whole", name))
        distance = max((one[key] - other[key]).abs().max().item() for key in one)
        deviations.append(Deviation("a weight", distance, 0.0, 0.0))
    return judged(what, on, deviations)


def _losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["value"] for line in lines if line["name"] == "train/loss"}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (last,) = folder.glob(f"checkpoints/*/step-{STEPS:08d}")
    return load_model(last).state_dict()
