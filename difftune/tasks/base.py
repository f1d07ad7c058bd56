"""What the kinds of task have in common in a recipe."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # a recipe is read without torch
    from difftune.evaluation.task import Task


@dataclass(frozen=True)
class Defaults:
    """What `evaluation` says for the tasks that do not say it themselves."""

    max_new_tokens: int
    """Longest answer, in tokens."""
    batch_size: int
    """Prompts decoded together."""
    temperature: float
    """0 is greedy."""
    top_p: float
    """Sample from the most likely tokens that hold this share of the probability."""
    num_samples: int
    """Answers a problem."""
    seed: int
    """Of whatever is drawn."""


@dataclass(kw_only=True)
class TaskConfig:
    """Something to evaluate. Its `kind` says which other keys it has."""

    kind: str = "math"
    """What is evaluated."""
    name: str | None = None
    """Name in metrics and samples. null: made from the kind or the data."""

    operand: ClassVar[str | None] = None
    """The key that `--task KIND:TEXT` sets to TEXT."""

    @staticmethod
    def variants() -> dict[str, type["TaskConfig"]]:
        """The dataclasses of all kinds, by name."""
        from difftune.tasks import KINDS

        return KINDS

    def task_name(self) -> str:
        """Name in metrics and samples."""
        return self.name or self.kind

    def figures(self) -> list[str]:
        """Names of the metrics by which checkpoints can be compared; these are `eval/<task>/<figure>`."""
        return ["accuracy"]

    def problems(self, defaults: Defaults) -> list[str]:
        """What is wrong between the keys, each as `key: what, and what to do`."""
        return []

    def build(self, defaults: Defaults) -> "Task[Any]":
        """The task, with its data read."""
        raise TypeError(f"{type(self).__name__} does not say how it is built")
