"""Examples to token ids with a label mask, through the tokenizer's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from difftune.data.formats import Example
from difftune.data.turns import Rendered, render_turns
from difftune.rendering import opening


class TeacherRows(NamedTuple):
    """What a teacher said to label tokens, a row each: its k most likely tokens, and the mass of the others."""

    indices: np.ndarray
    """int32, shape [labels, k]."""
    log_probs: np.ndarray
    """float16 or float32, shape [labels, k], in nats."""
    log_tail: np.ndarray
    """float32, shape [labels]."""


@dataclass(frozen=True)
class Encoded:
    """A document: token ids, and which of them are learned (the first never is: nothing stands before it)."""

    ids: np.ndarray
    """int32, shape [T]."""
    learned: np.ndarray
    """bool, shape [T]; `learned[0]` is False."""
    teacher: TeacherRows | None = None
    """For each learned token what a teacher said, if that is stored."""
    example: int = 0
    """Place, in what was encoded together, of the example that it is of; an example can be several documents."""
    turn: int | None = None
    """Place in the chat of the last turn that is learned; None for a text."""

    def first(self, length: int) -> "Encoded":
        """Its first tokens."""
        if len(self.ids) <= length:
            return self
        learned, teacher = self.learned[:length], self.teacher
        if teacher is not None:
            labels = int(np.count_nonzero(learned))
            teacher = TeacherRows(*(part[:labels] for part in teacher))
        return Encoded(self.ids[:length], learned, teacher, self.example, self.turn)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], where: Sequence[str]
) -> list[Encoded]:
    """Tokenise examples and mark what is learned.

    What is learned of a chat is what the template adds to the generation prompt before each assistant turn, up to the
    end-of-text token of the turn (`difftune.data.turns`). So it agrees with any template, and with what generation will
    see. The end-of-text token of the last turn is always there and always learned; what a template writes after it, and
    turns after the last assistant turn, are left out. Where a template rewrites earlier turns, an example is several
    documents: each turn is learned as it was when it was the last.

    A text begins as the tokenizer begins one, and ends with the end-of-text token.

    Args:
        tokenizer: With `eos_token_id`, and with a chat template if there are chats.
        examples: Chats or texts.
        where: Names each example in errors.

    Returns:
        The documents, in the order of the examples, one at least of each.

    Raises:
        ValueError: If an example has no token to learn, has a character that the tokenizer cannot encode, or
            does not fit the template.
    """
    documents = [
        (place, rendered)
        for place, (example, name) in enumerate(zip(examples, where, strict=True))
        for rendered in (
            [Rendered(example.text, [], None)]
            if example.text is not None
            else render_turns(tokenizer, example.messages, name, example.tools)
        )
    ]
    texts = [[rendered.text, *rendered.borders()] for _, rendered in documents]
    begin = opening(tokenizer) if any(example.text is not None for example in examples) else []
    try:
        ids = iter(_tokenise(tokenizer, [text for of_one in texts for text in of_one]))
        return [
            _assemble(tokenizer, rendered, [next(ids) for _ in of_one], begin, place, where[place])
            for (place, rendered), of_one in zip(documents, texts, strict=True)
        ]
    except _CannotEncode as error:
        owner = [where[place] for (place, _), of_one in zip(documents, texts, strict=True) for _ in of_one]
        raise ValueError(
            f"{owner[error.text]}: the tokenizer has no token for {error.character!r} (the digits tokenizer knows "
            "printable ASCII only): choose another tokenizer, such as bytes"
        ) from error


class _CannotEncode(Exception):
    """A character of the text at index `text` is outside the vocabulary."""

    def __init__(self, text: int, character: str) -> None:
        super().__init__(text, character)
        self.text, self.character = text, character


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    try:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    except Exception as error:  # the tokenizers library raises Exception itself
        if "UNK" not in str(error):
            raise
        for index, text in enumerate(texts):
            for character in text:
                try:
                    tokenizer(character, add_special_tokens=False)
                except Exception as cause:
                    raise _CannotEncode(index, character) from cause
        raise


def _assemble(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Rendered,
    ids: list[list[int]],
    begin: list[int],
    place: int,
    where: str,
) -> Encoded:
    document, borders = ids[0], ids[1:]
    if rendered.turn is None:
        # A text that writes its own beginning or end has it once.
        document = document if begin and document[: len(begin)] == begin else [*begin, *document]
        learned = np.ones(len(document) + 1, dtype=bool)
    else:
        learned = np.zeros(len(document) + 1, dtype=bool)
        for start, end, (at, _) in zip(borders[::2], borders[1::2], rendered.learned, strict=True):
            if document[: len(end)] != end or end[: len(start)] != start:
                raise ValueError(
                    f"{where}: a token of the answer reaches back into the prompt {rendered.text[:at][-40:]!r}, so "
                    "training and generation would disagree: end the template's generation prompt with a "
                    "special token"
                )
            learned[len(start) : len(end)] = True
    if not document or document[-1] != tokenizer.eos_token_id:
        document = [*document, tokenizer.eos_token_id]
    learned = learned[: len(document)]
    learned[-1] = True
    learned[0] = False
    if not learned.any():
        raise ValueError(f"{where}: no label to learn, the tokenizer makes nothing of the text")
    return Encoded(np.asarray(document, dtype=np.int32), learned, example=place, turn=rendered.turn)
