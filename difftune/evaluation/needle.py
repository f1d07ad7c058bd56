"""Multi-needle retrieval: does a model find a fact, among others like it, at a given depth of a long text?

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, section 3.4, Table 2 and Fig. 5: N needles, R queried, the
    answer at depth 0, 25, 50, 75 and 100%, 50 samples a cell. The paper gives no texts; those here are of the script
    that it follows, LargeWorldModel/LWM, scripts/eval_needle_multi.py.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.generation import generate_texts
from difftune.evaluation.haystack import CITIES, PROMPTS, Haystack, Needles, draw_needles
from difftune.evaluation.intervals import wilson_interval
from difftune.evaluation.task import Clock, ItemTask, mean, share, without_nan

PAPER_4K = {
    "diff_v1": {(1, 1): 1.00, (2, 2): 0.92, (4, 2): 0.84, (6, 2): 0.85},
    "softmax": {(1, 1): 1.00, (2, 2): 0.85, (4, 2): 0.62, (6, 2): 0.55},
}
"""Accuracy at 4,096 tokens by needles and queries in the paper's Table 2, 3B models."""
_LENGTHS_64K = range(8192, 65537, 8192)
PAPER_64K = {
    "diff_v1": dict(zip(_LENGTHS_64K, (1.00, 0.94, 0.87, 0.83, 0.83, 0.92, 0.84, 0.86), strict=True)),
    "softmax": dict(zip(_LENGTHS_64K, (0.95, 0.84, 0.78, 0.64, 0.50, 0.75, 0.78, 0.52), strict=True)),
}
"""Mean over the depths by length, one of eight needles queried, in the paper's Fig. 5, 3B models."""


@dataclass(frozen=True)
class Retrieval:
    """One haystack, as it is written to `samples/`."""

    index: int
    """Place of the haystack in its task."""
    length: int
    """Tokens of prompt and answer."""
    depth: float
    """Where the first queried needle stands, in 0..1."""
    numbers: dict[str, str]
    """The number of each queried city."""
    text: str
    """What the model wrote."""
    found: list[bool]
    """Whether the number of each queried city stands in it."""
    finished: bool
    """The model ended the text itself."""

    @property
    def score(self) -> float:
        """The share of the queried numbers that were found."""
        return fmean(self.found)


@dataclass(frozen=True)
class NeedleResult:
    """Figures of one evaluation. Shares in 0..1; NaN where nothing was measured."""

    lengths: list[int]
    """Columns of the heat map, in tokens."""
    depths: list[float]
    """Rows of the heat map, in 0..1."""
    cells: list[list[float]]
    """Mean score by depth, then by length."""
    counts: list[list[int]]
    """Haystacks that were measured in each cell."""
    total: int
    """Haystacks of the task."""
    samples: list[Retrieval] = field(repr=False)
    """Every haystack, in order."""
    needles: int = 0
    """Needles in a haystack."""
    queries: int = 0
    """Needles that were asked for."""

    @property
    def complete(self) -> bool:
        """Whether every haystack was measured."""
        return len(self.samples) == self.total

    @property
    def accuracy(self) -> float:
        """Mean score of all haystacks."""
        return mean([sample.score for sample in self.samples])

    @property
    def by_length(self) -> list[float]:
        """Mean score by length, as the bottom line of Fig. 5."""
        return [mean([s.score for s in self.samples if s.length == length]) for length in self.lengths]

    def metrics(self) -> dict[str, float]:
        """Accuracy with its 95% interval, and by length."""
        low, high = wilson_interval(self.accuracy, len(self.samples))
        figures = {"accuracy": self.accuracy, "accuracy_low": low, "accuracy_high": high}
        lengths = {f"accuracy_{length}": value for length, value in zip(self.lengths, self.by_length, strict=True)}
        return {**figures, **lengths, "n": float(len(self.samples))}

    def row(self) -> dict[str, str]:
        """The figures as text."""
        low, high = wilson_interval(self.accuracy, len(self.samples))
        return {
            "accuracy": share(self.accuracy),
            "95% interval": f"{low:.3f} to {high:.3f}",
            "n": str(len(self.samples)),
            "unfinished": f"{mean([not sample.finished for sample in self.samples]):.1%}",
        }

    def tables(self) -> list[Table]:
        """The heat map as numbers, with the paper's means beneath."""
        table = Table(title="accuracy by depth of the answer and length in tokens")
        table.add_column("depth", justify="right")
        for length in self.lengths:
            table.add_column(f"{length:,}", justify="right")
        for depth, cells in zip(self.depths, self.cells, strict=True):
            table.add_row(f"{depth:.0%}", *(share(value) for value in cells))
        table.add_row("mean", *(share(value) for value in self.by_length))
        for kind, title in (("diff_v1", "DIFF 3B"), ("softmax", "Transformer 3B")):
            known = [self._in_paper(kind, length) for length in self.lengths]
            if any(value is not None for value in known):
                shown = ("" if value is None else f"{value:.2f}" for value in known)
                table.add_row(f"paper: {title}", *shown, style="dim")
        return [table]

    def _in_paper(self, kind: str, length: int) -> float | None:
        if length == 4096:
            return PAPER_4K[kind].get((self.needles, self.queries))
        return PAPER_64K[kind].get(length) if (self.needles, self.queries) == (8, 1) else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON: None stands for NaN."""
        cells = [[None if value != value else value for value in row] for row in self.cells]
        shape = {"lengths": self.lengths, "depths": self.depths, "cells": cells, "counts": self.counts}
        return {**without_nan(self.metrics()), "n": len(self.samples), **shape}

    def __str__(self) -> str:
        """One line for the terminal."""
        return f"accuracy {share(self.accuracy)} on {len(self.samples)} haystacks"


@dataclass
class NeedleTask(ItemTask[Retrieval]):
    """Haystacks of some lengths, with the answer at some depths.

    Raises:
        ValueError: If a setting is out of range; while it runs, if the text is too short for a length.
    """

    name: str
    """Names the task in metrics and samples."""
    texts: Sequence[str]
    """What the needles are hidden in."""
    lengths: Sequence[int]
    """Tokens of prompt and answer."""
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the first queried needle stands, in 0..1."""
    needles: int = 8
    """Needles in a haystack (N)."""
    queries: int = 1
    """Needles that are asked for (R)."""
    samples_per_cell: int = 50
    """Haystacks of each length and depth."""
    prompt: str = "plain"
    """One of `difftune.evaluation.haystack.PROMPTS`."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    batch_size: int = 16
    """Haystacks read together."""
    max_batch_tokens: int = 65536
    """Tokens read together: long haystacks are fewer a batch, at least one."""
    seed: int = 0
    """Of the texts, numbers and places."""

    kind: ClassVar[str] = "needle"
    sample_type: ClassVar[type] = Retrieval

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.needles <= len(CITIES):
            raise ValueError(
                f"queries ({self.queries}) of task {self.name!r} must be between 1 and needles ({self.needles}), and "
                f"these at most {len(CITIES)}"
            )
        if self.prompt not in PROMPTS:
            raise ValueError(f"prompt of task {self.name!r} must be one of {', '.join(PROMPTS)}, got {self.prompt!r}")
        if self.prompt == "completion" and self.queries > 1:
            raise ValueError(f"prompt=completion of task {self.name!r} asks for one number: set queries=1")
        if not self.lengths or not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"task {self.name!r} needs lengths, and depths between 0 and 1")
        self._haystack: Haystack | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def num_items(self) -> int:
        """The number of haystacks."""
        return len(self.lengths) * len(self.depths) * self.samples_per_cell

    def cell(self, index: int) -> tuple[int, float]:
        """Length and depth of a haystack."""
        cell = index // self.samples_per_cell
        return self.lengths[cell // len(self.depths)], self.depths[cell % len(self.depths)]

    def blocks(self, indices: list[int]) -> list[list[int]]:
        """Batches of one length each, in an order drawn at random."""
        draw = random.Random(self.seed)
        blocks = []
        for length in self.lengths:
            same = [index for index in indices if self.cell(index)[0] == length]
            draw.shuffle(same)
            size = max(1, min(self.batch_size, self.max_batch_tokens // length))
            blocks += [same[start : start + size] for start in range(0, len(same), size)]
        draw.shuffle(blocks)
        return blocks

    def run_block(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> list[Retrieval]:
        """Ask for the needles of some haystacks."""
        built = [self.build(tokenizer, index) for index in indices]
        generations = generate_texts(
            model,
            tokenizer,
            [prompt for prompt, _ in built],
            max_new_tokens=self.max_new_tokens,
            batch_size=len(indices),
            should_stop=clock.is_over,
        )
        samples = []
        for index, (_, needles), generation in zip(indices, built, generations, strict=True):
            if generation.interrupted:
                continue
            length, depth = self.cell(index)
            numbers = {city: needles.numbers[city] for city in needles.queried}
            found = [number in generation.text for number in numbers.values()]
            samples.append(Retrieval(index, length, depth, numbers, generation.text, found, generation.finished))
        return samples

    def build(self, tokenizer: PreTrainedTokenizerBase, index: int) -> tuple[list[int], Needles]:
        """The prompt of a haystack, and what is hidden in it; the same at every call."""
        if self._haystack is None or self._tokenizer is not tokenizer:
            self._haystack = Haystack(self.texts, tokenizer, max(self.lengths), self.prompt)
            self._tokenizer = tokenizer
        length, depth = self.cell(index)
        draw = random.Random(f"{self.seed} {length} {depth} {index % self.samples_per_cell}")
        needles = draw_needles(draw, self.needles, self.queries)
        prompt = self._haystack.build(draw, needles, length=length, depth=depth, answer_tokens=self.max_new_tokens)
        return prompt, needles

    def summarise(self, samples: Iterable[Retrieval]) -> NeedleResult:
        """The heat map, over the haystacks of all parts."""
        done = sorted(samples, key=lambda sample: sample.index)
        scores: dict[tuple[float, int], list[float]] = {}
        for sample in done:
            scores.setdefault((sample.depth, sample.length), []).append(sample.score)
        grid = [[scores.get((depth, length), []) for length in self.lengths] for depth in self.depths]
        return NeedleResult(
            lengths=list(self.lengths),
            depths=list(self.depths),
            cells=[[mean(cell) for cell in row] for row in grid],
            counts=[[len(cell) for cell in row] for row in grid],
            total=self.num_items,
            samples=done,
            needles=self.needles,
            queries=self.queries,
        )
