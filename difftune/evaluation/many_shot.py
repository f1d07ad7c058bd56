"""Many-shot in-context learning: classification from demonstrations in the prompt, and what their order does to it.

The label is the one of the highest log-likelihood after the prompt. The demonstrations are read once for all test
examples.

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, section 3.5, Fig. 6 and 7, after the protocol of Bertsch et
    al. 2024 and the constrained decoding of Ratner et al. 2023.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.demonstrations import ORDERS, Labelled, Template, arrange, select
from difftune.evaluation.intervals import wilson_interval
from difftune.evaluation.likelihood import Reader, warn_if_too_long
from difftune.evaluation.task import Clock, ItemTask, share, without_nan

log = logging.getLogger(__name__)

_EXAMPLES_A_BLOCK = 10

PAPER = {
    ("trec", "random"): {"diff_v1": (0.906, 0.92, 0.88), "softmax": (0.746, 0.82, 0.63)},
    ("trec", "alternating"): {"diff_v1": (0.899, 0.967, 0.833), "softmax": (0.659, 0.867, 0.300)},
    ("trec_fine", "random"): {"diff_v1": (0.829, 0.88, 0.79), "softmax": (0.647, 0.74, 0.50)},
    ("banking77", "random"): {"diff_v1": (0.761, 0.81, 0.72), "softmax": (0.645, 0.71, 0.58)},
    ("clinic150", "random"): {"diff_v1": (0.790, 0.82, 0.76), "softmax": (0.752, 0.81, 0.69)},
}
"""Mean, best and worst order by set and kind of order in the paper's Fig. 7 and 11: 3B models, 10 random orders or 30
alternating ones of as many demonstrations as fit 64K tokens."""


@dataclass(frozen=True)
class Classification:
    """One test example after one prompt, as it is written to `samples/`."""

    index: int
    """Place of prompt and example in the task."""
    shots: int
    """Demonstrations in the prompt."""
    order: int
    """Which order they are in."""
    text: str
    """What was to be classified."""
    label: str
    """Its class."""
    predicted: str | None
    """The most likely class; None where the prompt is longer than `max_tokens`."""
    log_likelihood: float | None
    """Of that class, in nats."""


@dataclass(frozen=True)
class ShotFigures:
    """Figures of one number of demonstrations."""

    shots: int
    """Demonstrations."""
    accuracies: list[float]
    """By order of the demonstrations, those that were measured to their end."""
    n: int
    """Test examples of an order."""

    @property
    def accuracy(self) -> float:
        """Mean over the orders."""
        return fmean(self.accuracies) if self.accuracies else float("nan")

    @property
    def best(self) -> float:
        """The best order; NaN where none was measured."""
        return max(self.accuracies, default=float("nan"))

    @property
    def worst(self) -> float:
        """The worst order; NaN where none was measured."""
        return min(self.accuracies, default=float("nan"))

    @property
    def margin(self) -> float:
        """Best minus worst order; NaN with fewer than two."""
        return self.best - self.worst if len(self.accuracies) > 1 else float("nan")


@dataclass(frozen=True)
class ManyShotResult:
    """Figures of one evaluation. Shares in 0..1; NaN where nothing was measured."""

    by_shots: list[ShotFigures]
    """In the order of the numbers of demonstrations; those whose prompt is too long are left out."""
    classes: int
    """How many classes there are."""
    orders: int
    """Orders of the demonstrations that were asked for."""
    total: int
    """Items of the task."""
    samples: list[Classification] = field(repr=False)
    """Every classification, in order."""
    name: str = ""
    """Of the set."""
    order: str = "random"
    """Kind of order of the demonstrations."""

    @property
    def complete(self) -> bool:
        """Whether every example was classified after every prompt."""
        return len(self.samples) == self.total

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.classes

    def metrics(self) -> dict[str, float]:
        """Accuracy with the most demonstrations, and by their number; of several orders the extremes and margins."""
        last = self.by_shots[-1] if self.by_shots else ShotFigures(0, [], 0)
        low, high = wilson_interval(last.accuracy, last.n) if last.accuracies else (0.0, 1.0)
        figures = {"accuracy": last.accuracy, "accuracy_low": low, "accuracy_high": high, "chance": self.chance}
        figures |= {f"accuracy_{shot.shots}": shot.accuracy for shot in self.by_shots}
        if self.orders > 1:
            figures |= {"best": last.best, "worst": last.worst, "margin": last.margin}
            figures |= {f"margin_{shot.shots}": shot.margin for shot in self.by_shots}
        return {**figures, "n": float(last.n)}

    def row(self) -> dict[str, str]:
        """The figures as text."""
        figures = self.metrics()
        return {
            "accuracy": share(figures["accuracy"]),
            "95% interval": f"{figures['accuracy_low']:.3f} to {figures['accuracy_high']:.3f}",
            "chance": share(self.chance),
            "shots": str(self.by_shots[-1].shots) if self.by_shots else "-",
            "n": f"{figures['n']:.0f}",
        }

    def tables(self) -> list[Table]:
        """By number of demonstrations, where there is more to show than the row does; the paper's orders beneath."""
        if len(self.by_shots) < 2 and self.orders < 2:
            return []
        table = Table(title="accuracy by number of demonstrations")
        for column in ("demonstrations", "mean", "best order", "worst order", "margin", "orders"):
            table.add_column(column, justify="right")
        for shot in self.by_shots:
            cells = (share(value) for value in (shot.accuracy, shot.best, shot.worst, shot.margin))
            table.add_row(str(shot.shots), *cells, str(len(shot.accuracies)))
        paper = PAPER.get((self.name, self.order), {}) if self.orders > 1 else {}
        for kind, title in (("diff_v1", "DIFF 3B"), ("softmax", "Transformer 3B")):
            if kind in paper:
                mean, best, worst = paper[kind]
                cells = (share(value) for value in (mean, best, worst, best - worst))
                table.add_row(f"paper: {title}", *cells, "30" if self.order == "alternating" else "10", style="dim")
        return [table]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON: None stands for NaN."""
        by_shots = [{"shots": shot.shots, "accuracies": shot.accuracies, "n": shot.n} for shot in self.by_shots]
        return {**without_nan(self.metrics()), "classes": self.classes, "by_shots": by_shots}

    def __str__(self) -> str:
        """One line for the terminal."""
        row = self.row()
        return f"accuracy {row['accuracy']} ({row['95% interval']}) with {row['shots']} demonstrations"


@dataclass
class ManyShotTask(ItemTask[Classification]):
    """Prompts of several lengths and orders, and test examples to classify after each.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: str
    """Names the task in metrics and samples."""
    train: Sequence[Labelled]
    """What demonstrations are drawn from."""
    test: Sequence[Labelled]
    """What is classified."""
    shots: Sequence[int]
    """Numbers of demonstrations."""
    text_prefix: str = "Question:"
    """What stands before a text."""
    label_prefix: str = "Type:"
    """What stands before a label."""
    order: str = "random"
    """One of `difftune.evaluation.demonstrations.ORDERS`."""
    orders: int = 1
    """Orders of the same demonstrations."""
    max_tokens: int = 65536
    """Longest prompt; longer ones are left out, with a warning."""
    chunk_size: int = 1024
    """Tokens of one forward pass."""
    max_batch_tokens: int = 16384
    """Tokens in the cache of labels that are scored together, each with a copy of the prompt."""
    seed: int = 0
    """Of the choice of demonstrations; orders are numbered from 0 whatever the seed."""

    kind: ClassVar[str] = "many_shot"
    sample_type: ClassVar[type] = Classification

    def __post_init__(self) -> None:
        if not self.test or not self.shots or self.orders < 1:
            raise ValueError(f"task {self.name!r} needs test examples, numbers of shots, and at least one order")
        if self.order not in ORDERS:
            raise ValueError(f"order of task {self.name!r} must be one of {', '.join(ORDERS)}, got {self.order!r}")
        unknown = {example.label for example in self.test} - set(self.labels)
        if unknown:
            raise ValueError(
                f"task {self.name!r}: {sorted(unknown)[0]!r} is a label of the test but of no demonstration"
            )
        for shots in self.shots:
            select(self.train, shots, self.seed)
        self._reader: tuple[int, Reader] | None = None

    @cached_property
    def labels(self) -> list[str]:
        """All classes, sorted."""
        return sorted({example.label for example in self.train})

    @property
    def num_items(self) -> int:
        """The number of prompts times that of test examples."""
        return len(self.shots) * self.orders * len(self.test)

    def prompt(self, index: int) -> tuple[int, int]:
        """Number of demonstrations and order of an item."""
        prompt = index // len(self.test)
        return self.shots[prompt // self.orders], prompt % self.orders

    def blocks(self, indices: list[int]) -> list[list[int]]:
        """A few examples after the same prompt; prompt by prompt, so that each is read once."""
        blocks = []
        for prompt in sorted({index // len(self.test) for index in indices}):
            same = [index for index in indices if index // len(self.test) == prompt]
            blocks += [same[start : start + _EXAMPLES_A_BLOCK] for start in range(0, len(same), _EXAMPLES_A_BLOCK)]
        return blocks

    def run(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        part: tuple[int, int] = (0, 1),
        should_stop: Callable[[], bool] | None = None,
        deadline: float | None = None,
        done: Sequence[Classification] = (),
        on_block: Callable[[list[Classification]], None] | None = None,
    ) -> list[Classification]:
        """As `ItemTask.run`; what a prompt left in the cache is let go of at the end, as the weights may change."""
        try:
            return super().run(
                model,
                tokenizer,
                part=part,
                should_stop=should_stop,
                deadline=deadline,
                done=done,
                on_block=on_block,
            )
        finally:
            self._reader = None

    def run_block(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> list[Classification]:
        """Classify examples after one prompt."""
        template = Template(tokenizer, self.text_prefix, self.label_prefix)
        shots, order = self.prompt(indices[0])
        place = indices[0] // len(self.test)
        answers = [template.answer(label) for label in self.labels]
        if self._reader is None or self._reader[0] != place:
            self._reader = None  # before the next one takes its memory
            chosen = arrange(select(self.train, shots, self.seed), self.order, order)
            ids = template.demonstrations(chosen)
            longest = max(len(template.query(example.text)) for example in self.test) + max(map(len, answers))
            if len(ids) + longest > self.max_tokens:
                log.warning(
                    "%s: %d demonstrations have %d tokens, beyond max_tokens (%d): left out",
                    self.name,
                    shots,
                    len(ids) + longest,
                    self.max_tokens,
                )
                return [self._sample(index, None, None) for index in indices]
            warn_if_too_long(model, self.name, len(ids) + longest)
            reader = Reader(model, chunk_size=self.chunk_size, clock=clock, max_batch_tokens=self.max_batch_tokens)
            if reader.read(ids) is None:
                return []
            self._reader = (place, reader)
        samples = []
        for index in indices:
            text = self.test[index % len(self.test)].text
            found = self._reader[1].most_likely(template.query(text), answers)
            if found is None:
                break
            samples.append(self._sample(index, self.labels[found[0]], found[1]))
        return samples

    def _sample(self, index: int, predicted: str | None, log_likelihood: float | None) -> Classification:
        example = self.test[index % len(self.test)]
        shots, order = self.prompt(index)
        return Classification(index, shots, order, example.text, example.label, predicted, log_likelihood)

    def summarise(self, samples: Iterable[Classification]) -> ManyShotResult:
        """Figures by number of demonstrations; an order that is not complete is left out."""
        done = sorted(samples, key=lambda sample: sample.index)
        right: dict[tuple[int, int], list[bool]] = {}
        for sample in done:
            if sample.predicted is not None:
                right.setdefault((sample.shots, sample.order), []).append(sample.predicted == sample.label)
        figures = []
        for shots in sorted(set(self.shots)):
            whole = [
                right[shots, order]
                for order in range(self.orders)
                if len(right.get((shots, order), ())) == len(self.test)
            ]
            if whole:
                figures.append(ShotFigures(shots, [fmean(answers) for answers in whole], len(self.test)))
        return ManyShotResult(figures, len(self.labels), self.orders, self.num_items, done, self.name, self.order)
