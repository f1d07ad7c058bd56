"""A small teacher and student of one vocabulary, and arithmetic to learn from."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from difftune.data.datamodule import SFTDataModule
from difftune.data.sources import Source
from difftune.data.tokenizers import build_tokenizer
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM

TOKENIZER = build_tokenizer("digits")
VOCABULARY = len(TOKENIZER)


def build_llama(seed=1, vocab_size=VOCABULARY, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 40,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def build_student(seed=2, attention="diff_v1", **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention": attention,
    }
    return DiffTransformerForCausalLM(DiffTransformerConfig(**{**sizes, **changes}))


def build_arithmetic(**settings):
    source = Source("synthetic:arithmetic", options={"count": 64, "level": 1})
    defaults = {"seq_len": 64, "micro_batch_size": 2, "max_epochs": None}
    return SFTDataModule(tokenizer=TOKENIZER, train=[source], **{**defaults, **settings})


def one_batch(data):
    return next(iter(data.train_dataloader()))
