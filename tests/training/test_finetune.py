import itertools
import json

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.training.loggers import MetricsLogger
from tests.training.toy import Recorder, ToyData, ToyModel, build_module, build_trainer, parameters, row

# AdamW with a large eps is linear in the gradient: its step is lr * gradient / eps, as that of SGD.
LINEAR = {"eps": 1e6, "lr": 1e6, "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0}


def train(rows, accumulate, steps=1, batches=None, double=False, trainer_settings=(), **settings):
    module = build_module(double=double, **settings)
    before = parameters(module.model)
    recorder = Recorder()
    trainer = build_trainer(
        [recorder],
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        **{"gradient_clip_val": None, **dict(trainer_settings)},
    )
    trainer.fit(module, ToyData(rows=rows, batches=batches))
    return parameters(module.model) - before, module, recorder


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def by_hand(rows, **settings):
    """The update of one step over ``rows`` rows at once, in plain torch: mean loss, torch's AdamW."""
    module = build_module(**settings)
    ids, labels = map(torch.stack, zip(*(row(i) for i in rows), strict=True))
    before = parameters(module.model)
    optimizer = torch.optim.AdamW(
        module.model.parameters(), lr=settings["lr"], eps=settings["eps"], betas=(0.9, 0.95), weight_decay=0.0
    )
    output = module.model(ids, labels)
    (output.loss_sum / output.num_label_tokens).backward()
    optimizer.step()
    return parameters(module.model) - before


@pytest.mark.parametrize(("rows", "accumulate"), [(8, 1), (2, 4), (1, 8), (4, 2)])
def test_accumulation_equals_one_big_batch_with_unequal_label_counts(rows, accumulate):
    update, module, _ = train(rows, accumulate, **LINEAR)
    assert relative(update, by_hand(range(8), **LINEAR)) < 1e-6
    assert module.tokens_seen == 8 * 12


def test_accumulation_equals_one_big_batch_through_adamw_over_many_steps():
    settings = {"double": True, "weight_decay": 0.1, "trainer_settings": {"gradient_clip_val": 0.5}}
    big, _, _ = train(8, 1, steps=10, **settings)
    small, _, _ = train(2, 4, steps=10, **settings)
    assert relative(small, big) < 1e-6


def test_the_mean_of_means_is_told_apart():
    # The error that the normalisation is for must be larger than what the tests above allow.
    module = build_module(**LINEAR)
    total = 0.0
    for first in range(0, 8, 2):
        ids, labels = map(torch.stack, zip(*(row(i) for i in (first, first + 1)), strict=True))
        output = module.model(ids, labels)
        total = total + output.loss_sum / output.num_label_tokens / 4
    total.backward()
    wrong = -torch.cat([p.grad.flatten() for p in module.model.parameters()])
    assert relative(wrong, by_hand(range(8), **LINEAR)) > 1e-2


def test_a_partial_last_window_is_normalised_by_its_own_labels():
    # 7 micro-batches in windows of 4: the second step sees 3 only.
    partial, _, recorder = train(1, 4, steps=-1, batches=7, **LINEAR)
    assert [step for step, _ in recorder.steps if step] == [1, 2]
    first, _, _ = train(4, 1, steps=1, **LINEAR)
    module = build_module(**LINEAR)
    torch.nn.utils.vector_to_parameters(parameters(module.model) + first, module.model.parameters())
    ids, labels = map(torch.stack, zip(*(row(i) for i in (4, 5, 6)), strict=True))
    output = module.model(ids, labels)
    (output.loss_sum / output.num_label_tokens).backward()
    gradient = torch.cat([p.grad.flatten() for p in module.model.parameters()])
    # With this eps AdamW moves by lr * (bias-corrected first moment) / eps.
    mean = (0.9 * 0.1 * -first + 0.1 * gradient) / (1 - 0.9**2)
    assert relative(partial - first, -mean) < 1e-5


def test_accumulation_by_three_is_exact_too():
    update, _, _ = train(2, 3, **LINEAR)
    assert relative(update, by_hand(range(6), **LINEAR)) < 1e-6


@pytest.mark.parametrize("clip", [None, 1e-3, 1e6])
def test_clipping_equals_torch_and_the_norm_before_it_is_logged(clip):
    module = build_module()
    seen = {}
    original = module.configure_gradient_clipping

    def spy(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        original(optimizer, gradient_clip_val, gradient_clip_algorithm)
        seen["gradients"] = torch.cat([p.grad.flatten() for p in module.model.parameters()])

    module.configure_gradient_clipping = spy
    trainer = build_trainer(max_steps=1, gradient_clip_val=clip, logger=[])
    trainer.fit(module, ToyData(rows=8))

    reference = build_module().model
    ids, labels = map(torch.stack, zip(*(row(i) for i in range(8)), strict=True))
    output = reference(ids, labels)
    (output.loss_sum / output.num_label_tokens).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or float("inf"))
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert relative(seen["gradients"], expected) < 1e-6
    assert module.logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    assert module.logged["train/loss"] == pytest.approx((output.loss_sum / output.num_label_tokens).item())
    assert module.logged["train/label_tokens"] == int(output.num_label_tokens)


def poison(module, steps, value=float("nan")):
    """Make the loss of some micro-batches not finite."""
    original, count = module.model.forward, iter(range(10_000))

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        if next(count) in steps:
            output.loss_sum = output.loss_sum * value
        return output

    module.model.forward = forward


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fused", [True, False])
def test_a_nonfinite_step_is_skipped_counted_and_reported(value, fused, caplog, monkeypatch):
    if not fused:
        monkeypatch.setattr("difftune.training.optim._FUSED_DEVICES", set())
    module, recorder = build_module(), Recorder()
    poison(module, {2, 5})
    trainer = build_trainer([recorder], max_steps=7)
    trainer.fit(module, ToyData())
    assert bool(trainer.optimizers[0].defaults["fused"]) == fused
    vectors = [vector for _, vector in recorder.steps]
    unchanged = [bool(torch.equal(a, b)) for a, b in itertools.pairwise(vectors)]
    assert unchanged == [False, True, False, False, True, False]
    assert vectors[-1].isfinite().all()
    state = next(iter(trainer.optimizers[0].state.values()))
    assert int(state["step"]) == 5
    assert module.skipped_steps == 2
    assert "by optimiser step 3, 1 were skipped" in caplog.text


def test_a_step_without_labels_is_skipped():
    module, recorder = build_module(), Recorder()
    build_trainer([recorder], max_steps=3).fit(module, ToyData(spoil={1}))
    vectors = [vector for _, vector in recorder.steps]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[1], vectors[2])
    assert module.skipped_steps == 1


def test_nonfinite_steps_in_a_row_stop_the_run():
    module = build_module(max_nonfinite_steps=3)
    poison(module, {1, 3, 4, 6, 7, 8})
    trainer = build_trainer(max_steps=20)
    with pytest.raises(RuntimeError, match=r"max_nonfinite_steps=3.*by optimiser step 9, 6 were skipped, 3 of"):
        trainer.fit(module, ToyData())


def float16():
    """float16 autocast with a gradient scaler; asked for by name, Lightning turns it into bfloat16 on the CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu")]}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed"])
def test_every_precision_learns(precision, monkeypatch):
    module = build_module(lr=3e-2, schedule="constant")
    asked = float16() if precision == "16-mixed" else {"precision": precision}
    trainer = build_trainer(max_steps=60, **asked)
    assert trainer.precision == precision
    losses = []
    monkeypatch.setattr(module, "log_metrics", lambda metrics, step: losses.append(metrics["train/loss"]))
    trainer.fit(module, ToyData(rows=8))
    assert losses[-1] < losses[0] - 0.1
    assert module.skipped_steps == 0
    assert bool(trainer.optimizers[0].defaults["fused"]) == (precision != "16-mixed")
    lambdas = [p for name, p in module.model.named_parameters() if "lambda_full" in name]
    assert {p.dtype for p in lambdas} == {torch.float64 if precision == "64-true" else torch.float32}


def test_float16_starts_within_range():
    recorder = Recorder()
    build_trainer([recorder], max_steps=2, **float16()).fit(build_module(), ToyData(rows=64))
    assert not torch.equal(recorder.steps[0][1], parameters(build_module().model))


def test_an_overflow_under_float16_is_the_scalers_business():
    module, recorder = build_module(max_nonfinite_steps=2), Recorder()
    trainer = build_trainer([recorder], max_steps=8, **float16())
    trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trainer.fit(module, ToyData())
    assert trainer.precision_plugin.scaler.get_scale() < 2.0**24
    assert module.skipped_steps == 0
    assert torch.equal(recorder.steps[0][1], recorder.steps[1][1])
    assert not torch.equal(recorder.steps[-2][1], recorder.steps[-1][1])


def test_a_loss_that_is_not_finite_counts_under_float16_too():
    module = build_module(max_nonfinite_steps=2)
    poison(module, {3, 4})
    with pytest.raises(RuntimeError, match="2 were skipped, 2 of them in a row"):
        build_trainer(max_steps=8, **float16()).fit(module, ToyData())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_sixteen_bit_weights_for_all_are_refused_with_the_remedy(precision):
    with pytest.raises(ValueError, match=f"precision={precision}.*use\\s+bf16-mixed"):
        build_trainer(precision=precision).fit(build_module(), ToyData())


def test_clipping_by_value_is_refused():
    with pytest.raises(ValueError, match="gradient_clip_algorithm=value"):
        build_trainer(gradient_clip_algorithm="value").fit(build_module(), ToyData())


def test_max_nonfinite_steps_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        build_module(max_nonfinite_steps=0)


def test_a_model_in_eval_mode_is_trained_in_train_mode():
    module = build_module()
    module.model.eval()
    build_trainer(max_steps=1).fit(module, ToyData())
    assert module.model.training


def test_gradients_are_freed_after_the_step():
    module = build_module()
    build_trainer(max_steps=2).fit(module, ToyData())
    assert all(p.grad is None for p in module.model.parameters())


def test_metrics_are_logged_at_the_first_the_last_and_every_nth_step(tmp_path):
    logger = MetricsLogger(tmp_path / "metrics.jsonl", stage="answers")
    module = build_module()
    build_trainer(max_steps=12, logger=logger).fit(module, ToyData(rows=4))
    lines = [json.loads(line) for line in logger.path.read_text().splitlines()]
    assert [line["step"] for line in lines if line["name"] == "train/loss"] == [1, 5, 10, 12]
    assert [line["tokens"] for line in lines if line["name"] == "train/loss"] == [48, 240, 480, 576]
    assert {line["stage"] for line in lines} == {"answers"}
    rates = {line["step"]: line["value"] for line in lines if line["name"] == "train/lr"}
    assert rates[1] == pytest.approx(1e-2 / 3)


def test_the_real_model_trains_on_packed_and_padded_batches():
    config = DiffTransformerConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    ids = torch.randint(64, (2, 16))
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(8).repeat(2, 2)}
    packed["cu_seqlens"] = torch.tensor([0, 8, 16, 24, 32], dtype=torch.int32)
    padded = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    padded["attention_mask"][0, 9:], padded["labels"][0, 9:] = 0, -100
    for batch in (packed, padded):
        module = build_module(model=DiffTransformerForCausalLM(config), schedule="constant")
        trainer = build_trainer(max_steps=25, accumulate_grad_batches=1)
        trainer.fit(module, torch.utils.data.DataLoader([batch] * 40, batch_size=None))
        loss = module.model(**batch).loss
        assert loss < 3.0, loss
        assert module.logged["train/loss"] == pytest.approx(loss.item(), rel=0.3)


def test_the_schedule_runs_over_what_the_trainer_will_do():
    module = build_module(total_steps=None, warmup_steps=0, schedule="linear")
    trainer = build_trainer(max_steps=8)
    trainer.fit(module, ToyData())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    assert module.logged["train/lr"] == pytest.approx(1e-2 / 8)


def test_a_decay_over_endless_data_without_a_last_step_is_refused():
    module = build_module(total_steps=None, schedule="linear")
    with pytest.raises(ValueError, match=r"set trainer.max_steps, or use constant"):
        build_trainer(max_steps=-1, max_epochs=1).fit(module, ToyData())


def test_z_loss_reaches_the_model():
    seen = []

    class Listening(ToyModel):
        def forward(self, *args, z_loss=0.0, **kwargs):
            seen.append(z_loss)
            return super().forward(*args, **kwargs)

    build_trainer(max_steps=1).fit(build_module(model=Listening(), z_loss=1e-4), ToyData())
    assert set(seen) == {1e-4}
