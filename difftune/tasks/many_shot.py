"""Keys of the kind `many_shot`: classification from demonstrations in the prompt."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from difftune.config.field import key
from difftune.tasks.base import Defaults, TaskConfig

if TYPE_CHECKING:
    from difftune.evaluation.many_shot import ManyShotTask

SETS = ("trec", "trec_fine", "banking77", "clinic150")
"""The sets of the paper; `difftune.data.labelled.SETS` says what they are."""


@dataclass(kw_only=True)
class ManyShotTaskConfig(TaskConfig):
    """Many-shot in-context learning."""

    kind: str = "many_shot"
    """Classification from demonstrations in the prompt: the most likely label wins."""
    set: str | None = key(None, choices=SETS)
    """A public set, whose files are in `folder`: `SET_train.jsonl` and `SET_test.jsonl` (of trec for trec_fine). null:
    `train` and `test` name the files."""
    folder: str | None = key(None, is_path=True)
    """Folder with the files of `set`."""
    train: str | None = key(None, is_path=True)
    """Data file that demonstrations are drawn from."""
    test: str | None = key(None, is_path=True)
    """Data file with the examples to classify."""
    text_column: str = "text"
    """The column with the text."""
    label_column: str | None = None
    """The column with the label. null: that of the set, else `label`."""
    text_prefix: str | None = None
    """What stands before a text in the prompt. null: that of the set, else `Input:`."""
    label_prefix: str | None = None
    """What stands before a label. null: that of the set, else `Label:`."""
    per_class: list[int] = key([1], low=1)
    """Demonstrations of each class, where `shots` is empty; one prompt for each number."""
    shots: list[int] = key([], low=1)
    """Demonstrations in all, as many of each class as can be; one prompt for each number."""
    order: str = key("random", choices=("random", "alternating"))
    """Order of the demonstrations: drawn at random, or one of each class in turn."""
    orders: int = key(1, low=1)
    """Orders of the same demonstrations, for the margin of the best over the worst; the paper has 10 random ones and 30
    alternating ones."""
    limit: int | None = key(100, low=1)
    """Test examples: a random subset, drawn with `evaluation.seed`. null: all."""
    max_tokens: int = key(65536, low=16)
    """Longest prompt in tokens; a number of demonstrations that needs more is left out."""
    chunk_size: int = key(1024, low=1)
    """Tokens of one forward pass."""
    max_batch_tokens: int = key(16384, low=1)
    """Tokens in the cache of labels that are scored together, each with a copy of the prompt; memory grows with it."""

    operand: ClassVar[str | None] = "set"

    def task_name(self) -> str:
        """Its own name, else that of the set."""
        return self.name or self.set or self.kind

    def figures(self) -> list[str]:
        """With the most demonstrations, by their number where it is given; extremes and margins of several orders."""
        names = ["accuracy", *(f"accuracy_{shots}" for shots in self.shots)]
        if self.orders > 1:
            names += ["best", "worst", "margin", *(f"margin_{shots}" for shots in self.shots)]
        return names

    def problems(self, defaults: Defaults) -> list[str]:
        """Where the examples come from."""
        found = []
        if self.set is not None and self.folder is None and not (self.train and self.test):
            found.append(f"folder: say where the files of {self.set} are (docs/how-to/evaluate.md: where to get them)")
        if self.set is None and not (self.train and self.test):
            found.append(f"set: name one of {', '.join(SETS)}, or the files train and test")
        if not self.shots and not self.per_class:
            found.append("shots: nothing to measure; name some, or per_class")
        return found

    def build(self, defaults: Defaults) -> "ManyShotTask":
        """The task with its examples."""
        from difftune.data.labelled import SETS as KNOWN
        from difftune.data.labelled import load_labelled, readable_intent
        from difftune.evaluation.many_shot import ManyShotTask

        known = KNOWN[self.set] if self.set else None
        folder = Path(self.folder or ".")
        label_column = self.label_column or (known.label_column if known else "label")
        readable = known.readable if known else readable_intent
        train, test = (
            load_labelled(path, text_column=self.text_column, label_column=label_column, readable=readable)
            for path in (
                self.train or folder / (known.train if known else ""),
                self.test or folder / (known.test if known else ""),
            )
        )
        if self.limit is not None and self.limit < len(test):
            chosen = random.Random(defaults.seed).sample(range(len(test)), self.limit)
            test = [test[index] for index in sorted(chosen)]
        classes = len({example.label for example in train})
        return ManyShotTask(
            self.task_name(),
            train,
            test,
            shots=sorted(set(self.shots or [count * classes for count in self.per_class])),
            text_prefix=self.text_prefix or (known.text_prefix if known else "Input:"),
            label_prefix=self.label_prefix or (known.label_prefix if known else "Label:"),
            order=self.order,
            orders=self.orders,
            max_tokens=self.max_tokens,
            chunk_size=self.chunk_size,
            max_batch_tokens=self.max_batch_tokens,
            seed=defaults.seed,
        )
