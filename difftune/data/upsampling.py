"""Long documents more often: how many times each document of an epoch is taken.

Every source keeps its share of all tokens, and within each source the documents of at least ``min_tokens`` tokens come
to make up a given share. That is upsampling by length within every source, which Fu et al. found to serve long contexts
better than more books. Nothing is left out: the counts are the smallest that do both with every document at least once.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Upsampling:
    """How documents are upsampled.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Fu et al., "Data Engineering for Scaling Language Models to 128K Context", arXiv:2402.10171 (the protocol; the
        numbers are ours to choose).
    """

    min_tokens: int
    """Tokens from which on a document is long."""
    share: float
    """Share of the tokens of every source that is to be in long documents."""
    seed: int = 0
    """Draws the documents that are taken once more where the counts are no whole numbers."""

    def __post_init__(self) -> None:
        if self.min_tokens < 2 or not 0 < self.share < 1:
            raise ValueError(
                f"upsampling needs min_tokens of at least 2 and a share between 0 and 1, got {self.min_tokens} and "
                f"{self.share}"
            )

    def counts(self, lengths: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """How many times each document is taken: a function of the arguments and the seed.

        Tokens of a class of documents (long or short, of a source) are as many as asked for, to within half a document.

        Args:
            lengths: Tokens of each document.
            sources: Number of the source of each document, from 0.

        Returns:
            int64, the shape of `lengths`, each at least 1.
        """
        long = lengths >= self.min_tokens
        wanted: list[tuple[np.ndarray, float]] = []
        for source in np.unique(sources).tolist():
            mine = sources == source
            total, in_long = int(lengths[mine].sum()), int(lengths[mine & long].sum())
            share = 0.0 if in_long == 0 else max(self.share, in_long / total)
            wanted += [
                (np.flatnonzero(mine & chosen), part * total)
                for chosen, part in ((long, share), (~long, 1 - share))
                if (mine & chosen).any()
            ]
        # The class that would have to shrink most is taken once, and all others are scaled with it.
        scale = max((float(lengths[chosen].sum()) / tokens for chosen, tokens in wanted), default=1.0)
        counts = np.ones(len(lengths), dtype=np.int64)
        rng = np.random.default_rng([self.seed, 0x1096])
        for chosen, tokens in wanted:
            counts[chosen] = _repeats(lengths[chosen], scale * tokens, rng)
        return counts


def _repeats(lengths: np.ndarray, tokens: float, rng: np.random.Generator) -> np.ndarray:
    """Times that each document is taken for so many tokens, at least once: equally often, and some once more."""
    whole = int(lengths.sum())
    times, left = divmod(tokens, whole)
    counts = np.full(len(lengths), max(1, int(times)), dtype=np.int64)
    if times < 1:
        return counts
    order = rng.permutation(len(lengths))
    # As many documents as come nearest to what is left.
    reached = np.concatenate([[0], np.cumsum(lengths[order])])
    counts[order[: int(np.argmin(np.abs(reached - left)))]] += 1
    return counts
