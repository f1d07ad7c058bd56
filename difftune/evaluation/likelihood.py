"""How likely a model finds given tokens, a chunk at a time with the cache: memory is linear in the length."""

import heapq
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from difftune.evaluation.task import Clock

log = logging.getLogger(__name__)


def token_nll(model: Any, ids: torch.Tensor, *, chunk_size: int, clock: Clock | None = None) -> torch.Tensor | None:
    """Negative log-likelihood of each token after the first, given all before it, in nats.

    It equals `cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")`, but the logits of one chunk
    are all that is held at once.

    Args:
        model: A causal language model of transformers' kind, in evaluation mode.
        ids: Tokens, shape (T,), T at least 2.
        chunk_size: Tokens of one forward pass, at least 1.
        clock: Looked at before every chunk.

    Returns:
        Shape (T - 1,), float32, on the CPU; None if the time was over before the end.
    """
    ids = ids.to(device_of(model))
    parts, past = [], None
    for start in range(0, len(ids) - 1, chunk_size):
        if clock is not None and clock.is_over():
            return None
        end = min(start + chunk_size, len(ids) - 1)
        output = model(input_ids=ids[None, start:end], past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = output.logits[0].float()
        parts.append((logits.logsumexp(-1) - logits.gather(-1, ids[start + 1 : end + 1, None])[:, 0]).cpu())
    return torch.cat(parts)


class Reader:
    """A text that a model reads on, and can go back in, without reading anything twice.

    Args:
        model: A causal language model of transformers' kind, in evaluation mode.
        chunk_size: Tokens of one forward pass.
        clock: Looked at before every forward pass.
    """

    def __init__(self, model: Any, *, chunk_size: int, clock: Clock) -> None:
        self.model, self._chunk_size, self._clock = model, chunk_size, clock
        self._cache: Any = None
        self.ids: list[int] = []
        """What was read."""

    def read(self, ids: Sequence[int]) -> torch.Tensor | None:
        """Read on.

        Args:
            ids: Tokens, at least one.

        Returns:
            Log-probabilities of the token that comes next, shape (V,), float32; None if the time was over, and then
            `ids` may be read in part.
        """
        tokens = torch.tensor([list(ids)], device=device_of(self.model))
        output = None
        for start in range(0, tokens.shape[1], self._chunk_size):
            if self._clock.is_over():
                return None
            chunk = tokens[:, start : start + self._chunk_size]
            # Nothing is scored on the way: the logits of one position are enough.
            output = self.model(input_ids=chunk, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values
            self.ids += chunk[0].tolist()
        assert output is not None, "nothing to read"
        return output.logits[0, -1].float().log_softmax(-1)

    def back_to(self, length: int) -> None:
        """Forget all but the first tokens."""
        if length < len(self.ids):
            # Negative: so many are taken off the end.
            self._cache.crop(length - len(self.ids))
            del self.ids[length:]

    def most_likely(self, ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> tuple[int, float] | None:
        """Read on, then find the continuation of the highest log-likelihood, by constrained decoding.

        It equals scoring every continuation, but shares what they have in common and leaves out those that cannot win:
        beginnings are extended in the order of their log-likelihood, which only falls with every token.

        Args:
            ids: Tokens to read first, at least one; forgotten afterwards.
            continuations: Token ids, none empty, none the beginning of another (end them all alike).

        Returns:
            Index and log-likelihood in nats of the best one; None if the time was over.
        """
        begun = len(self.ids)
        try:
            first = self.read(ids)
            if first is None:
                return None
            prefix = len(self.ids)
            wanted = {tuple(tokens): index for index, tokens in enumerate(continuations)}
            following: dict[tuple[int, ...], set[int]] = {}
            for tokens in wanted:
                for at, token in enumerate(tokens):
                    following.setdefault(tokens[:at], set()).add(token)
            # The highest log-likelihood first; equal ones in the order of the tokens, so that it is always the same.
            queue: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
            while True:
                cost, path = heapq.heappop(queue)
                if path in wanted:
                    return wanted[path], -cost
                self.back_to(prefix)
                scores = self.read(path) if path else first
                if scores is None:
                    return None
                for token in following[path]:
                    heapq.heappush(queue, (cost - float(scores[token]), (*path, token)))
        finally:
            self.back_to(begun)


def device_of(model: nn.Module) -> torch.device:
    """Where the weights are."""
    return next(model.parameters()).device


def warn_if_too_long(model: nn.Module, task: str, length: int) -> None:
    """Say so if a task goes beyond the length that a model is meant for."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit and length > limit:
        _warn_once(task, length, limit)


@cache
def _warn_once(task: str, length: int, limit: int) -> None:
    log.warning(
        "%s reaches %d tokens, beyond max_position_embeddings (%d): the model was not made for that length",
        task,
        length,
        limit,
    )
