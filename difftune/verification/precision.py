"""A step and a padded generated batch in each precision, for a small model with the attention of another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.training.finetune import FinetuneModule
from difftune.training.trial import Trial, take_trial
from difftune.verification.claim import Claim
from difftune.verification.small import small_like

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_LENGTH = 24
"""Tokens of a row of the step."""


def verify_precisions(config: DiffTransformerConfig, *, accelerator: str) -> Iterator[Claim]:
    """Take a step and generate a padded batch in float32 and under autocast to both 16-bit types.

    Args:
        config: Of the model whose attention is tried.
        accelerator: ``cpu`` or ``gpu``.

    Yields:
        A claim for each precision.
    """
    on = f"training and generation of a model of two layers, {config.attention}, D={config.head_dim}"
    for precision in _PRECISIONS:
        what = f"a step and a padded generated batch in {precision}"
        try:
            trial = try_precision(config, precision, accelerator)
        except ValueError as error:
            yield Claim(what, on, "fails", str(error))
        else:
            yield Claim(what, on, "holds", describe(trial))


def try_precision(
    config: DiffTransformerConfig,
    precision: str,
    accelerator: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention_backend: str = "auto",
) -> Trial:
    """Take a step and generate a padded batch with a small fresh model.

    Args:
        config: Of the model whose attention it has.
        precision: The Trainer's.
        accelerator: The Trainer's.
        dtype: Of the weights.
        attention_backend: Of the small model.

    Raises:
        ValueError: If either fails.
    """
    small = small_like(config)
    small.attention_backend = attention_backend
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cast_weights(DiffTransformerForCausalLM(small), dtype)
        rows = torch.randint(small.vocab_size, (2, _LENGTH))
        batches: Any = [{"input_ids": rows, "labels": rows}]
        module = FinetuneModule(model, lr=1e-3, schedule="constant")
        return take_trial(module, DataLoader(batches, batch_size=None), precision=precision, accelerator=accelerator)


def describe(trial: Trial) -> str:
    """The figures of a trial in half a sentence."""
    return (
        f"loss {trial.loss:.2f}, gradient norm {trial.grad_norm:.2f}; {trial.generated} tokens for each of two prompts"
    )
