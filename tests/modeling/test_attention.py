import pytest
import torch
from transformers import DynamicCache

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, count_parameters

KINDS = ["diff_v1", "diff_v2", "softmax"]


def build(kind, **changed):
    options = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
        **changed,
    }
    return DiffTransformerForCausalLM(DiffTransformerConfig(attention=kind, **options)).eval()


def test_projections_are_split_and_lambda_is_a_module():
    names = {kind: {n for n, _ in build(kind).model.layers[0].self_attn.named_parameters()} for kind in KINDS}
    assert names["diff_v1"] == {
        *(f"{n}_proj.weight" for n in ("q1", "q2", "k1", "k2", "v", "o")),
        *(f"lambda_full.lambda_{n}" for n in ("q1", "k1", "q2", "k2")),
        "subln.weight",
    }
    assert names["diff_v2"] == {
        *(f"{n}_proj.weight" for n in ("q1", "q2", "k", "v", "o")),
        "lambda_full.lambda_proj.weight",
    }
    assert names["softmax"] == {f"{n}_proj.weight" for n in ("q", "k", "v", "o")}


def test_v1_and_the_baseline_have_equal_parameters_but_for_lambda_and_the_norm():
    v1, softmax = count_parameters(build("diff_v1")), count_parameters(build("softmax"))
    norms = 2 * 16
    assert v1["total"] - v1["lambda"] - norms == softmax["total"] and v1["lambda"] == 2 * 4 * 8


def test_v2_saves_half_of_the_output_projection():
    saved = count_parameters(build("softmax"))["total"] - (
        count_parameters(build("diff_v2"))["total"] - count_parameters(build("diff_v2"))["lambda"]
    )
    assert saved == 2 * 64 * 32


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_holds_no_more_bytes_than_the_baselines(kind):
    cache = DynamicCache()
    build(kind)(torch.randint(2, 32, (3, 10)), past_key_values=cache, use_cache=True)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert numbers == 2 * 2 * 3 * 10 * 4 * 8


@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_query_key_norms_are_trained(kind):
    model = build(kind, attention_bias=True, attention_out_bias=True, qk_norm=True).train()
    model(torch.randint(2, 32, (2, 9)), labels=torch.randint(2, 32, (2, 9))).loss.backward()
    # A key bias adds the same number to every logit of a query... but for the rotation, which makes it depend on s.
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    names = [n for n, _ in model.named_parameters()]
    assert not missing and any("v_proj.bias" in n for n in names) and any("q_norm" in n for n in names)


@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_gives_the_same_logits(kind):
    model = build(kind)
    x = torch.randint(2, 32, (2, 9))
    model.config.attention_backend = "reference"
    expected = model(x).logits
    model.config.attention_backend = "sdpa"
    torch.testing.assert_close(model(x).logits, expected)


def test_without_the_sublayer_norm_the_output_is_the_bare_difference():
    attention = build("diff_v1", subln="none").model.layers[0].self_attn
    assert attention.subln is None


def test_a_constant_lambda_init_serves_every_layer():
    layers = build("diff_v1", lambda_init=0.5).model.layers
    assert [layer.self_attn.lambda_full.lambda_init for layer in layers] == [0.5, 0.5]
    assert [layer.self_attn.subln.scale for layer in layers] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("kind", "subln"), [("diff_v1", "affine"), ("diff_v1", "plain"), ("diff_v1", "none"), ("diff_v2", "none")]
)
def test_the_fused_kernels_give_the_logits_and_gradients_of_the_equation(kind, subln):
    pytest.importorskip("triton")
    from difftune.ops.triton.launch import is_interpreted

    if not is_interpreted():
        pytest.skip("the model is on the CPU, where the kernels run in Triton's interpreter only")
    model = build(kind, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32, subln=subln)
    x, padded = torch.randint(2, 32, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padded[0, :3] = 0
    results = []
    for backend in ("reference", "triton"):
        model.config.attention_backend = backend
        logits = model(x, attention_mask=padded).logits
        results.append([logits, *torch.autograd.grad(logits[padded.bool()].square().mean(), [*model.parameters()])])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
