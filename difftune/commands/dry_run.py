"""`fit --dry-run`: what a run would learn, whether it fits, and one step of it. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.text import Text

from difftune.data.datamodule import SFTDataModule
from difftune.environment import total_memory_bytes
from difftune.evaluation.task import Task
from difftune.training.callbacks import peak_memory_gib
from difftune.training.finetune import FinetuneModule
from difftune.training.trial import build_bare_trainer, take_trial

SAMPLE_CHARACTERS = 2000


def report_size(console: Console, count: int, needed: int) -> bool:
    """Print parameters and training memory of a model; return whether it is too large for this machine.

    Activations come on top: a step that is said to fit can still run out of memory.

    Args:
        console: Where to.
        count: Parameters.
        needed: Bytes of weights, gradients and optimiser.
    """
    device, available = _memory()
    console.print(
        f"{count:,} parameters; weights, gradients and optimiser need {needed / 2**30:.1f} GiB of the "
        f"{available / 2**30:.1f} GiB of this {device}",
        highlight=False,
    )
    return needed > 0.8 * available


def dry_run_stage(
    console: Console,
    name: str,
    data: SFTDataModule,
    module: FinetuneModule,
    tasks: Sequence[Task[Any]],
    *,
    precision: str,
    accelerator: str,
) -> None:
    """Print the statistics and one sample of a stage's data, then take one optimiser step and generate one batch.

    Args:
        console: Where to.
        name: Of the stage.
        data: The stage's data.
        tasks: The stage's evaluation, of which the sizes are shown.
        module: The stage's module; if its model is on the meta device, for being too large, no step is taken.
        precision: The Trainer's, of the step and of the batch.
        accelerator: The Trainer's.

    Raises:
        ValueError: If the step or the generation fails in this precision.
    """
    console.rule(f"stage {name}", align="left")
    console.print(data.prepare().table(), highlight=False)
    console.print("\none row of a batch; what is learned is [black on green]marked[/]:", markup=True)
    text = Text()
    for part, is_learned in data.sample(0):
        text.append(part, style="black on green" if is_learned else "dim")
    console.print(text[:SAMPLE_CHARACTERS])
    if len(text) > SAMPLE_CHARACTERS:
        console.print(f"(and {len(text) - SAMPLE_CHARACTERS:,} characters more)", highlight=False)
    for task in tasks:
        unit = "problems" if task.kind == "math" else f"items ({task.kind})"
        console.print(f"\nevaluation {task.name}: {task.num_items} {unit}", highlight=False)
    if next(module.model.parameters()).is_meta:
        console.print(
            "\n[yellow]No step was taken: the model does not fit this machine. Everything else was built.[/] "
            "Try fewer layers (model.num_hidden_layers=2) to see one step.",
            highlight=False,
        )
        return
    trial = take_trial(module, data, precision=precision, accelerator=accelerator)
    console.print(
        f"\none step on one micro-batch: loss {trial.loss:.4f} nats a label token, gradient norm "
        f"{trial.grad_norm:.3f}, {trial.seconds:.1f} s with start-up, peak memory {trial.peak_memory_gib:.2f} GiB\n"
        f"one padded batch: {trial.generated} tokens generated for each of two prompts; step and batch in {precision}",
        highlight=False,
    )


@dataclass(frozen=True)
class StepCost:
    """What a micro-batch costs on this machine."""

    seconds: float
    """Of forward and backward, and of a step of the optimiser."""
    peak_memory_gib: float
    tokens: int
    """Positions of the micro-batch, padding included."""


def measure_step(module: FinetuneModule, data: SFTDataModule, accelerator: str, precision: str) -> StepCost:
    """Take three optimiser steps of one micro-batch each on one device, and time the last two."""
    clock = _Clock()
    trainer = build_bare_trainer(max_steps=3, accelerator=accelerator, precision=precision, callbacks=[clock])
    trainer.fit(module, data)
    seconds = (clock.ends[-1] - clock.ends[0]) / max(1, len(clock.ends) - 1)
    return StepCost(seconds, peak_memory_gib(module.device), module.tokens_seen // len(clock.ends))


class _Clock(Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def _memory() -> tuple[str, int]:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
    return "machine", total_memory_bytes()
