"""What `difftune convert` does: one checkpoint to another kind or layout, and how far it is from what it was."""

from collections.abc import Callable
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from difftune.checkpoints.compare import Difference
from difftune.checkpoints.convert import MAX_SHARD_BYTES, Conversion, convert_checkpoint
from difftune.terminal import console, say, set_up_logging


def convert(
    source: str,
    *,
    to: str,
    out: Path,
    text: Path | None = None,
    subln: str | None = None,
    lambda_init: float | None = None,
    lambda_warmup_steps: int | None = None,
    dtype: str | None = None,
    max_shard_gb: float | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a checkpoint to another kind or layout, and print how far the result is from it.

    Args:
        source: A folder, hub id, GGUF file or state dict file.
        to: One of `difftune.checkpoints.convert.TARGETS`.
        out: The folder to make.
        text: File to compare the losses on.
        subln: Sublayer norm where a softmax model becomes V1.
        lambda_init: Lambda at the start, for the same.
        lambda_warmup_steps: Optimiser steps over which it rises from almost 0, for the same. None: none.
        dtype: Of the weights: float32, bfloat16, float16. None: as stored.
        max_shard_gb: Largest weight file, in 10^9 bytes.
        overwrite: Replace a model folder that is there.
    """
    set_up_logging()
    names = ("float32", "bfloat16", "float16")
    if dtype is not None and dtype not in names:
        raise ValueError(f"dtype {dtype!r} is unknown: choose one of {', '.join(names)}")
    if max_shard_gb is not None and max_shard_gb <= 0:
        raise ValueError(f"the largest weight file must have more than 0 GB, got {max_shard_gb}")
    with console.status(escape(f"converting {source}")):
        conversion = convert_checkpoint(
            source,
            to,
            out,
            subln=subln,
            lambda_init=lambda_init,
            lambda_warmup_steps=lambda_warmup_steps,
            text=text,
            dtype=None if dtype is None else getattr(torch, dtype),
            overwrite=overwrite,
            max_shard_bytes=MAX_SHARD_BYTES if max_shard_gb is None else int(max_shard_gb * 1e9),
        )
    console.print(_difference_table(conversion))
    say(f"{conversion.path}: {conversion.method}")
    say(f"{conversion.seconds:.0f} s, peak memory {conversion.peak_memory_gib:.1f} GiB")
    return conversion


def _difference_table(conversion: Conversion) -> Table:
    promise = "exact" if conversion.exact else "not exact"
    title = f"{conversion.source} to {conversion.target} ({promise}), both in float32"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for found in conversion.differences:
        table.add_column(found.inputs, justify="right")
    figures: dict[str, Callable[[Difference], str]] = {
        "tokens": lambda found: f"{found.tokens:,}",
        "largest difference of a logit": lambda found: f"{found.max_abs_logit:.2e}",
        "largest logit": lambda found: f"{found.logit_scale:.2f}",
        "mean KL, nats a token": lambda found: f"{found.kl:.2e}",
        "same most probable token": lambda found: f"{found.same_top:.2%}",
        "loss before, nats a token": lambda found: f"{found.nll_before:.4f}",
        "loss after": lambda found: f"{found.nll_after:.4f}",
    }
    for name, show in figures.items():
        table.add_row(name, *[show(found) for found in conversion.differences])
    return table
