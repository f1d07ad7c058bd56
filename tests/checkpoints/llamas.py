"""Tiny random models of the Llama family, rough enough that a lost norm, bias or permutation cannot hide."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from difftune.checkpoints.llama import FAMILIES

SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Each: model_type, and what differs from SIZE.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_mha": ("llama", {"num_key_value_heads": 8}),
    "llama_gqa_odd_heads": ("llama", {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "head_dim": 10}),
    "llama_biased": ("llama", {"attention_bias": True}),
    "llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral_gqa": ("mistral", {"sliding_window": None, "head_dim": 10}),
    "mistral_mha_tied": ("mistral", {"sliding_window": 64, "num_key_value_heads": 8, "tie_word_embeddings": True}),
    "qwen2_gqa": ("qwen2", {}),
    "qwen2_mha_tied": ("qwen2", {"num_key_value_heads": 8, "tie_word_embeddings": True}),
    "qwen3_gqa": ("qwen3", {"head_dim": 10}),
    "qwen3_mha_tied_biased": (
        "qwen3",
        {"num_key_value_heads": 8, "tie_word_embeddings": True, "head_dim": 6, "attention_bias": True},
    ),
}
each_kind = pytest.mark.parametrize(("model_type", "changes"), KINDS.values(), ids=KINDS)


def make_llama(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    config_class, model_class = FAMILIES[model_type]
    model = model_class(config_class(**{**SIZE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class WideTorch:
    """torch, but what transformers computes in float32 whatever the model's dtype, it computes in float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def truly_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3):
        monkeypatch.setattr(module, "torch", WideTorch())


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, SIZE["vocab_size"], shape)


@torch.no_grad()
def logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False).logits


@torch.no_grad()
def cached_logits(model: torch.nn.Module, input_ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits of a prefill, then of one token after another from the cache."""
    out = model(input_ids=input_ids[:, :prefill], use_cache=True)
    parts = [out.logits]
    for i in range(prefill, input_ids.shape[1]):
        out = model(input_ids=input_ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)
