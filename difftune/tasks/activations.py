"""Keys of the kind `activations`: outliers of attention logits and hidden states."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from difftune.config.field import key, required
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.evaluation.activations import ActivationsTask


@dataclass(kw_only=True)
class ActivationsTaskConfig(TaskConfig):
    """The largest magnitudes, and the median, of attention logits and hidden states over a text."""

    kind: str = "activations"
    """Outliers of attention logits and hidden states."""
    path: str = required(is_path=True)
    """The text: a file, folder, hub id or generator, as of a training source; or a .txt file, or `synthetic:prose`."""
    format: str = "auto"
    """Name of the row format. `auto`: recognised by the columns of the first row."""
    split: str = "test"
    """Split of a hub data set, a folder or a generator."""
    hub_name: str | None = None
    """Configuration of a hub data set. null: its default."""
    options: dict[str, Any] = key({})
    """Settings of a generator."""
    limit: int | None = key(None, low=1)
    """At most this many rows, the first ones. null: all."""
    num_tokens: int = key(400_000, low=1)
    """At most so many tokens; the paper has 0.4M. They go through the model twice."""
    length: int | None = key(None, low=2)
    """Tokens of a forward. null: the model's max_position_embeddings, at most 4096."""

    operand: ClassVar[str | None] = "path"

    def figures(self) -> list[str]:
        """The largest, and the median, of either kind."""
        return ["logits_top_1", "logits_top_100", "logits_median", "hidden_top_1", "hidden_top_100", "hidden_median"]

    def build(self, defaults: Defaults) -> "ActivationsTask":
        """The task with its text."""
        from difftune.evaluation.activations import ActivationsTask
        from difftune.tasks.documents import read_documents

        documents = read_documents(
            self.path,
            format=self.format,
            split=self.split,
            name=self.hub_name,
            options=self.options,
            limit=self.limit,
        )
        return ActivationsTask(self.task_name(), documents, self.num_tokens, self.length)
