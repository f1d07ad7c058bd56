"""Documents as rows of tokens, for the probes that want text and not questions."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from difftune.rendering import chat_ids, text_ids

Document = str | Sequence[Mapping[str, str]]
"""A text, or a chat as messages with `role` and `content`."""


def token_rows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], *, length: int, num_tokens: int
) -> list[list[int]]:
    """The documents one after the other, cut into rows of tokens.

    Args:
        tokenizer: Of the model; renders chats with its chat template.
        documents: Texts and chats.
        length: Tokens of a row; the last one may be shorter.
        num_tokens: At most so many tokens in all.

    Returns:
        Token ids; a text begins with what the tokenizer puts before every text, if anything.

    Raises:
        ValueError: If a chat is given and the tokenizer has no chat template, or if there is no token at all.
    """
    tokens: list[int] = []
    for document in documents:
        if len(tokens) >= num_tokens:
            break
        tokens += _tokens(tokenizer, document)
    tokens = tokens[:num_tokens]
    if not tokens:
        raise ValueError("the documents of the evaluation hold no text")
    return [tokens[start : start + length] for start in range(0, len(tokens), length)]


def _tokens(tokenizer: PreTrainedTokenizerBase, document: Any) -> list[int]:
    if isinstance(document, str):
        return text_ids(tokenizer, document) if document else []
    return chat_ids(tokenizer, document)
