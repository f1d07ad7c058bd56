"""A trial in a run's precision: one step, and the padded batch that an evaluation would generate first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from transformers import GenerationConfig

from difftune.modeling.cache import build_cache
from difftune.modeling.compat import CACHE
from difftune.training.callbacks import peak_memory_gib
from difftune.training.devices import device_problem
from difftune.training.finetune import FinetuneModule
from difftune.training.strategies import kind_of_device

# More keys than the few-query paths of the backends begin with, and prompts of unequal length.
_PROMPT_LENGTHS = (12, 5)
_NEW_TOKENS = 4


@dataclass(frozen=True)
class Trial:
    """What a step cost and said; a batch was generated after it."""

    loss: float
    """Nats a label token."""
    grad_norm: float
    seconds: float
    """Of both, with the start-up."""
    peak_memory_gib: float
    generated: int
    """New tokens of each of the two prompts."""


def take_trial(module: FinetuneModule, batches: Any, *, precision: str, accelerator: str) -> Trial:
    """Take one optimiser step on one micro-batch, then generate two texts from prompts of unequal length.

    Args:
        module: Its model learns from the step.
        batches: A datamodule or loader.
        precision: The Trainer's.
        accelerator: The Trainer's; one device of it is used.

    Raises:
        ValueError: If the step or the generation fails in this precision, or there is no such device.
    """
    if (problem := device_problem(accelerator)) is not None:
        raise ValueError(problem)
    started = time.perf_counter()
    generation = _Generation()
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed" and kind_of_device(accelerator) == "cpu":
        # By its name alone the Trainer would take bfloat16.
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    trainer = build_bare_trainer(max_steps=1, accelerator=accelerator, callbacks=[generation], **settings)
    with _named("one step", precision):
        trainer.fit(module, batches)
    return Trial(
        loss=module.logged["train/loss"],
        grad_norm=module.logged["train/grad_norm"],
        seconds=time.perf_counter() - started,
        peak_memory_gib=peak_memory_gib(module.device),
        generated=generation.tokens,
    )


def build_bare_trainer(**settings: Any) -> Trainer:
    """One device, one micro-batch a step, and nothing written."""
    return Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        devices=1,
        gradient_clip_val=1.0,
        **settings,
    )


def generate_padded(model: Any) -> int:
    """Generate greedily after two prompts of unequal length, padded on the left, from the cache.

    Args:
        model: Of ours, or an adapter around one, on its device. Its modes of training and evaluation are kept.

    Returns:
        New tokens of each prompt.

    Raises:
        ValueError: If a logit is not finite.
    """
    config = model.config
    width = max(2, min(_PROMPT_LENGTHS[0], config.max_position_embeddings - _NEW_TOKENS))
    short = min(_PROMPT_LENGTHS[1], width - 1)
    device = next(model.parameters()).device
    input_ids = torch.randint(config.vocab_size, (2, width), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(input_ids)
    mask[1, : width - short] = 0
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        # None of them ends before it was read from the cache.
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            output = model.generate(
                input_ids=input_ids, attention_mask=mask, generation_config=settings, **{CACHE: build_cache()}
            )
    finally:
        for module in training:
            module.training = True
    if not all(logits.isfinite().all() for logits in output.logits):
        raise ValueError("logits are not finite")
    return len(output.logits)


class _Generation(Callback):
    """As an evaluation does it: inside the fit, on the Trainer's device, under its autocast."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        with (
            _named("a padded batch of two generated texts", str(trainer.precision)),
            trainer.precision_plugin.forward_context(),
        ):
            self.tokens = generate_padded(pl_module.model)


class _TrialError(ValueError):
    """What failed is in the message already."""


@contextmanager
def _named(what: str, precision: str) -> Iterator[None]:
    """One message for what fails inside."""
    try:
        yield
    except (torch.OutOfMemoryError, _TrialError):
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        remedy = "choose another model.attention_backend"
        if precision != "32-true":
            remedy = f"set trainer.precision=32-true, or {remedy}"
        raise _TrialError(f"{what} in {precision} fails: {error}; {remedy}") from error
