"""Cumulative average negative log-likelihood by position over long documents: does more context help?

At position p it is the mean over the documents of ``1/p * sum of the NLL of tokens 1 .. p``, in nats a token. A model
that makes use of its context keeps falling; one that cannot reach further goes flat, or rises.

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, section 3.3 and Fig. 4 (book data, within 64K). The paper
    names no corpus; PG-19 is the usual one.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.likelihood import token_nll, warn_if_too_long
from difftune.evaluation.task import Clock, ItemTask, without_nan
from difftune.rendering import text_ids

log = logging.getLogger(__name__)

_ROWS = 12


@dataclass(frozen=True)
class DocumentNll:
    """One document, as it is written to `samples/`."""

    index: int
    """Place of the document."""
    num_tokens: int
    """Tokens that were predicted: one fewer than were read."""
    sums: list[float]
    """Sum of the NLL in each bin of positions, in nats; empty for a document that is too short."""


@dataclass(frozen=True)
class NllResult:
    """Figures of one evaluation, all in nats a token; NaN where there is no document."""

    positions: list[int]
    """The last position of each bin, counted from 1: the number of tokens predicted so far."""
    cumulative: list[float]
    """Mean NLL of all tokens up to there."""
    by_bin: list[float]
    """Mean NLL of the tokens of the bin alone."""
    spread: list[float]
    """Standard error of `cumulative` over the documents; NaN for a single one."""
    n: int
    """Documents that were measured."""
    too_short: int
    """Documents with fewer tokens than are read, left out: every position is measured on the same documents."""
    skipped: int
    """Documents that the time did not allow."""
    samples: list[DocumentNll] = field(repr=False)
    """Every document, in order."""

    @property
    def complete(self) -> bool:
        """Whether every document was measured."""
        return self.skipped == 0

    def metrics(self) -> dict[str, float]:
        """The mean over all positions, over the first and over the last bin."""
        figures = {"nll": self.cumulative[-1], "nll_first": self.by_bin[0], "nll_last": self.by_bin[-1]}
        return {**figures, "n": float(self.n)}

    def row(self) -> dict[str, str]:
        """The figures as text."""
        figures = self.metrics()
        return {
            "nats a token": f"{figures['nll']:.4f}",
            "first bin": f"{figures['nll_first']:.4f}",
            "last bin": f"{figures['nll_last']:.4f}",
            "tokens": f"{self.positions[-1]:,}",
            "documents": str(self.n) + (f" ({self.too_short} too short)" if self.too_short else ""),
        }

    def tables(self) -> list[Table]:
        """The curve, at no more than a dozen positions; the results hold all."""
        table = Table(title="NLL by position, nats a token")
        for column in ("position", "up to there", "in the bin"):
            table.add_column(column, justify="right")
        step = -(-len(self.positions) // _ROWS)
        for at in range(len(self.positions) - 1, -1, -step)[::-1] if self.n else ():
            table.add_row(f"{self.positions[at]:,}", f"{self.cumulative[at]:.4f}", f"{self.by_bin[at]:.4f}")
        return [table]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON: None stands for NaN."""
        curves = {
            name: [None if value != value else value for value in getattr(self, name)]
            for name in ("positions", "cumulative", "by_bin", "spread")
        }
        counts = {"n": self.n, "too_short": self.too_short, "skipped": self.skipped}
        return {**without_nan(self.metrics()), **counts, **curves}

    def __str__(self) -> str:
        """One line for the terminal."""
        figures = self.metrics()
        return (
            f"{figures['nll']:.4f} nats a token over {self.positions[-1]:,} positions of {self.n} documents, "
            f"{figures['nll_last']:.4f} in the last bin"
        )


@dataclass
class NllTask(ItemTask[DocumentNll]):
    """Documents whose tokens are predicted one after the other.

    Raises:
        ValueError: If there is no text, or a number is out of range; after it ran, if all texts are too short.
    """

    name: str
    """Names the task in metrics and samples."""
    texts: Sequence[str]
    """The documents."""
    length: int
    """Tokens read of each document, from its beginning."""
    bins: int = 64
    """Points of the curve: the positions are cut into so many bins of equal size."""
    chunk_size: int = 1024
    """Tokens of one forward pass."""

    kind: ClassVar[str] = "nll"
    sample_type: ClassVar[type] = DocumentNll

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError(f"evaluation task {self.name!r} has no text")
        if self.length < 2 or self.bins < 1 or self.chunk_size < 1:
            raise ValueError(
                f"length ({self.length}) of task {self.name!r} must be at least 2, bins ({self.bins}) and chunk_size "
                f"({self.chunk_size}) at least 1"
            )
        self.bins = min(self.bins, self.length - 1)

    @property
    def num_items(self) -> int:
        """The number of documents."""
        return len(self.texts)

    @property
    def edges(self) -> list[int]:
        """Positions at which the bins end; the first begins at 0."""
        return [round((self.length - 1) * (bin + 1) / self.bins) for bin in range(self.bins)]

    def run_block(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> list[DocumentNll]:
        """One document."""
        warn_if_too_long(model, self.name, self.length)
        samples = []
        for index in indices:
            # Room for several characters a token; a tokenizer reads a whole book slowly, and most of it in vain.
            ids = text_ids(tokenizer, self.texts[index][: 32 * self.length])[: self.length]
            if len(ids) < self.length:
                samples.append(DocumentNll(index, max(0, len(ids) - 1), []))
                continue
            nll = token_nll(model, torch.tensor(ids), chunk_size=self.chunk_size, clock=clock)
            if nll is None:
                return samples
            starts = [0, *self.edges[:-1]]
            sums = [float(nll[start:end].double().sum()) for start, end in zip(starts, self.edges, strict=True)]
            samples.append(DocumentNll(index, len(nll), sums))
        return samples

    def summarise(self, samples: Iterable[DocumentNll]) -> NllResult:
        """The curve, over the documents of all parts."""
        done = sorted(samples, key=lambda sample: sample.index)
        long = [sample for sample in done if sample.sums]
        if done and not long:
            raise ValueError(
                f"no document of task {self.name!r} has {self.length} tokens, the longest has "
                f"{max(sample.num_tokens for sample in done) + 1}: lower length, or join the texts"
            )
        sums = torch.tensor([sample.sums for sample in long], dtype=torch.float64).reshape(len(long), self.bins)
        ends = torch.tensor(self.edges, dtype=torch.float64)
        cumulative = sums.cumsum(1) / ends
        sizes = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.float64))
        nan = [float("nan")] * self.bins
        error = cumulative.std(0) / len(long) ** 0.5 if len(long) > 1 else torch.tensor(nan)
        return NllResult(
            positions=self.edges,
            cumulative=cumulative.mean(0).tolist(),
            by_bin=(sums / sizes).mean(0).tolist(),
            spread=error.tolist(),
            n=len(long),
            too_short=len(done) - len(long),
            skipped=self.num_items - len(done),
            samples=done,
        )
