"""The keys of `data.upsample` in a recipe: long documents more often."""

from dataclasses import dataclass

from difftune.config.field import key as _key


@dataclass
class UpsampleConfig:
    """Long documents more often, so that they make up a given share of the tokens of every source."""

    min_tokens: int = _key(4096, low=2)
    """Tokens from which on a document is long; what is cut to `data.seq_len` counts as it is cut."""
    share: float = _key(0.7, above=0, high=0.99)
    """Share of the tokens of every source that its long documents make up; a source with more of them keeps its own.
    What the sources have of all tokens stays, and no document is left out, so an epoch becomes longer."""
