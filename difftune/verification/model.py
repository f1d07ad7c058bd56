"""What a model computes in one way and in another: packed and alone, from the cache and whole, in a batch and alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from difftune.modeling import DiffTransformerForCausalLM, cast_weights
from difftune.modeling.cache import build_cache
from difftune.modeling.compat import CACHE
from difftune.verification.budget import deviation, wider
from difftune.verification.claim import Claim, judged

_LENGTHS = (1, 37, 90)
"""Of the texts, in tokens."""
_DECODED = 8
"""Tokens that are read one by one from the cache."""


@torch.no_grad()
def verify_model(model: DiffTransformerForCausalLM) -> Iterator[Claim]:
    """Run a model on random tokens in ways that must not differ.

    The truth is each text alone under the equation, in a wider dtype (float64 for a model in float32, float32 for
    one in 16 bits); its error in the model's own dtype is what any way may cost twice.

    Args:
        model: In evaluation mode, on its device, not quantised. It is not changed; a copy in the wider dtype is held
            on the CPU.

    Yields:
        Three claims about logits.

    Raises:
        ValueError: If the model has positions for less than 16 tokens.
    """
    most = model.config.max_position_embeddings
    if most < 2 * _DECODED:
        raise ValueError(f"max_position_embeddings is {most}: a model is verified from {2 * _DECODED} positions on")
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, most) for length in _LENGTHS]
    texts = [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in lengths]
    texts = [text.to(model.device) for text in texts]
    with _equation(model):
        plain = [_alone(model, text) for text in texts]
        # On the CPU: not every device computes in float64, or in the whole of float32.
        precise = copy.deepcopy(model)
        cast_weights(precise.cpu(), wider(model.dtype))
        truth = [_alone(precise, text.cpu()) for text in texts]
        del precise
    name = str(model.dtype).removeprefix("torch.")
    on = f"the model: logits of {len(texts)} texts in {name}, attention backend {model.config.attention_backend}"
    ways = {"packed = alone": _packed, "batch with padding = alone": _padded, "cache, token by token = whole": _cached}
    for what, way in ways.items():
        actual = torch.cat(way(model, texts)).cpu()
        yield judged(what, on, [deviation("a logit", actual, torch.cat(plain).cpu(), torch.cat(truth))])


@contextmanager
def _equation(model: DiffTransformerForCausalLM) -> Iterator[None]:
    """The equation in place of the model's backend, for a while."""
    backend = model.config.attention_backend
    model.config.attention_backend = "reference"
    try:
        yield
    finally:
        model.config.attention_backend = backend


def _alone(model: DiffTransformerForCausalLM, text: torch.Tensor) -> torch.Tensor:
    return _logits(model(input_ids=text[None], use_cache=False))[0]


def _packed(model: DiffTransformerForCausalLM, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    lengths = [len(text) for text in texts]
    ends = torch.tensor([0, *lengths], device=model.device).cumsum(0)
    return list(_logits(model(input_ids=torch.cat(texts)[None], cu_seqlens=ends))[0].split(lengths))


def _padded(model: DiffTransformerForCausalLM, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """On the left, as for generation."""
    input_ids, mask = _batch(texts)
    logits = _logits(model(input_ids=input_ids, attention_mask=mask, use_cache=False))
    return [row[len(row) - len(text) :] for row, text in zip(logits, texts, strict=True)]


def _cached(model: DiffTransformerForCausalLM, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """A batch read up to its last tokens, and then one token after another."""
    input_ids, mask = _batch(texts)
    start = input_ids.shape[1] - _DECODED
    cache = build_cache()
    parts = []
    for first, last in [(0, start), *((at, at + 1) for at in range(start, input_ids.shape[1]))]:
        output = model(
            input_ids=input_ids[:, first:last], attention_mask=mask[:, :last], use_cache=True, **{CACHE: cache}
        )
        parts.append(_logits(output))
    logits = torch.cat(parts, dim=1)
    return [row[len(row) - len(text) :] for row, text in zip(logits, texts, strict=True)]


def _batch(texts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``(B, T)``, padded on the left."""
    width = max(map(len, texts))
    input_ids = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in texts])
    mask = torch.stack([torch.arange(width, device=text.device) >= width - len(text) for text in texts])
    return input_ids, mask.long()


def _logits(output: object) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    assert isinstance(logits, torch.Tensor)
    return logits
