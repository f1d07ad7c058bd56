"""Tiny random models of both kinds, large enough that a wrong permutation cannot hide."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, PreTrainedTokenizerFast

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM

SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "lambda_std_dev": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _roughen(model: torch.nn.Module) -> None:
    """Move norms and biases off the values at which a lost one would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "lambda" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.fixture
def make_diffllama() -> Callable[..., DiffLlamaForCausalLM]:
    def make(**changes: Any) -> DiffLlamaForCausalLM:
        model = DiffLlamaForCausalLM(DiffLlamaConfig(**{**SIZE, **changes})).eval()
        _roughen(model)
        return model

    return make


@pytest.fixture
def make_model() -> Callable[..., DiffTransformerForCausalLM]:
    def make(**changes: Any) -> DiffTransformerForCausalLM:
        model = DiffTransformerForCausalLM(DiffTransformerConfig(**{**SIZE, **changes})).eval()
        _roughen(model)
        return model

    return make


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {str(i): 4 + i for i in range(10)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
