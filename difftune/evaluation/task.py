"""What every kind of evaluation task is: items that are measured one after the other, and a result made of them.

An item is the smallest thing that is written to `samples/` and not done twice: a problem, a haystack, a document. Tasks
are interruptible (a deadline, a signal, Ctrl-C) and go on after the items that were done.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase


class Sample(Protocol):
    """What came out of one item: a dataclass of plain values, as it is written to `samples/`."""

    @property
    def index(self) -> int:
        """Place of the item in its task; an item may have several samples."""


S = TypeVar("S", bound=Sample)


class Result(Protocol):
    """What came out of a task."""

    @property
    def complete(self) -> bool:
        """Whether it covers all items of the task."""

    @property
    def samples(self) -> Sequence[Any]:
        """The samples in the order of the items."""

    def metrics(self) -> dict[str, float]:
        """The figures to log, by name."""

    def row(self) -> dict[str, str]:
        """The figures as text, by column of the table that is printed."""

    def tables(self) -> list[Table]:
        """What else there is to print."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON."""

    def __str__(self) -> str:
        """What a reader of the terminal wants to know, in one line."""


class Task(Protocol[S]):
    """Something that can be evaluated, such as `difftune.evaluation.math.MathTask`."""

    kind: ClassVar[str]
    """Its kind, as in a recipe."""
    name: str
    """Names it in metrics and samples."""
    sample_type: ClassVar[type]
    """The dataclass of its samples."""
    failure: str | None
    """What it needs and could not reach, so that it stopped; None: nothing."""

    @property
    def num_items(self) -> int:
        """How many items it has."""

    def run(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        part: tuple[int, int],
        should_stop: Callable[[], bool] | None,
        deadline: float | None,
        done: Sequence[S] = (),
        on_block: Callable[[list[S]], None] | None = None,
    ) -> list[S]:
        """Samples of part r of w of the task, as far as the time allows; see `ItemTask.run`."""

    def summarise(self, samples: Iterable[S]) -> Result:
        """The result of the samples of all parts."""

    def close(self) -> None:
        """Let go of processes and the like."""


class Clock:
    """When to stop."""

    def __init__(self, should_stop: Callable[[], bool] | None, deadline: float | None) -> None:
        self._should_stop, self._deadline = should_stop, deadline
        self._rang = False

    def is_over(self) -> bool:
        """Whether the time is over or the caller said so; once it is, it stays so."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        self._rang = self._rang or late or (self._should_stop is not None and self._should_stop())
        return self._rang

    def ring(self) -> None:
        """The task cannot go on, for a reason of its own."""
        self._rang = True


class ItemTask(Generic[S]):
    """The part of a task that all kinds share; a kind adds `num_items`, `run_block` and `summarise`."""

    kind: ClassVar[str]
    sample_type: ClassVar[type]
    name: str
    failure: str | None = None
    """What the task needs and could not reach, so that it stopped; None: nothing."""

    @property
    def num_items(self) -> int:
        """How many items the task has."""
        raise TypeError(f"{type(self).__name__} does not count its items")

    def blocks(self, indices: list[int]) -> Iterable[list[int]]:
        """The items in the order and the blocks in which they are done.

        One by one, in an order drawn at random (the same at every call), so that what is done when the time is over is
        a fair sample of the whole.
        """
        order = sorted(indices)
        random.Random(0).shuffle(order)
        return [[index] for index in order]

    def run_block(self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock) -> list[S]:
        """The samples of some items, without those that the time did not allow; in evaluation mode, no gradients."""
        raise TypeError(f"{type(self).__name__} does not say how it is run")

    def run(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        part: tuple[int, int] = (0, 1),
        should_stop: Callable[[], bool] | None = None,
        deadline: float | None = None,
        done: Sequence[S] = (),
        on_block: Callable[[list[S]], None] | None = None,
    ) -> list[S]:
        """Measure the items.

        Args:
            model: A causal language model of transformers' kind; mode and random state stay as they are.
            tokenizer: Its tokenizer.
            part: (r, w): only items r, r + w, ..., for rank r of w.
            should_stop: Polled while items are measured; True ends the work.
            deadline: A value of `time.monotonic()` that ends the work.
            done: Samples of an earlier run: their items are not done again.
            on_block: Called with the new samples after each block of items.

        Returns:
            The samples, those of `done` that belong to the part among them; items that the time did not allow have
            none.
        """
        indices = set(range(part[0], self.num_items, part[1]))
        samples = [sample for sample in done if sample.index in indices]
        clock = Clock(should_stop, deadline)
        with evaluation_mode(model):
            finished = {sample.index for sample in samples}
            # The blocks of the whole part: one that was not begun draws the same numbers as it would have.
            for whole in self.blocks(sorted(indices)):
                block = [index for index in whole if index not in finished]
                if not block:
                    continue
                if clock.is_over():
                    break
                new = self.run_block(model, tokenizer, block, clock)
                samples += new
                if on_block is not None and new:
                    on_block(new)
        return samples

    def close(self) -> None:
        """Let go of processes and the like."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for a while."""
    # Module by module: a frozen part of a model in training may well be in evaluation mode.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def share(value: float) -> str:
    """A share as the tables show it; a dash for NaN."""
    return "-" if value != value else f"{value:.3f}"


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return fmean(values) if values else float("nan")


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Values for JSON: None stands for NaN."""
    return {name: None if value != value else value for name, value in values.items()}
