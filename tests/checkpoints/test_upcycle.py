import pytest
import torch

from difftune.checkpoints.streams import in_order
from difftune.checkpoints.upcycle import (
    config_to_softmax,
    config_to_v1,
    config_to_v2,
    to_diff_v1,
    to_diff_v2,
    to_softmax,
)
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from tests.checkpoints.llamas import SIZE, logits, token_ids


def softmax_model(**changes) -> DiffTransformerForCausalLM:
    config = DiffTransformerConfig(**{**SIZE, "attention": "softmax", **changes})
    return DiffTransformerForCausalLM(config).eval()


def stream_of(model: DiffTransformerForCausalLM):
    return in_order(model.state_dict())


def build(config: DiffTransformerConfig, tensors) -> DiffTransformerForCausalLM:
    model = DiffTransformerForCausalLM(config).eval()
    model.load_state_dict(dict(tensors))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_doubling_is_exact_in_every_dtype(dtype: torch.dtype) -> None:
    source = softmax_model().to(dtype)
    ours = dict(to_diff_v2(source.config, stream_of(source)))
    back = dict(to_softmax(config_to_v2(source.config), in_order(ours)))
    expected = source.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) and back[name].dtype == dtype for name in expected)


def test_v2_differs_in_number_of_maps_alone() -> None:
    config = softmax_model(num_attention_heads=6, num_key_value_heads=3, hidden_size=48).config
    target = config_to_v2(config)
    assert (target.attention, target.num_attention_heads, target.num_diff_heads) == ("diff_v2", 12, 6)
    differing = {k for k, v in target.to_dict().items() if config.to_dict().get(k) != v}
    assert differing == {"attention", "num_attention_heads"}
    assert config.num_attention_heads == 6, "the source's config is untouched"


def test_v1_with_equal_pairs_is_the_same_function() -> None:
    """Where both heads of a pair see the same, (A - lambda A) / (1 - lambda) = A: no head may be misplaced."""
    source = softmax_model()
    groups, members, head_dim = 2, 2, 6
    with torch.no_grad():
        for layer in source.model.layers:
            for module, parts in ((layer.self_attn.q_proj, members), (layer.self_attn.k_proj, 1)):
                pairs = module.weight.view(groups, 2, parts * head_dim, -1)
                pairs[:, 1] = pairs[:, 0]
    target = config_to_v1(source.config, subln="none", lambda_init=0.3)
    ours = build(target, to_diff_v1(source.config, target, stream_of(source)))
    ids = token_ids(2, 30)
    torch.testing.assert_close(logits(ours, ids), logits(source, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("subln", ["none", "plain", "affine"])
def test_v1_lambda_starts_at_its_constant_and_everything_learns(subln: str) -> None:
    source = softmax_model()
    target = config_to_v1(source.config, subln=subln, lambda_init=0.1 if subln == "none" else None)
    ours = build(target, to_diff_v1(source.config, target, stream_of(source))).train()
    for layer in ours.model.layers:
        module = layer.self_attn.lambda_full
        assert module().item() == pytest.approx(module.lambda_init, abs=1e-6)
    ids = token_ids(2, 30)
    ours(input_ids=ids, labels=ids).loss.backward()
    dead = [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("heads", [(9, 3), (6, 3)])
def test_odd_heads_are_refused_for_v1_with_the_remedy(heads: tuple[int, int]) -> None:
    config = softmax_model(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=6).config
    with pytest.raises(
        ValueError, match=r"both must be even; diff_v2 takes any number, and loses nothing: --to diff_v2"
    ):
        config_to_v1(config, subln="none", lambda_init=None)


@pytest.mark.parametrize("convert", [config_to_v2, lambda c: config_to_v1(c, subln="none", lambda_init=None)])
def test_a_differential_model_is_not_converted_again(convert) -> None:
    with pytest.raises(ValueError, match="a diff_v1 model is not converted to"):
        convert(DiffTransformerConfig(attention="diff_v1"))


def test_softmax_comes_back_only_while_nothing_was_learned() -> None:
    source = softmax_model()
    assert config_to_softmax(source.config) is source.config
    target = config_to_v2(source.config)
    assert config_to_softmax(target).num_attention_heads == source.config.num_attention_heads
    with pytest.raises(ValueError, match="--to diffllama is what plain transformers loads"):
        config_to_softmax(DiffTransformerConfig(attention="diff_v1"))
    for name, message in (
        ("q2_proj", "q1_proj and q2_proj differ"),
        ("lambda_full.lambda_proj", "lambda_proj is not zero"),
    ):
        ours = dict(to_diff_v2(source.config, stream_of(source)))
        ours[f"model.layers.1.self_attn.{name}.weight"][0, 0] += 1
        with pytest.raises(ValueError, match=rf"model\.layers\.1\.self_attn: {message}"):
            dict(to_softmax(target, in_order(ours)))
