"""Where metrics go: ``metrics.jsonl``, which the project itself reads; TensorBoard, W&B, MLflow by name."""

import hashlib
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from difftune.writing import write_whole

log = logging.getLogger(__name__)

_WRITING = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")
"""What Lightning calls of a logger."""

LOGGERS = ("jsonl", "tensorboard", "wandb", "mlflow")


def is_log_step(trainer: Trainer, step: int) -> bool:
    """Whether metrics are due after step ``step``: every ``log_every_n_steps``, at the first and the last."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from a connector
    return every > 0 and step > 0 and (step % every == 0 or step in (1, trainer.max_steps))


class MetricsLogger(Logger):
    """Appends metrics to a JSONL file, one object a line: ``step, tokens, name, value, stage, time``.

    ``step`` counts optimiser steps of the stage, ``tokens`` training positions so far, ``time`` is in seconds
    since the epoch. A value that is not finite is written as null, JSON having no other word for it.

    A run that is resumed leaves no line twice: the lines that the interrupted run wrote after the checkpoint
    are taken out first. A stage that starts anew takes out all its old lines. A full disk loses no line
    either: what could not be written waits for the next call.

    Args:
        path: The file; its folder is made.
        stage: Name of the stage.
        resume_step: Optimiser step of the checkpoint that the run goes on from; the training module sets it when
            it loads one. None: the stage starts anew.
    """

    def __init__(self, path: str | Path, *, stage: str = "main", resume_step: int | None = None) -> None:
        super().__init__()
        self.path, self.stage, self.resume_step = Path(path), stage, resume_step
        self.count_tokens: Callable[[], int] = lambda: 0
        """Tells ``tokens``; the training module puts its own counter here."""
        self._size: int | None = None
        self._waiting = b""
        self._at_resume: set[str] = set()

    @property
    def name(self) -> str:
        """Name of the logger, for Lightning."""
        return "metrics"

    @property
    def version(self) -> str:
        """The stage, for Lightning."""
        return self.stage

    @property
    def save_dir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds its config as config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write metrics, and have them on disk when this returns.

        Args:
            metrics: Value by name: numbers or scalar tensors.
            step: Optimiser steps done.
        """
        shared = {"stage": self.stage, "time": round(time.time(), 3)}
        tokens = self.count_tokens()
        try:
            if self._size is None:
                self._size = self._prepare()
        except OSError as error:
            log.warning("%s cannot be opened (%s): will try again", self.path, error)
        for name, value in metrics.items():
            number = value if isinstance(value, int) else float(value)
            line = {
                "step": step,
                "tokens": tokens,
                "name": name,
                "value": number if math.isfinite(number) else None,
                **shared,
            }
            if step != self.resume_step or name not in self._at_resume:
                self._waiting += json.dumps(line).encode() + b"\n"
        if self._size is not None:
            self._write(self._size)

    def _write(self, size: int) -> None:
        """Append what waits at byte ``size``, over what a failed attempt may have left there."""
        try:
            with open(self.path, "r+b") as file:
                file.truncate(size)
                file.seek(size)
                file.write(self._waiting)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            log.warning("%s cannot be written (%s): will try again", self.path, error)
            return
        self._size = size + len(self._waiting)
        self._waiting = b""

    def _prepare(self) -> int:
        """Make the file, or take out of it the lines that this run will write again; return its size."""
        old = self.path.read_bytes() if self.path.exists() else b""
        kept = b"".join(line for line in old.splitlines(keepends=True) if self._keeps(line))
        if kept != old or not old:
            write_whole(self.path, kept)
        return len(kept)

    def _keeps(self, line: bytes) -> bool:
        """Whether an old line stays: not if torn, nor if of this stage and after its checkpoint."""
        try:
            entry = json.loads(line)
            stage, step, name = entry["stage"], entry["step"], entry["name"]
        except (ValueError, KeyError, TypeError):
            return False
        if stage != self.stage:
            return True
        if self.resume_step is None or step > self.resume_step:
            return False
        if step == self.resume_step:
            self._at_resume.add(name)
        return True


def build_loggers(
    names: Iterable[str],
    *,
    run_dir: str | Path,
    stage: str = "main",
    resume_step: int | None = None,
    project: str = "difftune",
) -> list[Logger]:
    """Build loggers by name.

    Args:
        names: Of ``jsonl`` (``run_dir/metrics.jsonl``), ``tensorboard`` (``run_dir/tensorboard/<stage>``),
            ``wandb`` (a resumed run goes on in the same W&B run) and ``mlflow`` (tracking server by
            ``MLFLOW_TRACKING_URI``, else ``run_dir/mlruns``; a resumed run is a new MLflow run of the same
            name).
        run_dir: The run folder.
        stage: Name of the stage.
        resume_step: Optimiser step of the checkpoint that the run goes on from. None: the stage starts anew.
        project: Project of W&B, experiment of MLflow.

    Returns:
        The loggers, in the order of the names.

    Raises:
        ValueError: If a name is unknown.
        ImportError: If the package of a logger is not installed; the message has the install line.
    """
    run_dir = Path(run_dir)
    title = f"{run_dir.resolve().name}-{stage}"
    built: list[Logger] = []
    for name in names:
        if name == "jsonl":
            built.append(MetricsLogger(run_dir / "metrics.jsonl", stage=stage, resume_step=resume_step))
        elif name == "tensorboard":
            # Events after the checkpoint, written by the interrupted run, are hidden from the plots.
            purge_step = 0 if resume_step is None else resume_step + 1
            built.append(TensorBoardLogger(run_dir, name="tensorboard", version=stage, purge_step=purge_step))
        elif name == "wandb":
            _require("wandb")
            identity = hashlib.sha256(f"{run_dir.resolve()}/{stage}".encode()).hexdigest()[:12]
            built.append(WandbLogger(title, save_dir=run_dir, project=project, id=identity, resume="allow"))
        elif name == "mlflow":
            _require("mlflow")
            uri = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{run_dir.resolve() / 'mlruns'}"
            built.append(MLFlowLogger(experiment_name=project, run_name=title, tracking_uri=uri))
        else:
            raise ValueError(f"logger must be one of {', '.join(LOGGERS)}, got {name!r}")
    return [logger if isinstance(logger, MetricsLogger) else _silenced_by_errors(logger) for logger in built]


def _silenced_by_errors(logger: Logger) -> Logger:
    """Let a logger that cannot write, as on a full disk, say so once and be silent: the training is worth more."""
    failed = False

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            try:
                return method(*args, **kwargs)
            except Exception as error:
                # Lightning turns what TensorBoard's writer raises into a ValueError of its own.
                cause = _refusal_of_system(error)
                if cause is None:
                    raise
                failed = True
                log.error(
                    "%s cannot write (%s): it logs no more in this stage; the training goes on",
                    type(logger).__name__,
                    cause,
                )
                return None

        return call

    for name in _WRITING:
        setattr(logger, name, guarded(getattr(logger, name)))
    return logger


def _refusal_of_system(error: BaseException | None) -> OSError | None:
    """The error itself, or what it was raised from, if that is an error of the system."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _require(package: str) -> None:
    """Raise unless an optional package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"the {package} logger needs {package}: pip install 'difftune[{package}]'")
