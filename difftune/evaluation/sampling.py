"""Sampling in which each text draws its own random numbers, whatever is decoded beside it."""

import random
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class OwnDraws(LogitsProcessor):
    """Samples each row with random numbers that are fixed before it begins: one a token, uniform in 0..1.

    A text then depends on its prompt, its seed and the model alone: not on its batch, nor on how texts are shared among
    ranks (but for rounding). After it, greedy decoding takes the token that was drawn.

    Args:
        seeds: Of the rows.
        width: Tokens before the first new one.
        max_new_tokens: Numbers a row.
        temperature: Divides the logits, above 0.
        top_p: Only the most likely tokens that hold this share of the probability; 1 is all.
    """

    def __init__(self, seeds: Sequence[int], width: int, max_new_tokens: int, temperature: float, top_p: float) -> None:
        self._width, self._temperature, self._top_p = width, temperature, top_p
        rows = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._uniform = torch.stack(rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``(B, V)`` with 0 at the token that was drawn and minus infinity elsewhere."""
        self._uniform = self._uniform.to(scores.device)
        probabilities = (scores.float() / self._temperature).softmax(-1)
        ordered, tokens = probabilities, None
        if self._top_p < 1:
            ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
            # The first token that reaches the share belongs to it.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self._top_p, 0.0)
        cumulative = ordered.cumsum(-1)
        target = self._uniform[:, input_ids.shape[1] - self._width, None] * cumulative[:, -1:]
        # Where rounding lets no sum exceed the target, the last token that has any probability.
        above = (cumulative > target) | (cumulative == cumulative[:, -1:])
        drawn = above.to(torch.int8).argmax(-1, keepdim=True)
        if tokens is not None:
            drawn = tokens.gather(-1, drawn)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def row_seed(seed: int, number: int) -> int:
    """The seed of one of many texts: neighbours in either number have nothing in common."""
    return random.Random(f"{seed} {number}").getrandbits(63)
