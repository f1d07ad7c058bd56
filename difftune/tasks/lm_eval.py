"""Keys of the kind `lm_eval`: tasks of the lm-evaluation-harness."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from difftune.config.field import key
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.evaluation.lm_eval import HarnessTask


@dataclass(kw_only=True)
class HarnessTaskConfig(TaskConfig):
    """Tasks of EleutherAI's lm-evaluation-harness."""

    kind: str = "lm_eval"
    """Tasks of the lm-evaluation-harness; needs `pip install 'difftune[lm-eval]'`."""
    tasks: str
    """Names of its tasks or groups, with commas between them: `hellaswag,arc_easy`."""
    num_fewshot: int | None = key(None, low=0)
    """Examples in front of each question. null: as the task says."""
    limit: int | None = key(None, low=1)
    """Documents of each task, the first ones; for trials only. null: all."""
    batch_size: int | None = key(None, low=1)
    """Requests run together. null: `evaluation.batch_size`."""
    max_length: int | None = key(None, low=1)
    """Longest sequence in tokens. null: the model's max_position_embeddings."""
    apply_chat_template: bool = False
    """Ask through the tokenizer's chat template."""
    include_path: str | None = key(None, is_path=True)
    """A folder with task definitions of one's own."""

    cache_dir: str | None = key(None, is_path=True)
    """Folder for the answers of a task that was interrupted; deleted when it is finished. null: `difftune/harness` in
    the user cache."""

    operand: ClassVar[str | None] = "tasks"

    def names(self) -> list[str]:
        """The tasks by name."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def figures(self) -> list[str]:
        """Accuracy, which most tasks measure; which metrics a task has is known when it has run."""
        return [f"{name}_{metric}" for name in self.names() for metric in ("acc", "acc_norm")]

    def build(self, defaults: Defaults) -> "HarnessTask":
        """The tasks, looked up in the harness."""
        from difftune.evaluation.lm_eval import HarnessTask

        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "difftune" / "harness"
        return HarnessTask(
            self.task_name(),
            self.names(),
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            batch_size=self.batch_size or defaults.batch_size,
            max_length=self.max_length,
            apply_chat_template=self.apply_chat_template,
            include_path=self.include_path,
            cache=Path(self.cache_dir) if self.cache_dir else home,
        )
