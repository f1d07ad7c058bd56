"""The end of a training that no longer gets better."""

import logging
import math
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer

log = logging.getLogger(__name__)


class Patience(Callback):
    """Ends the training after some evaluations in a row without a better value of a metric.

    It is told of evaluations by `on_evaluation`, on all ranks; its count is saved with every checkpoint.

    Args:
        metric: Name of the metric, `eval/<task>/<figure>`.
        mode: Whether more (`max`) or less (`min`) of it is better.
        evaluations: How many in a row may pass without a better value.

    Raises:
        ValueError: If `evaluations` is below 1.
    """

    def __init__(self, metric: str, mode: Literal["max", "min"], evaluations: int) -> None:
        if evaluations < 1:
            raise ValueError(f"patience must be at least 1 evaluation, got {evaluations}")
        self.metric, self.mode, self.evaluations = metric, mode, evaluations
        self.best: float | None = None
        """The best value so far."""
        self.waited = 0
        """Evaluations since then."""

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Look at the metrics of a complete evaluation, and stop the Trainer if it was the last in vain."""
        value = metrics.get(self.metric)
        if value is None or math.isnan(value):
            return
        if self.best is None or (value > self.best if self.mode == "max" else value < self.best):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.evaluations and trainer.global_step > 0:
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.info(
                    "step %d: %s has not been better than %.4f for %d evaluations: the training ends here",
                    trainer.global_step,
                    self.metric,
                    self.best,
                    self.waited,
                )

    def state_dict(self) -> dict[str, Any]:
        """The best value and how long ago it was."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best, self.waited = state_dict["best"], state_dict["waited"]
