"""When checkpoints are saved, which are kept, and how a run goes on from one."""

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from difftune.small_files import read_json_mapping
from difftune.training.checkpoint_background import BackgroundCheckpointIO
from difftune.training.checkpoint_io import AtomicCheckpointIO, list_checkpoints
from difftune.training.rng import capture_rng, restore_rng
from difftune.writing import sync_folder, write_whole

log = logging.getLogger(__name__)


class Checkpointing(Checkpoint):
    """Saves checkpoints after optimiser steps, and only there; keeps the newest ones and the best one.

    Saved are: every ``every_n_steps`` steps, the last step of the training however it ends (steps, data, time
    limit, signal), and every evaluation that beats the ones before. A Trainer told to stop in the middle of
    an accumulation window goes on to its end first: half a window cannot be resumed.

    The random state of every rank is saved, and put back right before the first resumed step. With another
    number of ranks it cannot be; a warning says so.

    A full disk does not end the training: the failed checkpoint leaves nothing behind, older ones survive, an
    error is logged, and the next one is tried as planned. Only if the last one cannot be saved either,
    training raises.

    With ``background`` regular checkpoints are written while the training goes on; whether one has failed is
    seen, and older ones are removed, when the next is due. The last one and the best are waited for.

    ``directory/best`` links to the best checkpoint, ``directory/best.json`` has its metric. Checkpoints that
    a resumed run finds to be later than where it resumes (damaged ones, or those of a run that took another
    turn) are renamed to ``abandoned-*``.

    Lightning runs this callback after all others, so that it sees what they decided in the same step.

    Args:
        directory: Where the checkpoints of this stage go.
        every_n_steps: Optimiser steps between two checkpoints. None: no regular ones.
        keep_last: How many of the newest to keep, at least 1.
        best_metric: Name of the metric that decides which is best. None: none is.
        best_mode: ``max`` or ``min``.
        background: Write regular checkpoints from a copy in memory, in a thread.

    Raises:
        ValueError: If a number is below 1 or the mode is neither.
        OSError: While training, if the last checkpoint cannot be saved.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_n_steps: int | None = None,
        keep_last: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        background: bool = False,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or None for no regular ones, got {every_n_steps}")
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}: a run could not be resumed")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be max or min, got {best_mode!r}")
        self.directory = Path(directory)
        self.every_n_steps, self.keep_last = every_n_steps, keep_last
        self.best_metric, self.best_mode = best_metric, best_mode
        self.background = background
        self.last_saved_step: int | None = None
        """Optimiser steps at the newest checkpoint; None before the first."""
        self.best_value: float | None = None
        """Value of ``best_metric`` at the best checkpoint."""
        self._io: BackgroundCheckpointIO | None = None
        self._in_flight: int | None = None
        self._rng: list[dict[str, Any]] | None = None
        self._step_before = 0
        self._stop_at_boundary = False
        self._begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have Lightning read and write checkpoints in our format."""
        build = getattr(trainer.strategy, "build_checkpoint_io", AtomicCheckpointIO)
        self._io = trainer.strategy.checkpoint_io = BackgroundCheckpointIO(build())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for what is being written."""
        if self._io is not None:
            self._io.teardown()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait for what is being written: it may be the newest checkpoint."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tidy up what an earlier run left."""
        self._begin(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Put the random state back: nothing may draw from it between here and the step."""
        self._step_before = trainer.global_step
        if self._rng is not None:
            if len(self._rng) == trainer.world_size:
                restore_rng(self._rng[trainer.global_rank])
            elif trainer.is_global_zero:
                log.warning(
                    "the checkpoint has the random state of %d ranks, this run has %d: dropout will differ from "
                    "that of an uninterrupted run",
                    len(self._rng),
                    trainer.world_size,
                )
            self._rng = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save if the optimiser stepped and a checkpoint is due."""
        if not self._stepped(trainer):
            if trainer.should_stop:
                trainer.should_stop, self._stop_at_boundary = False, True
            return
        trainer.should_stop = trainer.should_stop or self._stop_at_boundary
        step = trainer.global_step
        last = trainer.should_stop or step == trainer.max_steps or _is_last_batch(trainer)
        if last or (self.every_n_steps is not None and step % self.every_n_steps == 0):
            self._save(trainer, last=last, background=self.background and not last)

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Keep this step's weights if they are the best so far; an evaluation calls it when it is done.

        Call it on all ranks, right after an optimiser step (or after the training), while the weights are
        those that were evaluated. Before the first step nothing is saved.

        Args:
            trainer: The trainer.
            metrics: Value by name; those other than ``best_metric`` are not read.
        """
        if self.best_metric is None or self.best_metric not in metrics or trainer.global_step == 0:
            return
        self._begin(trainer)
        value = float(metrics[self.best_metric])
        if not trainer.strategy.broadcast(self._is_better(value)):
            return
        assert self._stepped(trainer) or trainer.global_step == self.last_saved_step, "evaluated inside a window"
        if self._save(trainer, last=False):
            self.best_value = value
            if trainer.is_global_zero:
                try:
                    self._point_to_best(trainer.global_step, value)
                except OSError as error:
                    log.error(
                        "step %d is the best so far, but best could not be set: %s",
                        trainer.global_step,
                        error,
                    )

    def state_dict(self) -> dict[str, Any]:
        """Random state of all ranks; a collective call."""
        own = capture_rng()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"rng": [own]}
        states: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, own)
        return {"rng": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the random states for the first step."""
        self._rng = state_dict["rng"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A step that was saved needs no second save."""
        self.last_saved_step = checkpoint["global_step"]

    def _begin(self, trainer: Trainer) -> None:
        """Once a run, before the first decision: tidy up, and agree on the best value so far."""
        if self._begun:
            return
        self._begun = True
        if trainer.is_global_zero:
            self._tidy(trainer.global_step)
        self.best_value = trainer.strategy.broadcast(self.best_value)

    def _stepped(self, trainer: Trainer) -> bool:
        """Whether the optimiser stepped in the current batch."""
        return trainer.global_step > self._step_before

    def _save(self, trainer: Trainer, *, last: bool, background: bool = False) -> bool:
        """Save the current step; return whether it is on disk, or on its way. Raises only for the last one."""
        step = trainer.global_step
        self._land(trainer)
        if self.last_saved_step == step:
            return True

        def save() -> None:
            options = {"background": True} if background else None
            trainer.save_checkpoint(self._path(step), weights_only=False, storage_options=options)

        error, failed = self._attempt(trainer, save, "Trainer.save_checkpoint")
        if failed:
            if last:
                raise error or OSError(errno.EIO, "rank 0 could not save the checkpoint")
            self._log_failure(trainer, step, error)
            return False
        if background:
            self._in_flight = step
        else:
            self._saved(trainer, step)
        return True

    def _land(self, trainer: Trainer) -> None:
        """Wait for the checkpoint that is being written, and see what came of it."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        assert self._io is not None, "set up, if something was saved"
        error, failed = self._attempt(trainer, self._io.finish)
        if failed:
            self._log_failure(trainer, step, error)
        else:
            self._saved(trainer, step)

    def _attempt(
        self, trainer: Trainer, work: Callable[[], None], barrier: str | None = None
    ) -> tuple[OSError | None, bool]:
        """Do something that may fail for lack of space; return this rank's error, and whether rank 0 failed."""
        error: OSError | None = None
        try:
            work()
        except OSError as caught:
            error = caught
            if barrier is not None:
                # The one that the other ranks wait at inside the work, which this rank left early.
                trainer.strategy.barrier(barrier)
        return error, trainer.strategy.broadcast(error is not None)

    def _log_failure(self, trainer: Trainer, step: int, error: OSError | None) -> None:
        if trainer.is_global_zero:
            log.error(
                "checkpoint of step %d NOT saved (%s); training goes on, the newest checkpoint is that of "
                "step %s: free some space",
                step,
                error,
                self.last_saved_step,
            )

    def _saved(self, trainer: Trainer, step: int) -> None:
        """A checkpoint has got its name: older ones may go."""
        self.last_saved_step = step
        if trainer.is_global_zero:
            self._prune()

    def _path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.directory / f"step-{step:08d}"

    def _prune(self) -> None:
        """Remove all but the newest checkpoints and the best."""
        best = (self.directory / "best").resolve()
        for path in list_checkpoints(self.directory)[: -self.keep_last]:
            if path.resolve() != best:
                AtomicCheckpointIO().remove_checkpoint(path)

    def _is_better(self, value: float) -> bool:
        """Whether ``value`` beats the best so far; NaN never does."""
        if math.isnan(value):
            return False
        if self.best_value is None:
            return True
        return value > self.best_value if self.best_mode == "max" else value < self.best_value

    def _point_to_best(self, step: int, value: float) -> None:
        """Write ``best.json`` and turn the link ``best``, each in one go; the former best may go."""
        record = {"metric": self.best_metric, "mode": self.best_mode, "value": value, "step": step}
        write_whole(self.directory / "best.json", json.dumps(record) + "\n")
        link = self.directory / ".tmp-best"
        link.unlink(missing_ok=True)
        link.symlink_to(self._path(step).name)
        os.replace(link, self.directory / "best")
        sync_folder(self.directory)
        self._prune()

    def _tidy(self, step: int) -> None:
        """Remove unfinished checkpoints, set aside those later than ``step``, and read which one is best."""
        for leftover in self.directory.glob(".tmp-*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        for path in list_checkpoints(self.directory):
            if int(path.name.removeprefix("step-")) > step:
                aside = path.with_name(f"abandoned-{path.name}")
                if aside.exists():
                    shutil.rmtree(aside)
                log.warning("%s is later than step %d, where this run starts: renamed to %s", path, step, aside.name)
                os.replace(path, aside)
        link, record = self.directory / "best", self.directory / "best.json"
        if link.is_dir() and record.is_file():
            best = read_json_mapping(record)
            if (best.get("metric"), best.get("mode")) == (self.best_metric, self.best_mode):
                self.best_value = best["value"]
                return
        link.unlink(missing_ok=True)
        record.unlink(missing_ok=True)


def _is_last_batch(trainer: Trainer) -> bool:
    """Whether no batch follows the current one."""
    limit = trainer.max_epochs
    return trainer.is_last_batch and limit is not None and 0 < limit <= trainer.current_epoch + 1
