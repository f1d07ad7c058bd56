"""Keys of the kind `attention_noise`: attention to an answer and to the noise around it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from difftune.config.field import key
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.evaluation.attention_noise import NoiseTask


@dataclass(kw_only=True)
class AttentionNoiseTaskConfig(TaskConfig):
    """Where the attention goes when a fact in a context is asked for, by depth of the fact."""

    kind: str = "attention_noise"
    """Attention to an answer and to the noise around it."""
    depths: list[float] = key([0.0, 0.25, 0.5, 0.75, 1.0], low=0, high=1)
    """Where the fact stands, as shares of the context; the paper's five."""
    num_samples: int = key(20, low=1)
    """Prompts at each depth."""
    options: dict[str, Any] = key({})
    """Settings of `synthetic:needles`, such as {style: prose, needles: 4, filler: 40, digits: 4}."""
    layer: int = -1
    """Layer of the head whose maps are kept as pictures, from 0; negative: from the last."""
    head: int = key(0, low=0)
    """That head: a differential head, or a head of the baseline."""
    pictures: int = key(1, low=0)
    """How many prompts are kept as pictures."""

    def figures(self) -> list[str]:
        """Shares of the attention, and their ratio."""
        return ["signal_to_noise", "answer", "noise"]

    def problems(self, defaults: Defaults) -> list[str]:
        """The depth is the task's own."""
        return ["options.depth: use depths of the task"] if "depth" in self.options else []

    def build(self, defaults: Defaults) -> "NoiseTask":
        """The task with its prompts."""
        from types import SimpleNamespace

        from difftune.data.synthetic import generate
        from difftune.evaluation.attention_noise import NoiseTask

        probes = []
        for depth in self.depths:
            options = {"seed": defaults.seed, **self.options, "depth": depth, "count": self.num_samples}
            probes += [SimpleNamespace(**row) for row in generate("needles", "test", options)]
        return NoiseTask(self.task_name(), probes, self.layer, self.head, self.pictures)
