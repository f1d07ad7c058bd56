"""Keys of the kind `nll`: negative log-likelihood by position over long documents."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from difftune.config.field import key, required
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.evaluation.nll import NllTask


@dataclass(kw_only=True)
class NllTaskConfig(TaskConfig):
    """How well long documents are predicted, by position."""

    kind: str = "nll"
    """Cumulative average negative log-likelihood by position over long documents, in nats a token."""
    path: str = required(is_path=True)
    """A .txt file or a folder of them, a data file with a text column, a folder or hub id of these (the paper has
    books; PG-19 is usual), or `synthetic:prose`."""
    column: str = "text"
    """The column with the text, where there are columns."""
    split: str = "test"
    """Split of a hub data set or a folder."""
    hub_name: str | None = None
    """Configuration of a hub data set. null: its default."""
    limit: int | None = key(None, low=1)
    """Documents at most, the first ones. null: all."""
    join: bool = False
    """Join texts in their order to documents of at least eight characters for each token of `length`."""
    length: int = key(4096, low=2)
    """Tokens read of each document, up to 65,536 in the paper; shorter documents are left out and counted."""
    bins: int = key(64, low=1)
    """Points of the curve: bins of positions of equal size."""
    chunk_size: int = key(1024, low=1)
    """Tokens of one forward pass; memory grows with it."""

    operand: ClassVar[str | None] = "path"

    def figures(self) -> list[str]:
        """Over all positions, and over the last ones; the lower the better (`checkpoint.best_mode: min`)."""
        return ["nll", "nll_first", "nll_last"]

    def build(self, defaults: Defaults) -> "NllTask":
        """The task with its documents."""
        from difftune.data.texts import join_texts, load_texts
        from difftune.evaluation.nll import NllTask

        characters = 8 * self.length
        texts = load_texts(
            self.path,
            column=self.column,
            split=self.split,
            name=self.hub_name,
            limit=None if self.join else self.limit,
            characters=characters,
            seed=defaults.seed,
        )
        if self.join:
            texts = join_texts(texts, characters)[: self.limit]
        return NllTask(self.task_name(), texts, length=self.length, bins=self.bins, chunk_size=self.chunk_size)
