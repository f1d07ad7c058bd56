"""Keys of the kind `math`: problems with a final answer to generate and grade."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

from difftune.config_field import key
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.evaluation.math import MathTask


@dataclass(kw_only=True)
class MathTaskConfig(TaskConfig):
    """One set of problems to generate answers for and grade."""

    kind: str = "math"
    """Problems with a final answer, generated and graded."""
    path: str
    """A file of problems with their answers, a hub id, or `synthetic:arithmetic`; as of a training source."""
    name: str | None = None
    """Name in metrics and samples. null: the path's last part without its ending."""
    format: str = "auto"
    """Name of the row format. `auto`: recognised by the columns of the first row."""
    split: str = "test"
    """Split of a hub data set, a folder or a generator."""
    hub_name: str | None = None
    """Configuration of a hub data set, such as `main` of gsm8k. null: its default."""
    options: dict[str, Any] = key({})
    """Settings of a generator."""
    limit: int | None = key(None, low=1)
    """Size of a random subset, drawn with `evaluation.seed`. null: all problems."""
    max_new_tokens: int | None = key(None, low=1)
    """Longest answer in tokens. null: `evaluation.max_new_tokens`."""

    operand: ClassVar[str | None] = "path"

    def task_name(self) -> str:
        """Its own name, else the last part of the path without the ending."""
        return self.name or PurePath(self.path.replace(":", "/")).stem

    def figures(self) -> list[str]:
        """Accuracy and how the answers look."""
        return ["accuracy", "truncated", "unparsed", "mean_length"]

    def build(self, defaults: Defaults) -> "MathTask":
        """The task with its problems."""
        from difftune.data.problems import load_problems
        from difftune.evaluation.math import MathTask

        return MathTask(
            name=self.task_name(),
            problems=load_problems(
                self.path,
                self.limit,
                defaults.seed,
                format=self.format,
                split=self.split,
                name=self.hub_name,
                options=self.options,
            ),
            max_new_tokens=self.max_new_tokens or defaults.max_new_tokens,
            batch_size=defaults.batch_size,
            temperature=defaults.temperature,
            top_p=defaults.top_p,
            num_samples=defaults.num_samples,
            seed=defaults.seed,
        )
