"""Examples to token ids with a label mask, through the tokenizer's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from difftune.data.formats import Example, Message
from difftune.data.tokenizers import decode


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

    def first(self, length: int) -> "Encoded":
        """Its first tokens."""
        if len(self.ids) <= length:
            return self
        learned, teacher = self.learned[:length], self.teacher
        if teacher is not None:
            labels = int(np.count_nonzero(learned))
            teacher = TeacherRows(*(part[:labels] for part in teacher))
        return Encoded(self.ids[:length], learned, teacher)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], where: Sequence[str]
) -> list[Encoded]:
    """Tokenise examples and mark what is learned.

    The mask of a chat is the difference of prefixes: what the template adds when an assistant turn is
    appended to the generation prompt before it. So it agrees with any template, and with what generation will
    see. The end-of-text token of the last turn is always there and always learned; what a template writes
    after it, and turns after the last assistant turn, are left out.

    Args:
        tokenizer: With `eos_token_id`, and with a chat template if there are chats.
        examples: Chats or texts.
        where: Names each example in errors.

    Raises:
        ValueError: If an example has no token to learn, has a character that the tokenizer cannot encode, or
            does not fit the template (the generation prompt is not a prefix of the finished turn).
    """
    renders = [_render(tokenizer, example, name) for example, name in zip(examples, where, strict=True)]
    texts = [text for render in renders for text in render]
    try:
        ids = iter(_tokenise(tokenizer, texts))
        return [
            _assemble(tokenizer, example, render, [next(ids) for _ in render], name)
            for example, render, name in zip(examples, renders, where, strict=True)
        ]
    except _CannotEncode as error:
        owner = [name for render, name in zip(renders, where, strict=True) for _ in render]
        raise ValueError(
            f"{owner[error.text]}: the tokenizer has no token for {error.character!r} (the digits tokenizer knows "
            "printable ASCII only): choose another tokenizer, such as bytes"
        ) from error


class _CannotEncode(Exception):
    """A character of the text at index `text` is outside the vocabulary."""

    def __init__(self, text: int, character: str) -> None:
        super().__init__(text, character)
        self.text, self.character = text, character


def _render(tokenizer: PreTrainedTokenizerBase, example: Example, where: str) -> list[str]:
    """What to tokenise: a document, or for each assistant turn the prompt before it and the chat up to it."""
    if example.text is not None:
        return [example.text]
    turns = [n for n, message in enumerate(example.messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(f"{where}: no label to learn, the row has no assistant turn")
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, which chats and problems need: put a chat_template.jinja "
            "into its folder, or use rows of the format text"
        )
    texts = []
    for turn in turns:
        if turn == 0:
            raise ValueError(f"{where}: the row begins with an assistant turn, which nothing asks for")
        try:
            prompt = render_chat(tokenizer, example.messages[:turn], add_generation_prompt=True)
            upto = render_chat(tokenizer, example.messages[: turn + 1])
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template refuses the row: {error}") from error
        if not upto.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template does not continue its own generation prompt, so what is learned "
                f"cannot be told: it writes {prompt[-60:]!r} to ask for an answer, and "
                f"{upto[: len(prompt) + 20][-80:]!r} with one; some open or remove <think>: give the tokenizer a "
                "template that leaves the content as it is"
            )
        texts += [prompt, upto]
    if not all(texts[-1].startswith(text) for text in texts):
        raise ValueError(
            f"{where}: the chat template rewrites earlier turns (some drop the reasoning of all but the last),"
            " so they cannot be learned in one row: use rows with one assistant turn, or another template"
        )
    return texts


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> str:
    """The text of a chat under the tokenizer's template, special tokens included."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


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
    tokenizer: PreTrainedTokenizerBase, example: Example, texts: list[str], ids: list[list[int]], where: str
) -> Encoded:
    eos = tokenizer.eos_token_id
    if example.text is not None:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        document = [*bos, *ids[0], eos]
        learned = np.ones(len(document), dtype=bool)
    else:
        document = ids[-1]
        learned = np.zeros(len(document) + 1, dtype=bool)
        for prompt, upto, prompt_text in zip(ids[::2], ids[1::2], texts[::2], strict=True):
            if document[: len(upto)] != upto or upto[: len(prompt)] != prompt:
                raise ValueError(
                    f"{where}: a token of the answer reaches back into the prompt {prompt_text[-40:]!r}, so "
                    "training and generation would disagree: end the template's generation prompt with a "
                    "special token"
                )
            learned[len(prompt) : len(upto)] = True
        document = _ended(tokenizer, document, start=len(ids[-2]))
        learned = learned[: len(document)]
        learned[-1] = True
    learned[0] = False
    assert document[-1] == eos
    if not learned.any():
        raise ValueError(f"{where}: no label to learn, the tokenizer makes nothing of the text")
    return Encoded(np.asarray(document, dtype=np.int32), learned)


def _ended(tokenizer: PreTrainedTokenizerBase, document: list[int], start: int) -> list[int]:
    """The document up to the end-of-text token of its last turn (from `start` on), added if need be."""
    eos = tokenizer.eos_token_id
    last = max((n for n in range(start, len(document)) if document[n] == eos), default=None)
    if last is not None and not decode(tokenizer, document[last + 1 :]).strip():
        return document[: last + 1]
    return [*document, eos]
