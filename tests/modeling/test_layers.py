import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
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


@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_a_gated_unit_in_chunks_gives_the_same_and_keeps_less(tokens):
    unit = SwiGLU(CONFIG)
    x = torch.randn(3, 5, 32, requires_grad=True)

    def run(chunk):
        unit.chunk, kept = chunk, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = unit(x)
        return out, torch.autograd.grad(out.square().sum(), [x, *unit.parameters()]), sum(kept)

    whole, gradients, kept = run(None)
    out, chunked, kept_chunked = run(tokens)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(chunked, gradients)
    assert kept_chunked == kept if tokens == 100 else kept_chunked < kept / 10
    with torch.no_grad():
        torch.testing.assert_close(unit(x), whole)


ROPE_FORMS = {
    "base": {"rope_type": "default", "rope_theta": 640000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 16.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 16.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("form", ROPE_FORMS)
@pytest.mark.parametrize("length", [16, 65536, 70000])
def test_every_form_of_longer_positions_equals_llamas(form, length, tmp_path):
    """Asked for when a model is extended, and after it was saved and loaded; within its reach, and beyond it."""
    config = DiffTransformerConfig(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = DiffTransformerForCausalLM(config)
    model.extend_context(max_position_embeddings=65536, rope_parameters=ROPE_FORMS[form])
    model.save_pretrained(tmp_path)
    loaded = DiffTransformerForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    llama = LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=65536, rope_parameters=dict(ROPE_FORMS[form])
    )
    x, positions = torch.zeros(1), torch.tensor([[0, 1, 5, length - 1]])
    expected = LlamaRotaryEmbedding(config=llama)(x, position_ids=positions)
    for rotary in (model.model.rotary_emb, loaded.model.rotary_emb):
        for ours, theirs in zip(rotary(x, position_ids=positions), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_form_without_its_numbers_is_refused():
    model = DiffTransformerForCausalLM(CONFIG)
    before = dict(model.config.rope_parameters)
    with pytest.raises(ValueError, match=r"rope_parameters: .*yarn.*factor"):
        model.extend_context(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0})
    with pytest.raises(ValueError, match=r"rope_type='yarm' is unknown, choose one of"):
        model.extend_context(rope_parameters={"rope_type": "yarm", "rope_theta": 10000.0})
    assert model.config.rope_parameters == before


def test_what_an_extension_does_not_say_is_the_models_own():
    config = DiffTransformerConfig(**{**CONFIG.to_dict(), "rope_parameters": ROPE_FORMS["base"]})
    model = DiffTransformerForCausalLM(config)
    for _ in ("a stage", "the next one, from its checkpoint"):
        model.extend_context(max_position_embeddings=65536, rope_parameters={"rope_type": "yarn", "factor": 16.0})
    assert model.config.rope_parameters["rope_theta"] == 640000.0
    assert model.config.rope_parameters["original_max_position_embeddings"] == 4096


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
    return LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
