import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from difftune.modeling import DiffTransformerConfig
from difftune.modeling.layers import RMSNorm, SubLayerNorm, SwiGLU, build_rotary
from difftune.ops import rms_norm

CONFIG = DiffTransformerConfig(
    vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
)


def test_rms_norm_equals_llamas():
    ours, theirs = RMSNorm(32, 1e-5), LlamaRMSNorm(32, 1e-5)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("affine", [True, False])
def test_sublayer_norm_equals_the_equation(affine):
    norm = SubLayerNorm(16, 1e-5, scale=0.7, affine=affine)
    weight = 1.0
    if affine:
        torch.nn.init.normal_(norm.weight)
        weight = norm.weight
    x = torch.randn(2, 3, 4, 16)
    expected = 0.7 * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, norm.scaled_weight(x), norm.eps), expected)
    assert len(list(norm.parameters())) == affine


def test_swiglu_equals_llamas():
    ours, theirs = SwiGLU(CONFIG), LlamaMLP(_llama_like())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_scaled_rotary_embeddings_come_from_transformers():
    scaled = DiffTransformerConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    )
    x, positions = torch.zeros(1), torch.arange(8)[None]
    cos, _ = build_rotary(scaled)(x, position_ids=4 * positions)
    expected, _ = build_rotary(CONFIG)(x, position_ids=positions)
    torch.testing.assert_close(cos, expected)


def _llama_like():
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
