import copy

import pytest
import torch
from peft import LoraConfig

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.adapter_settings import PRESETS, AdapterSettings
from difftune.modeling.adapters import (
    activate_adapter,
    add_adapter,
    base_tensors,
    combine_adapters,
    count_adapter_parameters,
    describe_adapter,
    file_key,
    lora_layers,
    merged_tensors,
    saved_tensors,
    trained_parameters,
)
from difftune.modeling.lambdas import warming_up
from difftune.training.optim import build_parameter_groups

KINDS = ("diff_v1", "diff_v2", "softmax")


def build(attention="diff_v1", **changes):
    shape = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 10,
        "initializer_range": 0.1,
        "lambda_std_dev": 0.3,
    }
    return DiffTransformerForCausalLM(DiffTransformerConfig(**{**shape, "attention": attention, **changes})).eval()


def tokens():
    return torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def trained(model, settings, name="default", steps=3):
    """Attach an adapter and train it for a few large steps."""
    adapted = add_adapter(model, settings, name)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    adapted.train()
    for _ in range(steps):
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_changes_nothing_at_the_start_and_then_trains_itself_alone(attention, use_dora):
    model = build(attention)
    before, frozen = logits(model), copy.deepcopy(model.state_dict())
    settings = AdapterSettings(preset="all_linear", ranks={"shared": 3}, use_dora=use_dora, train_norms=True)
    adapted = add_adapter(model, settings)
    torch.testing.assert_close(logits(adapted), before, rtol=0, atol=1e-5)
    start = {key: p.detach().clone() for key, p in trained_parameters(adapted).items()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    still = [key for key, p in trained_parameters(adapted).items() if torch.equal(p, start[key])]
    assert not still
    assert all(torch.equal(tensor, frozen[key]) for key, tensor in base_tensors(adapted).items())
    assert base_tensors(adapted).keys() == frozen.keys()
    assert (logits(adapted) - before).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
@pytest.mark.parametrize("train_lambda", [False, True])
def test_negative_branch_alone_has_live_gradients_at_step_0(attention, train_lambda):
    adapted = add_adapter(build(attention), AdapterSettings(preset="negative_branch", train_lambda=train_lambda))
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {key: p.grad for key, p in trained_parameters(adapted).items()}
    live = {key for key, gradient in gradients.items() if gradient.abs().max() > 1e-7}
    # B is zero, so the gradient of A is; B and lambda learn from the first step.
    assert live == {key for key in gradients if "lora_A" not in key}
    assert any("q2_proj.lora_B" in key for key in live)
    assert any("lambda" in key for key in live) == train_lambda


def test_negative_branch_that_is_lora_alone_is_woken_without_changing_the_function():
    model = build()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q2_proj.weight.zero_()
            layer.self_attn.k2_proj.weight.zero_()
    before = logits(model)
    adapted = add_adapter(model, AdapterSettings(preset="negative_branch", train_lambda=False))
    assert torch.equal(logits(adapted), before)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in trained_parameters(adapted).values())
    with pytest.raises(ValueError, match="q2_proj has rows that are zero, whose direction DoRA cannot keep"):
        add_adapter(adapted, AdapterSettings(preset="negative_branch", use_dora=True), "dora")


def test_ranks_and_scalings_of_the_branches_are_those_of_the_settings():
    settings = AdapterSettings(rank=6, alpha=12, ranks={"negative": 3}, alphas={"negative": 15})
    plain = lora_layers(add_adapter(build(), settings), "default")
    rooted = lora_layers(add_adapter(build(), AdapterSettings(**{**vars(settings), "use_rslora": True})), "default")
    stem = "model.layers.1.self_attn."
    assert (plain[stem + "k1_proj"].r["default"], plain[stem + "k1_proj"].scaling["default"]) == (6, 2)
    assert (plain[stem + "k2_proj"].r["default"], plain[stem + "k2_proj"].scaling["default"]) == (3, 5)
    assert rooted[stem + "k2_proj"].scaling["default"] == pytest.approx(15 / 3**0.5)


def test_lambda_and_norms_are_float32_on_a_bfloat16_base_and_are_grouped_for_the_optimiser():
    model = cast_weights(build("diff_v2"), torch.bfloat16)
    adapted = add_adapter(model, AdapterSettings(train_norms=True))
    assert {p.dtype for p in trained_parameters(adapted).values()} == {torch.float32}
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    groups = {g["name"]: g for g in build_parameter_groups(adapted, lr=1e-3, weight_decay=0.1, lambda_lr=1e-2)}
    assert groups["lambda"]["lr"] == 1e-2 and groups["lambda"]["weight_decay"] == 0
    assert sum(p.numel() for p in groups["lambda"]["params"]) == 2 * 48 * 4


def test_a_tied_head_follows_a_trained_embedding_and_keeps_its_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        model = cast_weights(build(tie_word_embeddings=True), dtype)
        adapted = trained(model, AdapterSettings(preset="lambda_only", train_embeddings=True))
        saved = trained_parameters(adapted)
        embedding = saved["base_model.model.model.embed_tokens.weight"]
        assert embedding.dtype == dtype
        assert saved["base_model.model.lm_head.weight"] is embedding
        assert model.lm_head.weight is embedding
        assert count_adapter_parameters(adapted)["embeddings"] == 61 * 48


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_counts_by_group_add_up(attention, preset):
    if attention == "softmax" and preset in ("lambda_only", "negative_branch"):
        return
    model = build(attention)
    total = model.num_parameters()
    adapted = add_adapter(model, AdapterSettings(preset=preset, rank=2))
    counts = count_adapter_parameters(adapted)
    assert counts["trainable"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    lora = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert counts["total"] == total + lora
    assert counts.get("lambda", 0) == {"diff_v1": 2 * 4 * 10, "diff_v2": 2 * 48 * 4, "softmax": 0}[attention]
    if (attention, preset) == ("diff_v1", "negative_branch"):
        assert counts["lora negative"] == 2 * 2 * ((48 + 40) + (48 + 20))
        assert "lora positive" not in counts
        assert describe_adapter(adapted) == f"trainable 704 of {total + 624:,} (1.33%): lora negative 624, lambda 80"


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_weights_compute_what_the_adapter_does(attention, use_dora):
    settings = AdapterSettings(
        preset="all_linear", ranks={"shared": 3}, alphas={"shared": 7}, use_dora=use_dora, train_norms=True
    )
    adapted = trained(build(attention, attention_bias=True), settings)
    merged = build(attention, attention_bias=True)
    assert (logits(merged) - logits(adapted)).abs().max() > 0.1
    merged.load_state_dict(merged_tensors(adapted))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=2e-5)


def test_peft_s_own_merge_and_unmerge_come_back_within_1e_6():
    adapted = trained(build(), AdapterSettings(preset="all_linear"))
    before, weights = logits(adapted), {key: t.clone() for key, t in base_tensors(adapted).items()}
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), before, rtol=0, atol=2e-5)
    adapted.unmerge_adapter()
    assert max((t - weights[key]).abs().max() for key, t in base_tensors(adapted).items()) <= 1e-6


def test_several_adapters_are_switched_and_do_not_touch_one_another():
    model = build()
    plain = logits(model)
    adapted = trained(model, AdapterSettings(preset="all_linear"), "one")
    of_a = logits(adapted)
    trained(adapted, AdapterSettings(preset="negative_branch", train_lambda=False), "two")
    of_b = logits(adapted)
    assert all((x - y).abs().max() > 1e-3 for x, y in ((plain, of_a), (of_a, of_b), (plain, of_b)))
    activate_adapter(adapted, "one")
    assert torch.equal(logits(adapted), of_a)
    assert not any(p.requires_grad for p in adapted.parameters())
    activate_adapter(adapted, "two", trainable=True)
    assert torch.equal(logits(adapted), of_b)
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == {
        id(p) for p in trained_parameters(adapted, "two").values()
    }
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    with pytest.raises(ValueError, match="there is no adapter 'c': the model has one, two"):
        activate_adapter(adapted, "c")


@pytest.mark.parametrize("name", ["a.b", "", "2nd", "a"])
def test_names_that_would_confuse_parameter_names_are_refused(name):
    with pytest.raises(ValueError, match="must be a Python identifier"):
        add_adapter(build(), AdapterSettings(), name)


def test_a_name_is_given_once():
    adapted = add_adapter(build(), AdapterSettings())
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        add_adapter(adapted, AdapterSettings())


def test_weighted_sum_of_two_adapters_is_the_weighted_sum_of_their_updates():
    adapted = trained(
        build(), AdapterSettings(preset="all_linear", ranks={"negative": 2}, use_rslora=True, train_norms=True), "one"
    )
    trained(adapted, AdapterSettings(targets=["q2_proj", "v_proj"], rank=5), "two")
    base = {key: t.clone() for key, t in base_tensors(adapted).items()}
    parts = {name: merged_tensors(adapted, name) for name in ("one", "two")}
    combine_adapters(adapted, {"one": 0.7, "two": -0.4}, "both")
    both = merged_tensors(adapted, "both")
    for key, tensor in base.items():
        expected = tensor + 0.7 * (parts["one"][key] - tensor) - 0.4 * (parts["two"][key] - tensor)
        torch.testing.assert_close(both[key], expected, rtol=0, atol=2e-6)
    alone = build()
    alone.load_state_dict(both)
    torch.testing.assert_close(logits(adapted), logits(alone), rtol=0, atol=2e-5)
    assert lora_layers(adapted, "both")["model.layers.0.self_attn.q2_proj"].r["both"] == 2 + 5
    # The parts are as they were.
    assert all(torch.equal(merged_tensors(adapted, "one")[key], tensor) for key, tensor in parts["one"].items())


def test_weighted_sum_refuses_what_does_not_add():
    adapted = add_adapter(build(), AdapterSettings(use_dora=True), "one")
    with pytest.raises(ValueError, match="'one' uses DoRA, whose updates do not add"):
        combine_adapters(adapted, {"one": 1.0}, "sum")
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        combine_adapters(adapted, {"x": 1.0}, "sum")
    add_adapter(adapted, AdapterSettings(), "two")
    with pytest.raises(ValueError, match="must be finite, got inf"):
        combine_adapters(adapted, {"two": float("inf")}, "sum")
    with pytest.raises(ValueError, match="at least one"):
        combine_adapters(adapted, {}, "sum")


def test_a_combination_of_lambda_only_adapters_has_no_lora():
    adapted = trained(build(), AdapterSettings(preset="lambda_only"), "one")
    trained(adapted, AdapterSettings(preset="lambda_only"), "two", steps=5)
    combine_adapters(adapted, {"one": 0.5, "two": 0.5}, "mean")
    key = "base_model.model.model.layers.0.self_attn.lambda_full.lambda_q1"
    a, b, mean = (trained_parameters(adapted, name)[key] for name in ("one", "two", "mean"))
    assert not torch.equal(a, b)
    torch.testing.assert_close(mean, (a + b) / 2)


def test_file_keys_are_those_of_peft():
    stem = "model.layers.0.self_attn."
    assert file_key(stem + "q1_proj.base_layer.weight") is None
    assert file_key(stem + "lambda_full.original_module.lambda_q1") is None
    assert file_key(stem + "q1_proj.lora_B.maths.weight") is None
    assert file_key(stem + "q1_proj.lora_B.maths.weight", "maths") == f"base_model.model.{stem}q1_proj.lora_B.weight"
    magnitude = "base_model.model." + stem + "q1_proj.lora_magnitude_vector"
    assert file_key(magnitude + ".default.weight") == magnitude


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        adapted = add_adapter(build(), AdapterSettings()).train()
        if checkpointing:
            model = adapted.get_base_model()
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        adapted(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({key: p.grad for key, p in trained_parameters(adapted).items()})
    assert all(torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items())


def test_quantised_weights_are_not_merged():
    adapted = add_adapter(build(), AdapterSettings())
    layer = lora_layers(adapted, "default")["model.layers.0.self_attn.q1_proj"].get_base_layer()
    layer.weight = torch.nn.Parameter(torch.zeros(10, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="q1_proj is quantised: load the adapter with load_with_base"):
        merged_tensors(adapted)


def test_a_config_of_peft_is_taken_as_it_is():
    adapted = add_adapter(build(), LoraConfig(r=2, target_modules=["k2_proj"]))
    assert count_adapter_parameters(adapted).keys() == {"lora negative", "trainable", "total"}


def test_a_warm_up_of_lambda_goes_on_in_the_adapter_and_the_base_stays():
    model = build(lambda_warmup_steps=4)
    plain = logits(model)
    adapted = trained(model, AdapterSettings(rank=2), "one")
    for module in warming_up(adapted):
        module.advance()
        module.advance()
    name = "model.layers.1.self_attn.lambda_full.warmup_step"
    assert base_tensors(adapted)[name] == 0 and merged_tensors(adapted, "one")[name] == 2
    assert saved_tensors(adapted, "one")[f"base_model.model.{name}"] == 2
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    alone = build(lambda_warmup_steps=4)
    alone.load_state_dict(merged_tensors(adapted, "one"))
    torch.testing.assert_close(logits(alone), logits(adapted), rtol=0, atol=1e-5)

    trained(adapted, AdapterSettings(rank=2), "two")
    for module in warming_up(adapted):
        module.advance()
    steps = [merged_tensors(adapted, each)[name].item() for each in ("one", "two")]
    assert steps == [2, 1], "an adapter that is not trained stands still"
    with pytest.raises(ValueError, match="lambda of adapter 'one' is at step 2 of the 4 of its warm-up"):
        combine_adapters(adapted, {"one": 0.5, "two": 0.5}, "both")
    assert "both" not in adapted.peft_config
    for each in ("one", "two"):
        activate_adapter(adapted, each, trainable=True)
        for module in warming_up(adapted):
            for _ in range(3):
                module.advance()
    combine_adapters(adapted, {"one": 0.5, "two": 0.5}, "both")
    assert merged_tensors(adapted, "both")[name] == 4


def test_an_adapter_that_leaves_lambda_alone_does_not_go_on_a_base_in_its_warm_up():
    settings = AdapterSettings(train_lambda=False)
    model = build(lambda_warmup_steps=4)
    with pytest.raises(ValueError, match=r"lambda of the base is at step 0 of the 4 .*: train_lambda=true, or end it"):
        add_adapter(model, settings)
    for module in warming_up(model):
        module.get_buffer("warmup_step").fill_(4)
    adapted = add_adapter(model, settings)
    assert not [key for key in saved_tensors(adapted) if key.endswith("warmup_step")]
