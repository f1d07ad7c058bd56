"""The keys of `checkpoint` in a recipe: what is kept of a run."""

from dataclasses import dataclass

from difftune.config.field import key as _key


@dataclass
class CheckpointConfig:
    """What is kept of a run, to resume it and to choose from."""

    every_n_steps: int | None = _key(None, low=1)
    """Optimiser steps between two checkpoints. null: only at the end and when stopped by a signal."""
    keep_last: int = _key(2, low=1)
    """How many of the newest to keep; the best one is kept besides."""
    best_metric: str | None = None
    """Figure of an evaluation by which the best one is chosen, such as `eval/gsm8k/accuracy`. null: none is best."""
    best_mode: str = _key("max", choices=("max", "min"))
    """Whether more or less of it is better."""
    background: bool | None = None
    """Write regular checkpoints from a copy in the host's memory while the training goes on; the last one, those saved
    on a signal, and the best are waited for. null: with the strategy `fsdp`, where they are largest."""
