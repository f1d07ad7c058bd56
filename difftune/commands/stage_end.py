"""When a stage of a run is over: what it was given to reach, whether it did, and whether it learned anything."""

import logging
from collections.abc import Sequence
from typing import Any

from difftune.config import StageConfig
from difftune.run_folder import RunFolder

log = logging.getLogger(__name__)


def end_of(stage: StageConfig) -> dict[str, Any]:
    """What ends a stage; with another end it goes on."""
    return {name: getattr(stage.trainer, name) for name in ("max_steps", "max_epochs", "max_time")}


def is_finished(folder: RunFolder, stages: Sequence[StageConfig], index: int) -> bool:
    """Whether a stage need not be trained: it ran to the end that it is given now, and that end is there.

    Where its last checkpoint is damaged, and no later stage has one of its own, the stage is finished again: the next
    stage, or the export, would begin with a model some steps short.

    Args:
        folder: The run.
        stages: All of its stages.
        index: Which of them.

    Raises:
        ValueError: If none of its checkpoints is whole.
    """
    name = stages[index].name
    if not folder.has_ended(name, end_of(stages[index])):
        return False
    if any(any(folder.checkpoints(later.name).glob("step-*")) for later in stages[index + 1 :]):
        return True
    if folder.has_its_end(name):
        return True
    log.warning("the last checkpoint of stage %s is damaged: the stage is finished again", name)
    return False


def require_training(stage: str, steps: int, skipped: int) -> None:
    """End with exit code 1 if a stage learned nothing: its model is the one that it began with.

    Args:
        stage: Its name.
        steps: Optimiser steps that it took, in all of its starts.
        skipped: How many of them were skipped.

    Raises:
        SystemExit: With 1.
    """
    if steps > skipped:
        return
    log.error(
        "stage %s trained nothing: all of its %d steps were skipped, for a loss or gradient that is not finite or a "
        "batch without labels; look at the data, lower optim.lr, or set trainer.precision=32-true",
        stage,
        steps,
    )
    raise SystemExit(1)
