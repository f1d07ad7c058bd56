"""Keys of the kind `needle`: facts hidden in a long text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from difftune.config.field import key
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.evaluation.needle import NeedleTask


@dataclass(kw_only=True)
class NeedleTaskConfig(TaskConfig):
    """Multi-needle retrieval."""

    kind: str = "needle"
    """Multi-needle retrieval: numbers of cities hidden in a long text, some of them asked for."""
    haystack: str = key("synthetic:prose", is_path=True)
    """The text: a .txt file or a folder of them, a data file with a text column, a hub id, or `synthetic:prose`."""
    column: str = "text"
    """The column with the text, where there are columns."""
    split: str = "test"
    """Split of a hub data set or a folder."""
    hub_name: str | None = None
    """Configuration of a hub data set. null: its default."""
    lengths: list[int] = key([4096], low=64)
    """Tokens of prompt and answer, the columns of the heat map; the paper has 4096, then 8192 to 65536."""
    depths: list[float] = key([0.0, 0.25, 0.5, 0.75, 1.0], low=0, high=1)
    """Where the first needle asked for stands, from the beginning (0) to the end (1) of the text: the rows."""
    needles: int = key(8, low=1)
    """Needles in a text (N); the paper has 1, 2, 4, 6 at 4K and 8 at 64K."""
    queries: int = key(1, low=1)
    """Needles that are asked for (R); the paper has 1 and 2."""
    samples: int = key(50, low=1)
    """Texts of each length and depth."""
    prompt: str = key("plain", choices=("plain", "chat", "completion"))
    """`plain`: the template of LWM's script; `chat`: the tokenizer's chat template; `completion`: the needle's own
    words up to the number, for models that follow no instructions."""
    max_new_tokens: int = key(64, low=1)
    """Longest answer in tokens."""
    batch_size: int | None = key(None, low=1)
    """Texts read together. null: `evaluation.batch_size`."""
    max_batch_tokens: int = key(65536, low=1)
    """Tokens read together, which makes batches of long texts smaller."""

    operand: ClassVar[str | None] = "haystack"

    def figures(self) -> list[str]:
        """Over all cells, and by length."""
        return ["accuracy", *(f"accuracy_{length}" for length in self.lengths)]

    def problems(self, defaults: Defaults) -> list[str]:
        """No more queries than needles."""
        found = []
        if self.queries > self.needles:
            found.append(f"queries: {self.queries} of {self.needles} needles cannot be asked for; raise needles")
        if self.prompt == "completion" and self.queries > 1:
            found.append(
                f"queries: prompt=completion asks for one number, got {self.queries}; set prompt=plain or chat"
            )
        found += [f"{name}: nothing to measure; name some" for name in ("lengths", "depths") if not getattr(self, name)]
        return found

    def build(self, defaults: Defaults) -> "NeedleTask":
        """The task with its text."""
        from difftune.data.texts import load_texts
        from difftune.evaluation.needle import NeedleTask

        texts = load_texts(
            self.haystack,
            column=self.column,
            split=self.split,
            name=self.hub_name,
            characters=16 * max(self.lengths),
            seed=defaults.seed,
        )
        return NeedleTask(
            self.task_name(),
            texts,
            lengths=self.lengths,
            depths=self.depths,
            needles=self.needles,
            queries=self.queries,
            samples_per_cell=self.samples,
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size or defaults.batch_size,
            max_batch_tokens=self.max_batch_tokens,
            seed=defaults.seed,
        )
