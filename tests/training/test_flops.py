import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
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


def test_training_is_three_forwards():
    assert ModelFlops(2.0, 3.0, 5.0).of_training(10, 4, 7) == 3 * (20 + 12 + 35)


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
