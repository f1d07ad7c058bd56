"""Evaluation on a schedule while a model is trained."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.agreement import Parts, StopSign, gather_parts
from difftune.evaluation.means import mean_accuracy
from difftune.evaluation.replicas import Evaluated, plain_weights
from difftune.evaluation.task import Result, Task
from difftune.writing import write_whole

log = logging.getLogger(__name__)


class ScheduledEvaluation(Callback):
    """Runs evaluation tasks before, during and after training, and logs what comes out.

    Metrics are `eval/<task>/<name>`. They go to the loggers through the training module's `log_metrics`, and into
    `trainer.callback_metrics`; every sample goes to `samples_dir/<stage>-<step>.jsonl`. With several ranks each takes
    its share of every task, of a sharded model on a copy with plain weights (`difftune.evaluation.replicas`). The
    training does not notice: mode, random state, gradients and data position stay. What a task raises on one rank ends
    the training on all.

    An evaluation cut by the time limit logs what it has and warns, but `callback_metrics` and `on_result` leave the cut
    task out: a figure on fewer problems must not decide which checkpoint is best. One cut by `should_stop` is dropped,
    and made up for when the run is resumed from that step.

    The training module has `model` (the causal language model), `log_metrics(metrics, step)` and, for `every_n_tokens`,
    `tokens_seen` (equal on all ranks), as `difftune.training.finetune.FinetuneModule` has.

    Args:
        tasks: What to evaluate, names all different.
        tokenizer: Tokenizer of the model.
        samples_dir: Folder for the samples. None: they are not kept.
        stage: Name of the training stage, for the file names.
        before: Evaluate before the first step, as step 0.
        at_end: Evaluate after the last step.
        every_n_steps: Optimiser steps between two evaluations. None: not by steps.
        every_n_tokens: Training tokens between two evaluations. None: not by tokens.
        every_fraction: Share of the training between two evaluations, above 0 and at most 1. None: not by share. The
            steps are the `total_steps` of the training module, which knows how many ranks share the data, or, where it
            has none, what the Trainer expects.
        time_limit_s: Seconds for one evaluation; what a task leaves over goes to those after it. None: no limit.
        should_stop: Polled while texts are generated; True ends the evaluation at once (preemption).
        on_result: Called on all ranks with the trainer and the metrics of each evaluation that is complete.
        on_progress: Called with how far a task is, after each of its blocks.

    Raises:
        ValueError: If a setting is out of range or there is no task; at the start of training, if the number of steps
            that `every_fraction` needs is unknown.
    """

    def __init__(
        self,
        tasks: Sequence[Task[Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples_dir: str | Path | None = None,
        stage: str = "main",
        before: bool = True,
        at_end: bool = True,
        every_n_steps: int | None = None,
        every_n_tokens: int | None = None,
        every_fraction: float | None = None,
        time_limit_s: float | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_result: Callable[[Trainer, dict[str, float]], None] | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"evaluation needs at least one task, and different names, got {names}")
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("every_n_tokens", every_n_tokens),
            ("every_fraction", every_fraction),
            ("time_limit_s", time_limit_s),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, or None to go without, got {value}")
        if every_fraction is not None and every_fraction > 1:
            raise ValueError(f"every_fraction must be at most 1 (once, at the end), got {every_fraction}")
        self.tasks, self.tokenizer = list(tasks), tokenizer
        self.samples_dir = None if samples_dir is None else Path(samples_dir)
        self.stage, self.before, self.at_end = stage, before, at_end
        self.every_n_steps, self.every_n_tokens, self.every_fraction = every_n_steps, every_n_tokens, every_fraction
        self.time_limit_s = time_limit_s
        self.should_stop, self.on_result, self.on_progress = should_stop, on_result, on_progress
        self.results: dict[int, dict[str, Result]] = {}
        """What this process has evaluated: results by task name, by optimiser step."""
        self._evaluated_step: int | None = None
        self._pending = False
        self._how = ""
        self._last_step = 0
        self._last_tokens = 0
        self._fraction_steps: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate before the first step, or what a preempted run owes."""
        self._last_step = trainer.global_step
        self._last_tokens = self._tokens(pl_module)
        self._fraction_steps = self._plan(trainer, pl_module)
        if self._pending or (self.before and trainer.global_step == 0):
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Evaluate if the optimiser stepped and an evaluation is due."""
        step = trainer.global_step
        if step == self._last_step:
            return
        tokens = self._tokens(pl_module)
        due = (
            (self.every_n_steps is not None and step % self.every_n_steps == 0)
            or (
                self.every_n_tokens is not None
                and tokens // self.every_n_tokens > self._last_tokens // self.every_n_tokens
            )
            or step in self._fraction_steps
            # Here and not in on_train_end, so that the last checkpoint knows of it.
            or (self.at_end and step == trainer.max_steps)
        )
        self._last_step, self._last_tokens = step, tokens
        if due:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the final weights, unless that has just been done or the run was told to stop."""
        stopped = gather_parts([], self._is_stopped(), 0.0, None).stopped
        if self.at_end and self._evaluated_step != trainer.global_step and not stopped:
            self._evaluate(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a run owes that was stopped in its last evaluation: no step follows, and no hook of the training."""
        if self._pending and not gather_parts([], self._is_stopped(), 0.0, None).stopped:
            self._evaluate(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the grading processes."""
        for task in self.tasks:
            task.close()

    def state_dict(self) -> dict[str, Any]:
        """What was evaluated last, and whether an evaluation is owed."""
        return {"evaluated_step": self._evaluated_step, "pending": self._pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._evaluated_step, self._pending = state_dict["evaluated_step"], state_dict["pending"]

    def _is_stopped(self) -> bool:
        return self.should_stop is not None and self.should_stop()

    def _tokens(self, pl_module: Any) -> int:
        return pl_module.tokens_seen if self.every_n_tokens is not None else 0

    def _plan(self, trainer: Trainer, pl_module: LightningModule) -> set[int]:
        """The steps that `every_fraction` stands for."""
        if self.every_fraction is None:
            return set()
        total = getattr(pl_module, "total_steps", None) or trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError(
                f"every_fraction={self.every_fraction} needs a known number of steps: "
                "set trainer.max_steps, or use every_n_steps"
            )
        count = int(1 / self.every_fraction + 1e-9)
        return {max(1, round(k * self.every_fraction * total)) for k in range(1, count + 1)}

    def _evaluate(self, trainer: Trainer, pl_module: Any) -> None:
        """Run all tasks on all ranks, and log the results."""
        self._pending = True
        step, results, lines = trainer.global_step, {}, []
        begun = time.monotonic()
        metrics: dict[str, float] = {}
        valid: dict[str, float] = {}
        strategy = trainer.strategy
        weights = plain_weights(pl_module.model, device=strategy.root_device, ranks_per_machine=trainer.num_devices)
        with trainer.precision_plugin.forward_context(), weights as evaluated:
            self._say(trainer, evaluated.how)
            for index, task in enumerate(self.tasks):
                parts = self._run(trainer, evaluated, task, begun, len(self.tasks) - index)
                if parts.stopped:
                    log.warning("evaluation at step %d was stopped: it is made up for when the run is resumed", step)
                    return
                result = task.summarise(parts.samples)
                results[task.name] = result
                figures = {**result.metrics(), "seconds": parts.seconds}
                named = {f"eval/{task.name}/{name}": value for name, value in figures.items()}
                metrics |= named
                valid |= named if result.complete else {}
                origin = {"task": task.name, "stage": self.stage, "step": step}
                lines += [{**origin, **asdict(sample)} for sample in result.samples]
                if trainer.is_global_zero:
                    _report(task.name, step, result, figures, self.time_limit_s)
        mean = mean_accuracy(self.tasks, results)
        metrics |= mean
        valid |= mean
        self._pending, self._evaluated_step, self.results[step] = False, step, results
        pl_module.log_metrics(metrics, step)
        if trainer.is_global_zero and self.samples_dir is not None:
            _write(self.samples_dir / f"{self.stage}-{step}.jsonl", lines)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in valid.items()})
        if valid and self.on_result is not None:
            self.on_result(trainer, valid)

    def _run(self, trainer: Trainer, evaluated: Evaluated, task: Task[Any], begun: float, tasks_left: int) -> Parts:
        """This rank's share of a task, and then what all ranks have; a rank that fails keeps none of them waiting."""
        started = time.monotonic()
        left = None if self.time_limit_s is None else self.time_limit_s - (started - begun)
        sign = StopSign(self.should_stop, trainer.world_size)
        samples: list[Any] = []
        error: Exception | None = None
        try:
            samples = task.run(
                evaluated.model,
                self.tokenizer,
                part=(trainer.global_rank, trainer.world_size),
                should_stop=sign.is_up,
                deadline=None if left is None else started + left / tasks_left,
                on_block=self._progress_of(task, trainer.world_size),
            )
        except Exception as failure:
            error = failure
            sign.put_up()
        seconds = time.monotonic() - started
        evaluated.finish()
        return gather_parts(samples, sign.is_up(), seconds, error)

    def _progress_of(self, task: Task[Any], ranks: int) -> Callable[[list[Any]], None] | None:
        """What counts the items of this rank, as they are done."""
        if self.on_progress is None:
            return None
        done, mine, tell = 0, -(-task.num_items // ranks), self.on_progress

        def count(samples: list[Any]) -> None:
            nonlocal done
            done += len({sample.index for sample in samples})
            tell(f"evaluating {task.name}, {done} of {mine}")

        return count

    def _say(self, trainer: Trainer, how: str) -> None:
        """Log how a sharded model is gathered, the first time and when it changes."""
        if how.split("(")[0] != self._how.split("(")[0] and trainer.is_global_zero:
            log.info("evaluation of a sharded model: %s", how)
        self._how = how


def _report(name: str, step: int, result: Result, figures: dict[str, float], time_limit_s: float | None) -> None:
    log.info("step %d, %s: %s, %.1f s", step, name, result, figures["seconds"])
    if not result.complete:
        log.warning(
            "evaluation of %s at step %d is not complete after %s s, and is left out of the choice of the best "
            "checkpoint: raise time_limit_s, or take fewer items",
            name,
            step,
            time_limit_s,
        )


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a JSONL file in one go. A full disk is no reason to lose the training: it is logged."""
    try:
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        log.error("samples of %s NOT written: %s", path, error)
