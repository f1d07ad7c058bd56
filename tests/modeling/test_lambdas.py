import math

import torch

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.lambdas import LambdaV1, LambdaV2, lambda_init_at


def test_the_first_layer_starts_at_a_fifth():
    # Values of the paper's schedule for layers 1, 2, 3, 11 and 28, counted from 1.
    for layer, value in ((0, 0.2), (1, 0.3555), (2, 0.4707), (10, 0.7701), (27, 0.7998)):
        assert math.isclose(lambda_init_at(layer), value, abs_tol=6e-5)


def test_v1_equals_the_equation():
    module = LambdaV1(8, 0.2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    p = {name: value.detach().double() for name, value in module.named_parameters()}
    expected = math.exp(p["lambda_q1"] @ p["lambda_k1"]) - math.exp(p["lambda_q2"] @ p["lambda_k2"]) + 0.2
    assert module().shape == () and math.isclose(module().item(), expected, rel_tol=1e-5)


def test_v2_is_a_sigmoid_a_token_and_head_in_float32_whatever_the_autocast():
    module = LambdaV2(8, 3)
    x = torch.randn(2, 5, 8)
    expected = torch.sigmoid(x @ module.lambda_proj.weight.T)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(x)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


def test_lambda_stays_float32_in_a_bfloat16_checkpoint(tmp_path):
    for kind in ("diff_v1", "diff_v2"):
        config = DiffTransformerConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            attention=kind,
        )
        DiffTransformerForCausalLM(config).save_pretrained(tmp_path / kind)
        model = DiffTransformerForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.bfloat16)
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        assert {p.dtype for n, p in model.named_parameters() if "lambda_full" in n} == {torch.float32}
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_fresh_model_draws_the_lambda_vectors_with_the_configured_deviation():
    config = DiffTransformerConfig(
        vocab_size=16,
        hidden_size=1024,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        lambda_std_dev=0.3,
    )
    model = DiffTransformerForCausalLM(config)
    values = torch.cat([p.detach() for n, p in model.named_parameters() if "lambda_full" in n])
    assert values.numel() == 2 * 4 * 256 and math.isclose(values.std().item(), 0.3, rel_tol=0.1)
