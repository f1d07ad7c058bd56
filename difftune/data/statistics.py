"""What is in the data, counted before training."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from difftune.data.corpus import Corpus
from difftune.data.packing import Rows


@dataclass(frozen=True)
class DataStatistics:
    """Counts of the training data under the settings of a run."""

    rows_read: int
    """Rows of all sources."""
    dropped: dict[str, int]
    """Rows that are not learned, by reason."""
    kept: int
    """Rows that are learned."""
    truncated: int
    """Kept rows that were cut to `seq_len`."""
    tokens: int
    """Tokens of the kept rows."""
    label_tokens: int
    """Tokens of the kept rows that are learned."""
    longest_row: int
    """Tokens of the longest row, before the limit."""
    eos_share: float
    """Share of kept rows that end in the end-of-text token; below 1 only where rows were truncated."""
    unknown_tokens: int
    """Tokens that the tokenizer does not know, before the limit."""
    batch_rows: int
    """Rows of the batches of one epoch: packs, or documents without packing."""
    padding_fraction: float
    """Share of an epoch's tokens that are padding."""
    seq_len: int
    """Most tokens of a row."""
    complete: bool
    """False when streaming: the counts are those of the first block."""
    repeated: int = 0
    """Kept rows that are further copies of long documents (or of others, so that the mix of the sources stays)."""
    long_rows: int | None = None
    """Kept rows that are long, copies included. None: no upsampling."""
    long_tokens: int | None = None
    """Their tokens."""
    first_bad: dict[str, str] = field(default_factory=dict)
    """Of each reason for which bad rows were dropped, the first row and what is wrong with it."""
    further_turns: int = 0
    """Documents beyond the first of their row: the chat template rewrites earlier turns, so each is one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file or a logger."""
        return asdict(self)

    def table(self) -> str:
        """The counts as aligned text, one a line."""
        share = self.label_tokens / self.tokens if self.tokens else 0.0
        lines = [
            ("rows read", f"{self.rows_read:,}" + ("" if self.complete else " (first block of a stream)")),
            *((f"  dropped: {reason}", f"{count:,}") for reason, count in sorted(self.dropped.items())),
            ("rows kept", f"{self.kept:,}"),
            *([("  of them truncated", f"{self.truncated:,}")] if self.truncated else []),
            *([("  of them further turns of a row", f"{self.further_turns:,}")] if self.further_turns else []),
            *([("  of them copies", f"{self.repeated:,}")] if self.long_rows is not None else []),
            ("tokens", f"{self.tokens:,}"),
            ("  of them learned", f"{self.label_tokens:,} ({share:.1%})"),
            *(self._long_lines()),
            *([("  unknown to the tokenizer", f"{self.unknown_tokens:,}")] if self.unknown_tokens else []),
            ("longest row", f"{self.longest_row:,} tokens (seq_len {self.seq_len:,})"),
            ("ending in EOS", f"{self.eos_share:.1%}"),
            ("batch rows an epoch", f"{self.batch_rows:,}"),
            ("padding", f"{self.padding_fraction:.1%}"),
        ]
        width = max(len(name) for name, _ in lines)
        counts = [f"{name:<{width}}  {value}" for name, value in lines]
        return "\n".join([*counts, *(f"first {reason}: {text}" for reason, text in sorted(self.first_bad.items()))])

    def _long_lines(self) -> list[tuple[str, str]]:
        if self.long_rows is None or self.long_tokens is None:
            return []
        share = self.long_tokens / self.tokens if self.tokens else 0.0
        return [("  of them in long documents", f"{self.long_tokens:,} ({share:.1%}) in {self.long_rows:,} rows")]


def count_corpus(
    corpus: Corpus,
    rows: Rows,
    *,
    packing: bool,
    micro_batch_size: int,
    eos_id: int,
    complete: bool,
    min_long: int | None = None,
) -> DataStatistics:
    """Count a corpus.

    Args:
        corpus: The data.
        rows: The batch rows of its first epoch.
        packing: Whether rows are padded to `seq_len`; else to the longest of each micro-batch.
        micro_batch_size: Rows of a micro-batch.
        eos_id: End-of-text token.
        complete: Whether this is all of the data.
        min_long: Tokens from which on a document is long, with upsampling.
    """
    tokens = int(corpus.lengths.sum())
    if packing:
        width = len(rows) * corpus.seq_len
    else:
        starts = np.arange(0, len(rows), micro_batch_size)
        longest = np.maximum.reduceat(corpus.lengths[rows.documents], starts) if len(rows) else starts
        width = int((longest * np.diff(starts, append=len(rows))).sum())
    return DataStatistics(
        rows_read=corpus.counts.rows_read,
        dropped=dict(corpus.counts.dropped),
        kept=len(corpus),
        truncated=corpus.truncated,
        tokens=tokens,
        label_tokens=int(corpus.label_counts.sum()),
        longest_row=corpus.longest,
        eos_share=corpus.ends_in(eos_id) / max(1, len(corpus)),
        unknown_tokens=corpus.counts.unknown_tokens,
        batch_rows=len(rows),
        padding_fraction=1 - tokens / width if width else 0.0,
        seq_len=corpus.seq_len,
        complete=complete,
        repeated=corpus.repeats,
        first_bad=dict(corpus.counts.first_bad),
        further_turns=corpus.further_turns,
        long_rows=None if min_long is None else int((corpus.lengths >= min_long).sum()),
        long_tokens=None if min_long is None else int(corpus.lengths[corpus.lengths >= min_long].sum()),
    )
