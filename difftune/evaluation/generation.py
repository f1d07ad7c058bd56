"""Texts from a model: batches of prompts of unequal length, decoded together through the model's own `generate`."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from difftune.evaluation.sampling import OwnDraws, row_seed
from difftune.modeling import DiffTransformerConfig
from difftune.modeling.cache import build_cache
from difftune.modeling.compat import CACHE
from difftune.modeling.special_tokens import end_ids
from difftune.rendering import text_ids

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt."""

    text: str
    """Without the prompt, special tokens and the stop string."""
    num_tokens: int
    """New tokens, the end-of-text token included."""
    finished: bool
    """The model ended it itself, by the end-of-text token or a stop string."""
    interrupted: bool = False
    """Not finished, and cut or not even begun because the time was over. Neither: `max_new_tokens` were reached."""
    ids: tuple[int, ...] = field(default=(), compare=False)
    """The new tokens, the end-of-text token included."""


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    stop: Sequence[str] | None = None,
    should_stop: Callable[[], bool] | None = None,
    deadline: float | None = None,
) -> list[Generation]:
    """Continue each prompt until an end-of-text token, a stop string or `max_new_tokens`.

    What ends a text is the tokenizer's end-of-text token and every one of the model's generation config.

    Prompts of similar length share a batch, padded on the left, with a KV cache. The batches come in a random order
    that `seed` fixes, so what is done when the time is over is not just the short prompts. Neither greedy texts nor
    samples depend on the batch size but for rounding: each text draws its own numbers, from `seed` and its number.

    Nothing outlasts the call: training or evaluation mode of each module, random state and generation config of the
    model are what they were. Nothing else of the model's own generation config (a repetition penalty, say) is used.

    Args:
        model: A causal language model of transformers' kind.
        tokenizer: Its tokenizer.
        prompts: Texts (beginning as the tokenizer begins one) or token ids, none of them empty.
        max_new_tokens: Longest continuation, in tokens.
        batch_size: Prompts a batch.
        temperature: 0 is greedy, above 0 samples.
        top_p: Sample from the most likely tokens that hold this share of the probability.
        seed: Of the samples, and of the order of the batches.
        numbers: One a prompt, by which prompts shared among calls draw what they would in one. Default: their places.
        stop: Strings that end a text.
        should_stop: Polled at every token; True ends the work.
        deadline: A value of `time.monotonic()` that ends the work.

    Returns:
        One generation a prompt, in the order of the prompts.

    Raises:
        ValueError: If a number is out of range, a prompt is empty, or there is no end-of-text token.
    """
    _check(max_new_tokens, batch_size, temperature, top_p, stop)
    ends = end_ids(tokenizer, getattr(model, "generation_config", None))
    if not ends:
        raise ValueError(
            "neither tokenizer nor generation config has an eos token: no text could end before max_new_tokens; set "
            "tokenizer.eos_token"
        )
    ids = [text_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if empty := [index for index, row in enumerate(ids) if not row]:
        raise ValueError(f"prompt {empty[0]} is empty ({len(empty)} such): a model needs a token to go on from")
    _warn_if_too_long(model, ids, max_new_tokens)
    clock = _Clock(should_stop, deadline)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=_pad_id(tokenizer, ends),
        use_cache=True,
    )
    criteria = StoppingCriteriaList([clock])
    if stop:
        criteria.append(StopStringCriteria(tokenizer, list(stop)))
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    random.Random(seed).shuffle(batches)
    results = [Generation("", 0, finished=False, interrupted=True)] * len(ids)
    numbers = range(len(ids)) if numbers is None else numbers
    with _untouched(model, settings):
        for batch in batches:
            if clock.is_over():
                break
            rows_of_batch = [ids[index] for index in batch]
            draws = None
            if temperature > 0:
                seeds = [row_seed(seed, numbers[index]) for index in batch]
                draws = OwnDraws(seeds, max(map(len, rows_of_batch)), max_new_tokens, temperature, top_p)
            rows = _generate_batch(model, rows_of_batch, settings, criteria, draws)
            for index, row in zip(batch, rows, strict=True):
                results[index] = _read(tokenizer, row, max_new_tokens, ends, stop or (), clock.rang)
    return results


def _generate_batch(
    model: Any,
    prompts: list[list[int]],
    settings: GenerationConfig,
    criteria: StoppingCriteriaList,
    draws: LogitsProcessor | None,
) -> list[list[int]]:
    """The new tokens of each prompt, with padding after those that ended early."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), settings.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    device = _device_of(model)
    # Models of other makers may need a cache of another kind, which generate() then chooses.
    ours = isinstance(getattr(model, "config", None), DiffTransformerConfig)
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=settings,
        stopping_criteria=criteria,
        logits_processor=LogitsProcessorList([] if draws is None else [draws]),
        # Each rank for itself.
        synced_gpus=False,
        **({CACHE: build_cache()} if ours else {}),
    )
    return output[:, width:].tolist()


def _read(
    tokenizer: PreTrainedTokenizerBase,
    row: list[int],
    max_new_tokens: int,
    ends: list[int],
    stop: Sequence[str],
    rang: bool,
) -> Generation:
    """Turn a row of new tokens into text: up to the first token that ends it, or to the earliest stop string."""
    end = next((at for at, token in enumerate(row) if token in ends), None)
    ended = end is not None
    if end is not None:
        row = row[: end + 1]
    elif stop:
        # A row that met a stop string is padded while the others go on.
        while row and row[-1] == _pad_id(tokenizer, ends):
            row = row[:-1]
    # Not every tokenizer counts its end-of-text token among the special ones.
    text = tokenizer.decode(row[:-1] if ended else row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    marks = [at for mark in stop if (at := text.find(mark)) >= 0]
    if ended and marks:
        # Nothing is written behind a stop string: without a padding token, this is what the row was padded with.
        row = row[:-1]
    text = text[: min(marks)] if marks else text
    # A row that is short although the time was not over met a stop string that began in its prompt.
    short = len(row) < max_new_tokens
    finished = ended or bool(marks) or (short and not rang)
    return Generation(text, len(row), finished, interrupted=short and not finished, ids=tuple(row))


class _Clock(StoppingCriteria):
    """Ends a batch when the time is over or a caller says so."""

    def __init__(self, should_stop: Callable[[], bool] | None, deadline: float | None) -> None:
        self._should_stop = should_stop
        self._deadline = deadline
        self.rang = False

    def is_over(self) -> bool:
        """Whether to stop now; once it is, it stays so."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        self.rang = self.rang or late or (self._should_stop is not None and self._should_stop())
        return self.rang

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **unused: Any) -> torch.Tensor:
        """True for every row, or for none."""
        return torch.full((input_ids.shape[0],), self.is_over(), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _untouched(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, no gradients, and `settings` as the model's generation config, for a while."""
    # Module by module: a frozen part of a model in training may well be in evaluation mode.
    training = [module for module in model.modules() if module.training]
    own = model.generation_config
    model.eval()
    # generate() fills what is not set from the model's own config.
    model.generation_config = settings
    try:
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        for module in training:
            module.training = True


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _pad_id(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> int:
    """Any id will do, as padding is masked; a tokenizer without one is no reason to refuse."""
    pad = tokenizer.pad_token_id
    return ends[0] if pad is None else pad


def _check(max_new_tokens: int, batch_size: int, temperature: float, top_p: float, stop: Sequence[str] | None) -> None:
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0 (greedy), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if isinstance(stop, str) or any(not mark for mark in stop or ()):
        raise ValueError(f"stop must be a list of strings that are not empty, got {stop!r}")


def _warn_if_too_long(model: nn.Module, ids: list[list[int]], max_new_tokens: int) -> None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    too_long = sum(len(row) + max_new_tokens > limit for row in ids) if limit else 0
    if too_long:
        log.warning(
            "%d of %d prompts can reach beyond max_position_embeddings (%d tokens) with max_new_tokens=%d: "
            "the model was not made for that length",
            too_long,
            len(ids),
            limit,
            max_new_tokens,
        )
