from types import SimpleNamespace

import torch
from transformers import GenerationConfig

from difftune.data.tokenizers import build_tokenizer
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.special_tokens import declare_special_tokens, end_ids, special_token_ids


def test_ends_are_of_tokenizer_and_configs_each_once() -> None:
    tokenizer = build_tokenizer("digits")
    assert end_ids(tokenizer, GenerationConfig(eos_token_id=[5, 2]), {"eos_token_id": 7}, None, {}) == [2, 5, 7]
    assert end_ids(None, SimpleNamespace(eos_token_id=None)) == []
    assert special_token_ids(tokenizer, {}) == {"eos_token_id": 2, "bos_token_id": 1}
    tokenizer.bos_token = None
    assert special_token_ids(tokenizer, {"eos_token_id": 0}) == {"eos_token_id": [2, 0]}


def test_a_model_is_told_what_ends_its_texts_and_learns_an_end_that_pads() -> None:
    tokenizer = build_tokenizer("digits")
    tokenizer.pad_token = tokenizer.eos_token
    config = DiffTransformerConfig(
        vocab_size=102, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=2, eos_token_id=0,
    )  # fmt: skip
    model = DiffTransformerForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[0, 50], temperature=0.7)
    declare_special_tokens(model, tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [2, 0, 50]
    assert model.config.bos_token_id == 1 and model.generation_config.pad_token_id == 2
    assert model.generation_config.temperature == 0.7
    ids = torch.tensor([[5, 2, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[2].abs().sum() > 0
