"""Keys of the kind `quantization`: another task, with attention logits of few bits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from difftune.config.field import key
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.evaluation.quantization import QuantizationTask


@dataclass(kw_only=True)
class QuantizationTaskConfig(TaskConfig):
    """What another task measures when the attention logits are rounded to few bits."""

    kind: str = "quantization"
    """Another task, with attention logits of few bits."""
    task: TaskConfig
    """The other task: a mapping with its kind and keys."""
    bits: list[int] = key([16, 8, 6, 4], low=2, high=16)
    """Bits of the attention logits, one after the other; 16: as they are."""
    granularity: str = key("tensor", choices=("tensor", "head", "row"))
    """What shares a step of the rounding: the logits of one query, of a head, or of all heads of a layer's map."""

    def task_name(self) -> str:
        """Its own name, else that of the other task with `_bits`."""
        return self.name or f"{self.task.task_name()}_bits"

    def figures(self) -> list[str]:
        """The other task's, for each number of bits."""
        return [f"{figure}_{bits}bit" for figure in self.task.figures() for bits in self.bits]

    def problems(self, defaults: Defaults) -> list[str]:
        """Rounding twice means nothing, and the other task's own problems."""
        found = [f"task.{problem}" for problem in self.task.problems(defaults)]
        if self.task.kind == self.kind:
            found.append("task: a task under quantization cannot be a quantization itself")
        if len(set(self.bits)) < len(self.bits) or not self.bits:
            found.append(f"bits: must be different numbers, got {self.bits}")
        return found

    def build(self, defaults: Defaults) -> "QuantizationTask":
        """The other task, and how it is measured."""
        from difftune.evaluation.quantization import QuantizationTask
        from difftune.evaluation.task import ItemTask

        inner = self.task.build(defaults)
        if not isinstance(inner, ItemTask):
            raise ValueError(f"a task of the kind {inner.kind} cannot be measured under quantization")
        return QuantizationTask(self.task_name(), inner, tuple(self.bits), self.granularity)
