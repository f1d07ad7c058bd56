import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from difftune.checkpoints.load import load_model
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.lambdas import WARMUP_STEP, LambdaV1, LambdaV2, lambda_init_at, warming_up


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


def tiny_v1(**changes):
    shape = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return DiffTransformerForCausalLM(DiffTransformerConfig(**{**shape, "num_attention_heads": 4, **changes}))


def test_a_warm_up_multiplies_lambda_by_the_share_of_its_steps():
    module, plain = LambdaV1(8, 0.2, warmup_steps=4), LambdaV1(8, 0.2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    plain.load_state_dict({name: p for name, p in module.state_dict().items() if name != WARMUP_STEP})
    for share in (1 / 5, 2 / 5, 3 / 5, 4 / 5):
        assert math.isclose(module().item(), share * plain().item(), rel_tol=1e-6)
        module.advance()
    for _ in range(3):
        assert torch.equal(module(), plain()), "after the last step it is lambda to the bit"
        module.advance()
    assert module.get_buffer(WARMUP_STEP).item() == 4
    assert module.double()().dtype == torch.float64


def test_the_second_map_learns_from_the_first_step_of_a_warm_up():
    model, ids = tiny_v1(lambda_warmup_steps=1000), torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "q2_proj" in n or "lambda" in n)


def test_only_a_model_with_a_warm_up_has_its_step():
    assert not any(WARMUP_STEP in name for name in tiny_v1().state_dict())
    assert sum(WARMUP_STEP in name for name in tiny_v1(lambda_warmup_steps=3).state_dict()) == 2
    for wrong in ({"lambda_warmup_steps": -1}, {"lambda_warmup_steps": 3, "attention": "diff_v2"}):
        with pytest.raises(ValueError, match=r"lambda_warmup_steps=-?\d with attention=.*must be 0, or a number"):
            DiffTransformerConfig(**wrong)


def test_a_warm_up_begins_and_ends_on_request():
    model, ids = tiny_v1(), torch.arange(16)[None]
    before = model(ids).logits
    model.warm_up_lambda(5)
    assert model.config.lambda_warmup_steps == 5 and not torch.equal(model(ids).logits, before)
    model.warm_up_lambda(0)
    assert torch.equal(model(ids).logits, before) and not any(WARMUP_STEP in name for name in model.state_dict())
    with pytest.raises(ValueError, match=r"lambda_warmup_steps=5 for a softmax model: lambda of diff_v1 alone"):
        tiny_v1(attention="softmax").warm_up_lambda(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_of_a_warm_up_is_saved_and_loaded_in_float32(tmp_path, dtype):
    model = cast_weights(tiny_v1(lambda_warmup_steps=1000), dtype)
    for module in warming_up(model):
        module.get_buffer(WARMUP_STEP).fill_(517)  # not a number of bfloat16
    model.save_pretrained(tmp_path)
    ids = torch.arange(16)[None]
    for again in (load_model(tmp_path), DiffTransformerForCausalLM.from_pretrained(tmp_path, dtype=dtype)):
        steps = [module.get_buffer(WARMUP_STEP) for module in warming_up(again)]
        assert [(step.item(), step.dtype) for step in steps] == [(517, torch.float32)] * 2
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_loading_is_strict_about_the_step_of_a_warm_up(tmp_path):
    tiny_v1(lambda_warmup_steps=3).save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(path)
    name = f"model.layers.1.self_attn.lambda_full.{WARMUP_STEP}"
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(ValueError, match=rf"1 missing \({name}\)"):
        load_model(tmp_path)
    fields = json.loads(config.read_text())
    del fields["lambda_warmup_steps"]
    config.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"1 extra \(model\.layers\.0\.self_attn\.lambda_full\.warmup_step\)"):
        load_model(tmp_path)
    # What was written before there were warm-ups has neither.
    save_file({n: t for n, t in tensors.items() if WARMUP_STEP not in n}, path)
    assert load_model(tmp_path).config.lambda_warmup_steps == 0
