"""How likely a model finds given tokens, a chunk at a time with the cache: memory is linear in the length."""

import copy
import heapq
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from difftune.evaluation.task import Clock
from difftune.modeling.compat import CACHE

log = logging.getLogger(__name__)

Path = tuple[int, ...]
"""The beginning of a continuation."""

# More would mostly read what cannot win.
_MOST_TOGETHER = 16


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
        output = model(input_ids=ids[None, start:end], use_cache=True, **{CACHE: past})
        past = getattr(output, CACHE)
        logits = output.logits[0].float()
        parts.append((logits.logsumexp(-1) - logits.gather(-1, ids[start + 1 : end + 1, None])[:, 0]).cpu())
    return torch.cat(parts)


class Reader:
    """A text that a model reads on, and can go back in, without reading anything twice.

    Args:
        model: A causal language model of transformers' kind, in evaluation mode.
        chunk_size: Tokens of one forward pass.
        clock: Looked at before every forward pass.
        max_batch_tokens: Tokens in the cache of continuations that are read together, each with a copy of all that was
            read; a text of more than half of it is continued one by one.
    """

    def __init__(self, model: Any, *, chunk_size: int, clock: Clock, max_batch_tokens: int = 16384) -> None:
        self.model, self._chunk_size, self._clock = model, chunk_size, clock
        self._max_batch_tokens = max_batch_tokens
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
            output = self.model(input_ids=chunk, use_cache=True, logits_to_keep=1, **{CACHE: self._cache})
            self._cache = getattr(output, CACHE)
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
        beginnings are extended in the order of their log-likelihood, which only falls with every token, several
        together, each as far as there is no choice.

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
            together = max(1, min(_MOST_TOGETHER, self._max_batch_tokens // len(self.ids)))
            wanted = {tuple(tokens): index for index, tokens in enumerate(continuations)}
            following: dict[Path, set[int]] = {}
            for tokens in wanted:
                for at, token in enumerate(tokens):
                    following.setdefault(tokens[:at], set()).add(token)
            # The highest log-likelihood first; equal ones in the order of the tokens, so that it is always the same.
            queue: list[tuple[float, Path]] = [(-float(first[token]), (token,)) for token in following[()]]
            heapq.heapify(queue)
            while queue[0][1] not in wanted:
                begun_paths: list[tuple[float, Path]] = []
                while queue and queue[0][1] not in wanted and len(begun_paths) < together:
                    begun_paths.append(heapq.heappop(queue))
                whole = [_without_choice(path, following) for _, path in begun_paths]
                # Nobody asks what comes after the end of a continuation.
                scores = self._read_branches([path[:-1] if path in wanted else path for path in whole])
                if scores is None:
                    return None
                for (cost, path), end, log_probs in zip(begun_paths, whole, scores, strict=True):
                    for at in range(len(path), len(end)):
                        cost -= float(log_probs[at - 1, end[at]])
                    if end in wanted:
                        heapq.heappush(queue, (cost, end))
                    for token in following.get(end, ()):
                        heapq.heappush(queue, (cost - float(log_probs[len(end) - 1, token]), (*end, token)))
            cost, path = queue[0]
            return wanted[path], -cost
        finally:
            self.back_to(begun)

    def _read_branches(self, paths: Sequence[Path]) -> list[torch.Tensor] | None:
        """Read several continuations of what was read, and forget them.

        Returns:
            For each, log-probabilities of the token after each of its tokens, shape (its length, V), float32; None if
            the time was over.
        """
        if self._clock.is_over():
            return None
        width = max(map(len, paths))
        # Padding on the right is hidden by the causal mask.
        tokens = torch.tensor([[*path, *[path[-1]] * (width - len(path))] for path in paths])
        branches = copy.copy(self._cache)
        if hasattr(branches, "layers"):
            branches.layers = [copy.copy(layer) for layer in branches.layers]
            for layer in branches.layers:
                layer.keys = layer.keys.expand(len(paths), *layer.keys.shape[1:])
                layer.values = layer.values.expand(len(paths), *layer.values.shape[1:])
        output = self.model(
            input_ids=tokens.to(device_of(self.model)), use_cache=True, logits_to_keep=width, **{CACHE: branches}
        )
        log_probs = output.logits.float().log_softmax(-1)
        return [log_probs[row, : len(path)] for row, path in enumerate(paths)]


def _without_choice(path: Path, following: Mapping[Path, set[int]]) -> Path:
    """A beginning with all that must come next, up to an end or a choice."""
    while len(following.get(path, ())) == 1:
        path = (*path, *following[path])
    return path


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
