"""What ends a text of a model: one list of tokens, in the model's config and in its generation config."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase


def end_ids(tokenizer: PreTrainedTokenizerBase | None, *configs: Any) -> list[int]:
    """Every token that ends a text: the tokenizer's first, then those of configs and generation configs.

    Args:
        tokenizer: With `eos_token_id`. None: none.
        configs: What has an `eos_token_id`, as attribute or key: None, a number or a list.

    Returns:
        Each once, in order.
    """
    found: dict[int, None] = {}
    for source in (tokenizer, *configs):
        ends = source.get("eos_token_id") if isinstance(source, dict) else getattr(source, "eos_token_id", None)
        for end in ends if isinstance(ends, Iterable) else [ends]:
            if end is not None:
                found[int(end)] = None
    return list(found)


def special_token_ids(tokenizer: PreTrainedTokenizerBase, *configs: Any) -> dict[str, Any]:
    """What `config.json` and `generation_config.json` should say of special tokens, given what they say now.

    Returns:
        `eos_token_id`, a list if there are several; `bos_token_id` if the tokenizer has one.
    """
    ends = end_ids(tokenizer, *configs)
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if tokenizer.bos_token_id is not None:
        ids["bos_token_id"] = tokenizer.bos_token_id
    return ids


def declare_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the special tokens that a model learns to its config and generation config.

    A padding token that also ends texts is learned like every other token, and is no padding to the embedding.
    """
    ids = special_token_ids(tokenizer, model.generation_config, model.config)
    for config in (model.config, model.generation_config):
        for name, value in ids.items():
            setattr(config, name, value)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and embedding.padding_idx in end_ids(tokenizer, ids):
        embedding.padding_idx = None
