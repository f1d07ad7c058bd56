"""Keys of the kind `math`: problems with a final answer to generate and grade."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

from difftune.config.field import key, required
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.data.problems import Problems
    from difftune.evaluation.math import MathTask


@dataclass(kw_only=True)
class MathTaskConfig(TaskConfig):
    """One set of problems to generate answers for and grade."""

    kind: str = "math"
    """Problems with a final answer, generated and graded."""
    path: str = required(is_path=True)
    """A file of problems with their answers, a hub id, or `synthetic:arithmetic`; as of a training source. Also one of
    the paper's eight sets by name: gsm8k, math, svamp, asdiv, mawps, carp, tabmwp, college_math."""
    folder: str | None = key(None, is_path=True)
    """Where the paper's sets are: a file NAME.jsonl for each, with columns question and answer. null: the hub, which
    has all but carp, some of them in other sizes (docs/how-to/evaluate.md)."""
    name: str | None = None
    """Name in metrics and samples. null: the path's last part without its ending."""
    format: str = "auto"
    """Name of the row format. `auto`: recognised by the columns of the first row."""
    split: str | None = None
    """Split of a hub data set, a folder or a generator. null: that of a set of the paper, else `test`."""
    hub_name: str | None = None
    """Configuration of a hub data set, such as `main` of gsm8k. null: its default."""
    options: dict[str, Any] = key({})
    """Settings of a generator."""
    columns: dict[str, str] = key({})
    """Columns that have another name in the file: our name, then theirs, such as {question: task, answer: gold}."""
    limit: int | None = key(None, low=1)
    """Size of a random subset, drawn with `evaluation.seed`. null: all problems."""
    max_new_tokens: int | None = key(None, low=1)
    """Longest answer in tokens. null: `evaluation.max_new_tokens`. The paper has 1,024 after its first stage and 16,384
    after the second."""
    prompt: str = key("chat", choices=("chat", "boxed", "cot", "plain"))
    r"""`chat`: the chat template, as in training; `boxed`, `cot`: also asks for the answer in a box (in the words of
    OpenThoughts, of Qwen2.5-Math); `plain`: Question and Answer without a chat template."""
    num_shots: int = key(0, low=0)
    """Worked answers before every problem: the first ones of `shots_path`."""
    shots_path: str | None = key(None, is_path=True)
    """Where they are; as of a training source."""

    operand: ClassVar[str | None] = "path"

    def task_name(self) -> str:
        """Its own name, else the last part of the path without the ending."""
        return self.name or PurePath(self.path.replace(":", "/")).stem

    def figures(self) -> list[str]:
        """Accuracy and how the answers look."""
        return ["accuracy", "truncated", "unparsed", "mean_length"]

    def problems(self, defaults: Defaults) -> list[str]:
        """Where demonstrations come from."""
        if (self.num_shots > 0) == (self.shots_path is not None):
            return []
        return ["num_shots: goes with shots_path, a source of worked answers; set both, or neither"]

    def read(self, seed: int, limit: int | None) -> "Problems":
        """The problems of its set.

        Args:
            seed: Of the subset.
            limit: Size of the subset. None: all.

        Raises:
            ValueError: If they cannot be read.
        """
        from difftune.data.math_sets import locate_math_set
        from difftune.data.problems import load_problems

        where = locate_math_set(self.path, self.folder)
        assert where.path is not None, "refused by locate_math_set"
        return load_problems(
            where.path,
            limit,
            seed,
            format=where.format if self.format == "auto" else self.format,
            split=self.split or where.split,
            name=self.hub_name or where.hub_name,
            options=self.options,
            columns=self.columns,
        )

    def build(self, defaults: Defaults) -> "MathTask":
        """The task with its problems."""
        from difftune.data.math_sets import load_demonstrations
        from difftune.evaluation.math import MathTask

        problems = self.read(defaults.seed, self.limit)
        shots = load_demonstrations(self.shots_path, self.num_shots) if self.shots_path else []
        asked = {problem.question for problem in problems}
        if seen := [question for question, _ in shots if question in asked]:
            raise ValueError(f"{self.shots_path} shows the answer of a problem of {self.path}: {seen[0][:60]!r}")
        return MathTask(
            name=self.task_name(),
            problems=problems,
            dropped=problems.dropped,
            max_new_tokens=self.max_new_tokens or defaults.max_new_tokens,
            batch_size=defaults.batch_size,
            temperature=defaults.temperature,
            top_p=defaults.top_p,
            num_samples=defaults.num_samples,
            seed=defaults.seed,
            prompt=self.prompt,
            demonstrations=shots,
        )
