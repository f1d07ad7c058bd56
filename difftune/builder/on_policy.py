"""A batch whose answers are the student's own: what on-policy distillation learns from."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from difftune.data.batches import IGNORE_INDEX, Batch, packed_batch, padded_batch
from difftune.data.chat import Encoded
from difftune.evaluation.generation import generate_texts
from difftune.evaluation.replicas import plain_weights

PROMPTS_AT_ONCE = 64
"""Answers decoded together, at most."""


class StudentSampler:
    """Replaces the answers of a batch by what the student writes.

    Of each document all before its last answer is the prompt, which the student continues by sampling at temperature 1
    from its whole distribution, up to its end-of-text token. The documents of a packed row stay in that row: they share
    equally what their prompts leave of it, which is as much as their answers had on average at least. An answer that
    reaches this or `max_new_tokens` is cut. Only the tokens that were written are labels.

    Args:
        tokenizer: The student's.
        seq_len: Most tokens of a document.
        max_new_tokens: Of an answer.
        seed: With the number of the batch and the rank it decides the samples.

    Source:
        Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649, section 3 and Algorithm 1.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, max_new_tokens: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seq_len, self._max_new_tokens, self._seed = seq_len, max_new_tokens, seed

    def __call__(self, model: nn.Module, batch: Batch, number: int, rank: int, ranks_per_machine: int = 1) -> Batch:
        """The batch with the student's answers, on the device of the batch.

        Args:
            model: The student; left in the mode in which it is. One that is sharded is gathered for as long as it
                writes (`difftune.evaluation.replicas`), and all ranks must call this for the same batches.
            batch: As `difftune.data.batches` makes them.
            number: Of the batch in the run.
            rank: Of this process.
            ranks_per_machine: How many share a machine's memory.
        """
        with plain_weights(model, device=batch["input_ids"].device, ranks_per_machine=ranks_per_machine) as evaluated:
            own = self._own(evaluated.model, batch, number, rank)
            # Other ranks may still be writing.
            evaluated.finish()
        return own

    def _own(self, model: nn.Module, batch: Batch, number: int, rank: int) -> Batch:
        device, pad_id = batch["input_ids"].device, self._tokenizer.pad_token_id
        assert isinstance(pad_id, int), "build_tokenizer gives a padding token"
        rows = _prompts(batch)
        if "cu_seqlens" in batch:
            width = batch["input_ids"].shape[1]
            seeds = [self._draw(number, rank, row) for row in range(len(rows))]
            own = packed_batch(
                [self._answered(model, row, width, seed) for row, seed in zip(rows, seeds, strict=True)], width, pad_id
            )
        else:
            answers = iter(self._answered(model, [p for row in rows for p in row], None, self._draw(number, rank, 0)))
            documents = [[next(answers) for _ in row] for row in rows]
            own = padded_batch(documents, pad_id, max((len(d.ids) for row in documents for d in row), default=1))
        return {name: tensor.to(device) for name, tensor in own.items()}

    def _answered(self, model: nn.Module, prompts: list[np.ndarray], shared: int | None, seed: int) -> list[Encoded]:
        """Prompts with answers, which together take `shared` tokens at most, or each `seq_len` without."""
        if not prompts:
            return []
        room = self._seq_len - max(map(len, prompts))
        if shared is not None:
            room = (shared - sum(map(len, prompts))) // len(prompts)
        assert room > 0, "each prompt had an answer of a token at least"
        found = generate_texts(
            model,
            self._tokenizer,
            [prompt.tolist() for prompt in prompts],
            max_new_tokens=min(room, self._max_new_tokens),
            batch_size=PROMPTS_AT_ONCE,
            temperature=1.0,
            seed=seed,
        )
        return [_document(prompt, answer.ids) for prompt, answer in zip(prompts, found, strict=True)]

    def _draw(self, *numbers: int) -> int:
        """A seed from the run's and some numbers; 32 bits."""
        return int.from_bytes(hashlib.blake2b(repr((self._seed, *numbers)).encode(), digest_size=4).digest(), "little")


def _document(prompt: np.ndarray, answer: Sequence[int]) -> Encoded:
    ids = np.concatenate([prompt, np.asarray(answer, prompt.dtype)])
    return Encoded(ids, np.arange(len(ids)) >= len(prompt))


def _prompts(batch: Batch) -> list[list[np.ndarray]]:
    """For each row of a batch, what stands before the last answer of each document; padding has none."""
    ids, learned = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy() != IGNORE_INDEX
    if "cu_seqlens" in batch:
        width = ids.shape[1]
        places = [(*divmod(start, width), end - start) for start, end in pairwise(batch["cu_seqlens"].tolist())]
    else:
        places = [(row, 0, length) for row, length in enumerate(batch["attention_mask"].sum(1).tolist())]
    rows: list[list[np.ndarray]] = [[] for _ in ids]
    for row, start, length in places:
        labels = np.flatnonzero(learned[row, start : start + length])
        if len(labels):
            # The answer begins behind the last token before its end that is no label; the first token is none.
            before = np.flatnonzero(~learned[row, start : start + labels[-1]])[-1]
            rows[row].append(ids[row, start : start + before + 1])
    return rows
