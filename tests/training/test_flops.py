import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.training import flops
from difftune.training.flops import ModelFlops, peak_flops


def tiny(attention, tied):
    return DiffTransformerForCausalLM(
        DiffTransformerConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention=attention,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_the_matrix_products_are_those_that_torch_counts(attention, tied):
    model = tiny(attention, tied)
    ids = torch.randint(96, (2, 10))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    products = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if operation in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    model_flops = ModelFlops.of_model(model)
    # Without labels the head is computed at every position.
    expected = 20 * (model_flops.per_token + model_flops.per_label_token)
    if attention == "diff_v2":
        # lambda_proj may be computed as a batched product or not; it is in the model's own arithmetic either way.
        lambda_proj = 20 * 2 * 2 * 32 * model.config.num_diff_heads
        assert products in (expected, expected - lambda_proj)
    else:
        assert products == expected


def test_attention_counts_two_products_a_map():
    for attention, width in (("diff_v1", 16), ("diff_v2", 8), ("softmax", 8)):
        # 2 layers, 4 maps, head_dim 8.
        assert ModelFlops.of_model(tiny(attention, True)).per_attended_pair == 2 * 2 * 4 * (8 + width)


def counted(model):
    """FLOP of the two-dimensional products of a forward and backward over 2 rows of 10, each token a label."""
    ids = torch.randint(96, (2, 10))

    def product(a, b, out_shape=None, **unused):
        # With a vector: a sum, which the norms write as a product.
        return 0 if 1 in (*a, *b) else 2 * a[0] * a[1] * b[1]

    def added_product(added, a, b, out_shape=None, **unused):
        return product(a, b)

    # The head adds to the gradient of its weight in place, which torch does not count by itself.
    mapping = {torch.ops.aten.mm: product, torch.ops.aten.addmm_: added_product}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(ids, labels=ids).loss.backward()
    return sum(n for operation, n in counter.get_flop_counts()["Global"].items() if operation in mapping)


def own_count(model):
    model_flops = ModelFlops.of_model(model)
    model_flops.per_attended_pair = model_flops.backward_per_attended_pair = 0.0
    # The last token of a row predicts none.
    return model_flops.of_training(20, 18, 0)


def test_training_the_whole_model_is_three_forwards():
    model_flops = ModelFlops.of_model(tiny("diff_v1", True))
    forward = 10 * model_flops.per_token + 4 * model_flops.per_label_token + 7 * model_flops.per_attended_pair
    assert model_flops.of_training(10, 4, 7) == 3 * forward


@pytest.mark.parametrize("attention", ["diff_v1", "softmax"])
@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"preset": "attention", "rank": 3},
        {"preset": "all_linear", "rank": 3},
        {"targets": ["o_proj"], "rank": 3, "train_lambda": False},
        {"targets": ["down_proj"], "rank": 3, "train_lambda": False},
        {"targets": ["v_proj", "up_proj"], "rank": 5, "train_norms": True},
        {"targets": ["gate_proj"], "rank": 3, "train_embeddings": True},
        {"preset": "lambda_only"},
        {"preset": "negative_branch", "rank": 3},
    ],
    ids=str,
)
def test_forward_and_backward_are_what_torch_counts_with_any_part_frozen(attention, settings):
    if attention == "softmax" and settings and settings.get("preset") in ("lambda_only", "negative_branch"):
        pytest.skip("needs a negative map")
    model = tiny(attention, tied=False)
    if settings is not None:
        if attention == "softmax":
            settings = {name: value for name, value in settings.items() if name != "train_lambda"}
        add_adapter(model, AdapterSettings(**settings))
    assert own_count(model) == counted(model)


def test_the_backward_through_a_frozen_model_costs_about_half():
    model = tiny("diff_v1", tied=True)
    whole = ModelFlops.of_model(model)
    add_adapter(model, AdapterSettings(preset="all_linear", rank=1))
    adapted = ModelFlops.of_model(model)
    assert whole.per_token < adapted.per_token < 1.15 * whole.per_token
    assert 0.4 * whole.backward_per_token < adapted.backward_per_token < 0.65 * whole.backward_per_token


def test_a_trained_norm_makes_the_gradients_of_what_comes_after_it_needed():
    settings = AdapterSettings(targets=["v_proj"], rank=5)
    frozen, trained = tiny("diff_v1", tied=True), tiny("diff_v1", tied=True)
    add_adapter(frozen, settings)
    add_adapter(trained, dataclasses.replace(settings, train_norms=True))
    more, less = ModelFlops.of_model(trained), ModelFlops.of_model(frozen)
    # The input of the first layer's v, 32 by 32, of its LoRA, and of q1, q2, k1 and k2, 16 by 32 each.
    assert more.backward_per_token - less.backward_per_token == 2 * (32 * 32 + 32 * 5 + 4 * 16 * 32)
    assert more.backward_per_attended_pair == less.backward_per_attended_pair == 2 * less.per_attended_pair


def test_the_maps_of_the_first_layer_need_no_backward_where_only_lambda_is_trained():
    model = tiny("diff_v2", tied=True)
    add_adapter(model, AdapterSettings(preset="lambda_only"))
    model_flops = ModelFlops.of_model(model)
    assert model_flops.backward_per_attended_pair == model_flops.per_attended_pair


def test_the_peak_is_known_for_known_devices_and_16_bit_only(monkeypatch):
    device = torch.device("cuda:0")
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("NVIDIA L4", 1.21e14),
        ("NVIDIA L40S", 3.62e14),
        ("NVIDIA GeForce GTX 1080", None),
    ):
        monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(device, "bf16-mixed") == expected
        assert peak_flops(device, "32-true") is None
    assert peak_flops(torch.device("cpu"), "bf16-mixed") is None
