import copy
import importlib

import pytest
import torch

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter, count_adapter_parameters, merged_tensors, trained_parameters
from difftune.modeling.quantized import (
    dequantize_base,
    dequantized_weight,
    num_weights,
    quantization_of,
    quantize_base,
    weight_bytes,
)

pytest.importorskip("bitsandbytes")
DTYPES = [torch.float32, torch.bfloat16]


def build(attention="diff_v1", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    # A head dim of 32: below it, bitsandbytes cannot repack for AVX512-BF16, which is what one test is about.
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32, "vocab_size": 61}
    config = DiffTransformerConfig(**size, num_hidden_layers=2, attention=attention, initializer_range=0.1, **changes)
    return cast_weights(DiffTransformerForCausalLM(config).eval(), dtype)


def tokens():
    return torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def gradients(adapted):
    adapted.train().zero_grad()
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    return {key: parameter.grad.clone() for key, parameter in trained_parameters(adapted).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_only_the_projections_of_the_layers_are_in_4_bits(attention, dtype):
    model = build(attention, dtype, attention_bias=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = quantize_base(model, "nf4", compute_dtype=dtype)
    per_layer = {"diff_v1": 4, "diff_v2": 3, "softmax": 2}[attention] + 5
    assert report.layers == 2 * per_layer
    for name, parameter in model.named_parameters():
        is_projection = name.endswith("_proj.weight") and "lambda_full" not in name
        assert not parameter.requires_grad
        assert (parameter.dtype == torch.uint8) == is_projection, name
        assert num_weights(parameter) == before[name].numel()
        if not is_projection:
            assert torch.equal(parameter, before[name]), name
    assert quantization_of(model) == {
        "type": "nf4",
        "double_quant": True,
        "compute_dtype": str(dtype).removeprefix("torch."),
    }


def test_memory_before_and_after_is_told():
    model = build()
    whole = sum(p.numel() * 4 for p in model.parameters())
    projections = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    report = quantize_base(model, "nf4", compute_dtype=torch.float32)
    assert report.bytes_before == whole and report.bytes_after == weight_bytes(model)
    # Half a byte a weight, and the scales: a byte for 64 weights, and their own beside a table of 256 for each layer.
    rest = whole - 4 * projections
    assert rest + projections // 2 < report.bytes_after < rest + projections * 0.55 + 2000 * report.layers
    assert str(report).startswith("18 projections in 4 bits: weights 0.")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rounding_of_a_weight_is_that_of_nf4_in_blocks_of_64(dtype):
    model = build(dtype=dtype)
    plain = copy.deepcopy(model.model.layers[0].mlp.up_proj.weight.detach()).float()
    quantize_base(model, "nf4", compute_dtype=dtype, double_quant=False)
    found = dequantized_weight(model.model.layers[0].mlp.up_proj).float()
    # The sixteen levels of the paper's appendix E.
    levels = torch.tensor(
        [
            *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
            *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
        ]
    )
    blocks = plain.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(levels).abs().argmin(-1)
    expected = (levels[nearest] * scale).reshape(plain.shape)
    share = ((found - expected).abs() <= 4 * torch.finfo(dtype).eps * scale.max()).float().mean()
    assert share > 0.999  # a weight halfway between two levels may go either way


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantised_weights_compute_the_same_to_the_bit(dtype):
    model = build(dtype=dtype, attention_bias=True)
    plain_weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantize_base(model, "nf4", compute_dtype=dtype)
    plain = copy.deepcopy(model)
    assert dequantize_base(plain) == 18 and quantization_of(plain) is None
    assert plain.dequantized_from == quantization_of(model)
    assert torch.equal(logits(plain), logits(model))
    named = dict(plain.named_parameters())
    assert named.keys() == plain_weights.keys()
    assert all(p.dtype == plain_weights[name].dtype for name, p in named.items())
    assert not torch.equal(
        named["model.layers.0.mlp.up_proj.weight"], plain_weights["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_are_those_of_plain_weights_also_after_an_evaluation(dtype, use_dora):
    # On processors with AVX512-BF16, bitsandbytes repacks the weights in an evaluation, and loses the gradients.
    model = build(dtype=dtype)
    quantize_base(model, "nf4", compute_dtype=dtype)
    plain = copy.deepcopy(model)
    dequantize_base(plain)
    settings = AdapterSettings(preset="all_linear", use_dora=use_dora)
    adapted, oracle = (add_adapter(base, settings) for base in (model, plain))
    with torch.no_grad():
        for key, parameter in trained_parameters(adapted).items():
            if "lora_B" in key:
                parameter.normal_(std=0.05)
            trained_parameters(oracle)[key].copy_(parameter)
    before = gradients(adapted)
    logits(adapted.eval())
    after, expected = gradients(adapted), gradients(oracle)
    for key, gradient in expected.items():
        assert torch.equal(before[key], after[key]), key
        scale = gradient.abs().max()
        assert scale > 0 and (after[key] - gradient).abs().max() <= 8 * torch.finfo(dtype).eps * scale, key


def test_a_step_lowers_the_loss_and_leaves_the_base_alone():
    model = build(dtype=torch.bfloat16)
    quantize_base(model, "nf4", compute_dtype=torch.bfloat16)
    stored = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = add_adapter(model, AdapterSettings(preset="attention"))
    optimizer = torch.optim.AdamW(list(trained_parameters(adapted).values()), lr=2e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        logits(adapted.eval())
        adapted.train()
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if plain in stored:
            assert torch.equal(parameter, stored[plain]), plain


def test_a_dead_pair_in_4_bits_is_woken_too():
    model = build()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q2_proj, layer.self_attn.k2_proj):
            torch.nn.init.zeros_(projection.weight)
    quantize_base(model, "nf4", compute_dtype=torch.float32)
    # Four zeros of NF4 are not bytes of zero.
    assert model.model.layers[0].self_attn.q2_proj.weight.any()
    adapted = add_adapter(model, AdapterSettings(preset="negative_branch", train_lambda=False))
    live = [key for key, gradient in gradients(adapted).items() if gradient.any()]
    assert [key.split(".")[-3:] for key in live] == [["k2_proj", "lora_B", "weight"]] * 2


def test_weights_are_counted_and_not_bytes():
    plain, model = build(), build()
    quantize_base(model, "nf4", compute_dtype=torch.float32)
    counts = [count_adapter_parameters(add_adapter(base, AdapterSettings())) for base in (plain, model)]
    assert counts[0] == counts[1]


def test_what_cannot_be_quantised_is_refused():
    model = build()
    with pytest.raises(ValueError, match="quantization 'int3' is unknown: choose one of nf4"):
        quantize_base(model, "int3", compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"compute_dtype must be float32, .* got torch.float64"):
        quantize_base(model, "nf4", compute_dtype=torch.float64)
    with torch.device("meta"):
        skeleton = DiffTransformerForCausalLM(model.config)
    with pytest.raises(ValueError, match="has no weights to quantise: load it first"):
        quantize_base(skeleton, "nf4", compute_dtype=torch.float32)
    quantize_base(model, "nf4", compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="is quantised already"):
        quantize_base(model, "nf4", compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"v_proj is quantised: load the adapter with load_with_base\(.*dequantized"):
        merged_tensors(add_adapter(model, AdapterSettings()))


def test_without_bitsandbytes_the_message_says_how_to_install_it(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    model = build()
    with pytest.raises(ImportError, match=r"not installed: pip install 'difftune\[qlora\]'"):
        quantize_base(model, "nf4", compute_dtype=torch.float32)
    assert quantization_of(model) is None
