"""What is watched during training: speed, lambda, and a progress bar."""

import resource
import sys
import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from difftune.training.finetune import FinetuneModule
from difftune.training.flops import ModelFlops, peak_flops
from difftune.training.loggers import is_log_step


class Throughput(Callback):
    """Logs how fast training is, at every log step, over the steps since the last one.

    ``perf/tokens_per_s`` (positions, padding included, all ranks), ``perf/label_tokens_per_s``,
    ``perf/step_time_s`` (an optimiser step), ``perf/peak_memory_gib`` (of this rank: allocated on the GPU, else
    resident in RAM), and where the peak of the device is known ``perf/mfu``, the share of it that the model's own
    arithmetic uses.

    The clock stops while other callbacks evaluate or save, if this one is listed before them.

    Args:
        flops: Arithmetic of the model. None: no ``perf/mfu``.
        peak_flops_per_s: Peak of one device. None: looked up by its name and the Trainer's precision.
    """

    def __init__(self, flops: ModelFlops | None = None, *, peak_flops_per_s: float | None = None) -> None:
        self.flops, self.peak_flops_per_s = flops, peak_flops_per_s
        self._seconds = 0.0
        self._attended: torch.Tensor | float = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the device up and start the clock."""
        if self.peak_flops_per_s is None:
            self.peak_flops_per_s = peak_flops(pl_module.device, str(trainer.precision))
        self._watch(cast(FinetuneModule, pl_module), trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        """Count the pairs of positions that attend to each other; they depend on the documents."""
        if self.flops is not None and self.peak_flops_per_s is not None:
            self._attended = self._attended + attended_pairs(batch) / pl_module.context_parallel_size  # type: ignore[operator]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop the clock until the other callbacks are done; log if it is time to."""
        module = cast(FinetuneModule, pl_module)
        self._seconds += time.perf_counter() - module.clock
        step = trainer.global_step
        if step == self._step or not is_log_step(trainer, step):
            return
        seconds = max(self._seconds, 1e-9)
        tokens, labels = module.tokens_seen - self._tokens, module.label_tokens_seen - self._labels
        metrics = {
            "perf/tokens_per_s": tokens / seconds,
            "perf/label_tokens_per_s": labels / seconds,
            "perf/step_time_s": seconds / (step - self._step),
            "perf/peak_memory_gib": peak_memory_gib(module.device),
        }
        if self.flops is not None and self.peak_flops_per_s is not None:
            work = self.flops.of_training(tokens, labels, float(self._attended) * module.num_replicas)
            metrics["perf/mfu"] = work / seconds / (self.peak_flops_per_s * trainer.world_size)
        module.log_metrics(metrics, step)
        self._watch(module, step)

    def _watch(self, module: FinetuneModule, step: int) -> None:
        """Start a new interval."""
        self._seconds, self._attended = 0.0, 0.0
        self._step, self._tokens, self._labels = step, module.tokens_seen, module.label_tokens_seen


def attended_pairs(batch: dict[str, torch.Tensor]) -> torch.Tensor | float:
    """Pairs (query, key) of a micro-batch under the causal mask of its documents: half the squares of the lengths."""
    if "cu_seqlens" in batch:
        return batch["cu_seqlens"].diff().double().square().sum() / 2
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(dim=1).double().square().sum() / 2
    rows, length = batch["input_ids"].shape
    return rows * length**2 / 2


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process had at once, in GiB: on ``device`` if it is a CUDA device, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class LambdaMonitor(Callback):
    """Logs lambda of every layer at every log step, as it was in the last forward of the step.

    ``lambda/layer_00`` is its value, and where it varies over tokens and heads (V2) its mean, with
    ``lambda/layer_00_std`` beside. The modules named ``lambda_full`` are hooked for the steps that are logged only.
    """

    def __init__(self) -> None:
        self._values: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Listen if the next optimiser step is logged."""
        if self._hooks or not is_log_step(trainer, trainer.global_step + 1):
            return
        self._step = trainer.global_step + 1
        modules = [m for name, m in pl_module.named_modules() if name.endswith("lambda_full")]
        for layer, module in enumerate(modules):
            self._hooks.append(module.register_forward_hook(self._listener(f"lambda/layer_{layer:02d}")))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log what was heard once the optimiser has stepped."""
        if not self._hooks or trainer.global_step < self._step:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        metrics = {}
        for name, value in self._values.items():
            metrics[name] = float(value.mean())
            if value.numel() > 1:
                metrics[f"{name}_std"] = float(value.std())
        self._values = {}
        cast(FinetuneModule, pl_module).log_metrics(metrics, trainer.global_step)

    def _listener(self, name: str) -> Any:
        """A forward hook that keeps the output under ``name``."""

        def listen(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self._values[name] = output.detach().float()

        return listen


NOTE_EVERY_S = 30.0
"""Seconds between two lines about what is done between steps, where there is no bar."""


class RichProgress(ProgressBar):
    """Steps, loss, learning rate, tokens a second and the time left: a bar on a terminal, else a line a log step.

    Redrawn twice a second at most, from values that are on the host anyway: it costs the training nothing.

    Args:
        title: Shown before the bar, such as the name of the stage.
        console: Where to. None: standard output.
    """

    def __init__(self, title: str = "train", *, console: Console | None = None) -> None:
        super().__init__()
        self.title = title
        self.console = console or Console()
        self._enabled = True
        self._bar: Progress | None = None
        self._noted = 0.0

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the bar, from the step where the run goes on."""
        # The clock starts with the first batch: an evaluation before it says nothing about how long steps take.
        self._start: float | None = None
        self._step, self._drawn = trainer.global_step, 0.0
        self._first = trainer.global_step
        if self._enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
                auto_refresh=False,
            )
            self._bar.start()
            total = self._total(trainer)
            self._bar.add_task(self.title, total=total, completed=trainer.global_step, status="")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Start the clock of the time that is left."""
        if self._start is None:
            self._start = time.monotonic()

    def note(self, text: str) -> None:
        """Show what is done between two steps, such as how far an evaluation is: in the bar, else twice a minute.

        Args:
            text: In the place of the figures, until the next step.
        """
        now = time.monotonic()
        if not self._enabled or now - self._noted < (0.5 if self._bar is not None else NOTE_EVERY_S):
            return
        # The first note of an evaluation is no news: what is short ends before the second.
        is_first, self._noted = self._noted == 0.0, now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], status=text, refresh=True)
        elif not is_first:
            self.console.print(f"{self.title}: {text}", highlight=False)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Redraw, or print a line."""
        step = trainer.global_step
        if not self._enabled or step == self._step:
            return
        self._step = step
        now = time.monotonic()
        if self._bar is None:
            if is_log_step(trainer, step):
                total = self._total(trainer)
                place = f"{step}/{total}" if total else f"{step}"
                self.console.print(f"{self.title} {place}  {self._status(trainer, pl_module)}", highlight=False)
        elif now - self._drawn >= 0.5:
            self._drawn = now
            self._bar.update(
                self._bar.task_ids[0], completed=step, status=self._status(trainer, pl_module), refresh=True
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last state and let go of the terminal."""
        if self._bar is not None:
            status = self._status(trainer, pl_module)
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, status=status, refresh=True)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the terminal."""
        self._close()

    def _close(self) -> None:
        """Stop the bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _total(self, trainer: Trainer) -> int | None:
        """Optimiser steps of the whole training, if there is an end."""
        if trainer.max_steps > 0:
            return trainer.max_steps
        batches = trainer.num_training_batches * max(1, trainer.max_epochs or 1)
        return None if batches == float("inf") else -(-int(batches) // trainer.accumulate_grad_batches)

    def _status(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """The latest values in words."""
        logged = cast(FinetuneModule, pl_module).logged
        parts = []
        if "train/loss" in logged:
            parts.append(f"loss {logged['train/loss']:.4f}  lr {logged['train/lr']:.2e}")
        if "perf/tokens_per_s" in logged:
            parts.append(f"{logged['perf/tokens_per_s']:,.0f} tokens/s")
        total = self._total(trainer)
        done = trainer.global_step - self._first
        if total and done and self._start is not None:
            left = int((time.monotonic() - self._start) / done * (total - trainer.global_step))
            parts.append(f"eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
        return "  ".join(parts)
