import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.training.optim import (
    build_optimizer,
    build_parameter_groups,
    build_schedule,
    lr_factor,
    reset_hyperparameters,
)


def tiny(attention, **changes):
    return DiffTransformerForCausalLM(
        DiffTransformerConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention=attention,
            **changes,
        )
    )


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_groups_hold_every_parameter_once_and_the_right_ones(attention):
    model = tiny(attention, attention_bias=True, tie_word_embeddings=True)
    groups = {g["name"]: g for g in build_parameter_groups(model, lr=0.1, weight_decay=0.2, lambda_lr=0.3)}
    names = {id(p): name for name, p in model.named_parameters()}
    found = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    assert set.union(*found.values()) == set(names.values())
    assert found.get("lambda", set()) == {n for n in names.values() if "lambda_full" in n}
    assert bool(found.get("lambda")) == (attention != "softmax")
    assert all(n.endswith("proj.weight") or "embed" in n for n in found["decay"])
    assert all("norm" in n or "subln" in n or n.endswith("bias") for n in found["no_decay"])
    assert [groups["decay"]["weight_decay"], groups["no_decay"]["weight_decay"]] == [0.2, 0.0]
    if attention != "softmax":
        assert (groups["lambda"]["weight_decay"], groups["lambda"]["lr"]) == (0.0, 0.3)


def test_lambda_learns_at_the_common_rate_unless_told_otherwise():
    groups = build_parameter_groups(tiny("diff_v1"), lr=0.1, weight_decay=0.0)
    assert {g["lr"] for g in groups} == {0.1}


def test_frozen_parameters_are_left_out_and_all_frozen_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = build_parameter_groups(model, lr=0.1, weight_decay=0.0)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model[1].parameters()}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_parameter_groups(model, lr=0.1, weight_decay=0.0)


def test_the_optimiser_is_torchs_adamw_and_fused_on_the_cpu():
    model, twin = nn.Linear(4, 4), nn.Linear(4, 4)
    twin.load_state_dict(model.state_dict())
    groups = build_parameter_groups(model, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(groups, betas=(0.8, 0.9), eps=1e-6)
    assert optimizer.defaults["fused"]
    assert not build_optimizer(groups, betas=(0.8, 0.9), eps=1e-6, fused=False).defaults["fused"]
    plain = torch.optim.AdamW(
        [{"params": [twin.weight], "weight_decay": 0.5}, {"params": [twin.bias], "weight_decay": 0.0}],
        lr=0.1, betas=(0.8, 0.9), eps=1e-6,
    )  # fmt: skip
    for _ in range(4):
        x = torch.randn(3, 4)
        for m, o in ((model, optimizer), (twin, plain)):
            m(x).square().sum().backward()
            o.step()
            o.zero_grad()
    torch.testing.assert_close(model.weight, twin.weight)
    torch.testing.assert_close(model.bias, twin.bias)


def run_schedule(steps, **settings):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=2.0)
    scheduler = build_schedule(optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_linear_is_the_formula():
    rates = run_schedule(30, warmup_steps=5, total_steps=25, schedule="linear", min_lr_ratio=0.1)
    warmup = [2 * (s + 1) / 5 for s in range(5)]
    decay = [2 * (1 - 0.9 * (s - 5) / 20) for s in range(5, 25)]
    assert rates == pytest.approx([*warmup, *decay, *[0.2] * 5])


def test_cosine_after_the_warm_up_is_that_of_transformers():
    rates = run_schedule(25, warmup_steps=5, total_steps=25, schedule="cosine", min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=2.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 5, 25, min_lr_rate=0.1)
    expected = []
    for _ in range(25):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates[5:] == pytest.approx(expected[5:])
    # Theirs wastes the first step on a rate of 0.
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_cosine_without_warm_up_is_that_of_torch():
    rates = run_schedule(20, warmup_steps=0, total_steps=20, schedule="cosine", min_lr_ratio=0.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_constant_stays_after_the_warm_up_and_needs_no_end():
    rates = run_schedule(4, warmup_steps=2, total_steps=math.inf, schedule="constant")
    assert rates == [1.0, 2.0, 2.0, 2.0]


def test_no_step_of_the_training_has_a_rate_of_zero():
    for schedule in ("linear", "cosine"):
        for warmup in (0, 1, 7):
            settings = {"warmup_steps": warmup, "total_steps": 7, "schedule": schedule, "min_lr_ratio": 0.0}
            assert all(0 < lr_factor(step, **settings) <= 1 for step in range(7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear", "total_steps": math.inf}, "set trainer.max_steps, or use constant"),
        ({"schedule": "cosine", "total_steps": -1}, "set trainer.max_steps, or use constant"),
        ({"schedule": "step", "total_steps": 5}, "linear, cosine or constant, got 'step'"),
        (
            {"schedule": "cosine", "total_steps": 5, "warmup_steps": 6},
            r"warmup_steps \(6\) exceeds the 5 steps",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        run_schedule(1, **{"warmup_steps": 0, **settings})


def resumed(lr, weight_decay=0.1, lambda_lr=None):
    """An optimiser and scheduler with the state of a run of 4 steps at lr 0.1, then told the given settings."""
    pair = []
    for rate, decay, special in ((0.1, 0.1, None), (lr, weight_decay, lambda_lr)):
        model = tiny("diff_v1")
        groups = build_parameter_groups(model, lr=rate, weight_decay=decay, lambda_lr=special)
        optimizer = build_optimizer(groups, betas=(0.9, 0.95), eps=1e-8)
        asked = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        pair.append((optimizer, build_schedule(optimizer, warmup_steps=3, total_steps=10, schedule="linear")))
    (old, old_schedule), (new, new_schedule) = pair
    for _ in range(4):
        old.step()
        old_schedule.step()
    new.load_state_dict(old.state_dict())
    new_schedule.load_state_dict(old_schedule.state_dict())
    return old, new, reset_hyperparameters(new_schedule, asked)


def test_the_same_settings_resume_bitwise():
    old, new, changes = resumed(lr=0.1)
    assert changes == []
    for a, b in zip(old.param_groups, new.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


def test_other_settings_take_effect_on_resume_and_are_named():
    old, new, changes = resumed(lr=0.05, weight_decay=0.3, lambda_lr=0.2)
    rates = {g["name"]: g["lr"] / old.param_groups[0]["lr"] for g in new.param_groups}
    assert rates == pytest.approx({"decay": 0.5, "no_decay": 0.5, "lambda": 2.0})
    assert new.param_groups[0]["weight_decay"] == 0.3
    assert "decay.lr 0.1 -> 0.05" in changes and "decay.weight_decay 0.1 -> 0.3" in changes
    assert "lambda.lr 0.1 -> 0.2" in changes
