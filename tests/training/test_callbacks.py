import io
import re

import pytest
import torch
from lightning.pytorch import Callback
from rich.console import Console

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.training.callbacks import (
    LambdaMonitor,
    RichProgress,
    Throughput,
    attended_pairs,
    peak_memory_gib,
)
from difftune.training.flops import ModelFlops
from tests.clock import Clock
from tests.training.toy import ToyData, build_module, build_trainer


def record(module):
    """All that a module logs, as (step, name) -> value."""
    seen, original = {}, module.log_metrics

    def log_metrics(metrics, step):
        assert not {(step, name) for name in metrics} & set(seen), "a metric was logged twice"
        seen.update({(step, name): value for name, value in metrics.items()})
        original(metrics, step)

    module.log_metrics = log_metrics
    return seen


class Slow(Callback):
    """An evaluation that takes its time."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.clock.pass_(0.1)


def test_throughput_counts_the_training_and_not_the_evaluation(monkeypatch):
    clock = Clock(monkeypatch, "difftune.training.callbacks", "difftune.training.finetune", "tests.training.toy")
    module = build_module()
    seen = record(module)
    trainer = build_trainer([Throughput(), Slow(clock)], max_steps=10, accumulate_grad_batches=2)
    trainer.fit(module, ToyData(rows=4, delay=0.02))
    assert {step for step, name in seen if name == "perf/tokens_per_s"} == {1, 5, 10}
    step_time = seen[10, "perf/step_time_s"]
    # Two batches of 20 ms; the 200 ms of the evaluation are not in it, the waiting for data is.
    assert step_time == pytest.approx(0.04)
    assert seen[10, "perf/tokens_per_s"] == pytest.approx(2 * 4 * 12 / step_time)
    labels = seen[10, "perf/label_tokens_per_s"] * step_time * 5
    assert labels == pytest.approx(sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches(10, 20)))
    assert 0.05 < seen[10, "perf/peak_memory_gib"] < 64
    assert not [name for _, name in seen if name == "perf/mfu"]


def batches(first, last):
    data = ToyData(rows=4)
    data.trainer = type("T", (), {"distributed_sampler_kwargs": None})
    stream = iter(data.train_dataloader().dataset)
    return [next(stream) for _ in range(last)][first:]


def test_mfu_is_the_share_of_the_peak():
    module = build_module()
    seen = record(module)
    work = ModelFlops(10.0, 0.0, 100.0, 20.0, 0.0, 200.0)
    trainer = build_trainer([Throughput(work, peak_flops_per_s=1e6)], max_steps=5)
    trainer.fit(module, ToyData(rows=4))
    flops_of_a_step = 3 * (10 * 48 + 100 * 4 * 12**2 / 2)
    assert seen[5, "perf/mfu"] == pytest.approx(flops_of_a_step / seen[5, "perf/step_time_s"] / 1e6)


def test_attended_pairs_follow_the_documents():
    ids = torch.zeros(2, 6, dtype=torch.int64)
    assert attended_pairs({"input_ids": ids}) == 36
    packed = {"input_ids": ids, "cu_seqlens": torch.tensor([0, 2, 6, 12], dtype=torch.int32)}
    assert float(attended_pairs(packed)) == (4 + 16 + 36) / 2
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert float(attended_pairs({"input_ids": ids, "attention_mask": mask})) == (9 + 36) / 2


def test_peak_memory_is_in_gib():
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 64


def tiny(attention):
    return DiffTransformerForCausalLM(
        DiffTransformerConfig(
            vocab_size=29,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention=attention,
        )
    )


@pytest.mark.parametrize(("every", "steps"), [(5, {1, 5, 7}), (1, {1, 2, 3, 4, 5, 6, 7})])
def test_lambda_of_every_layer_is_what_the_forward_used(every, steps):
    module = build_module()
    expected = {}

    class Before(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            for i, layer in enumerate(pl_module.model.layers):
                expected[trainer.global_step + 1, f"lambda/layer_{i:02d}"] = layer.lambda_full().item()

    seen = record(module)
    trainer = build_trainer(
        [Before(), LambdaMonitor()], max_steps=7, accumulate_grad_batches=2, log_every_n_steps=every
    )
    trainer.fit(module, ToyData())
    heard = {key: value for key, value in seen.items() if key[1].startswith("lambda")}
    assert {step for step, _ in heard} == steps and len(heard) == 2 * len(steps)
    assert heard == {key: pytest.approx(expected[key]) for key in heard}
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_lambda_of_the_real_model(attention):
    module = build_module(model=tiny(attention))
    seen = record(module)
    build_trainer([LambdaMonitor()], max_steps=1).fit(module, ToyData())
    names = {name for _, name in seen if name.startswith("lambda")}
    values = {"lambda/layer_00", "lambda/layer_01"}
    spread = {f"{name}_std" for name in values}
    assert names == {"diff_v1": values, "diff_v2": values | spread, "softmax": set()}[attention]
    if attention == "diff_v1":
        assert seen[1, "lambda/layer_00"] == pytest.approx(0.2, abs=0.05)


def progress(terminal, **settings):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120)
    module = build_module()
    watched = [Throughput(), RichProgress("answers", console=console)]
    build_trainer(watched, **{"max_steps": 10, **settings}).fit(module, ToyData(batches=12))
    return output.getvalue()


def test_a_terminal_gets_a_bar_with_loss_rate_speed_and_time_left():
    text = progress(True)
    for part in ("answers", "10/10", "loss ", "lr ", "tokens/s", "eta 0:00:00"):
        assert part in text


def test_a_log_file_gets_a_line_a_log_step():
    lines = progress(False).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["answers 1/10", "answers 5/10", "answers 10/10"]
    assert all("loss" in line and "tokens/s" in line and "eta" in line for line in lines)


def test_without_an_end_there_is_no_time_left():
    lines = progress(False, max_steps=-1, max_epochs=1).splitlines()
    assert lines[0].startswith("answers 1  loss") and "eta" not in lines[0]


def test_disabled_it_shows_nothing():
    output = io.StringIO()
    bar = RichProgress(console=Console(file=output, force_terminal=True))
    trainer = build_trainer([bar], max_steps=2)
    bar.disable()
    trainer.fit(build_module(), ToyData())
    assert output.getvalue() == ""


class HourBefore(Callback):
    """Evaluates for an hour before the first step, by a clock that the test moves."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_start(self, trainer, module):
        self.clock.now += 3600

    def on_train_batch_end(self, *unused):
        self.clock.now += 2


def test_an_evaluation_before_training_is_not_in_the_time_that_is_left(monkeypatch):
    clock, output = Clock(monkeypatch, "difftune.training.callbacks"), io.StringIO()
    bar = RichProgress("answers", console=Console(file=output, force_terminal=False, width=120))
    build_trainer([HourBefore(clock), bar], max_steps=10).fit(build_module(), ToyData(batches=12))
    assert re.findall(r"eta (\S+)", output.getvalue()) == ["0:00:18", "0:00:10", "0:00:00"]


def test_what_is_done_between_steps_is_said_twice_a_minute_and_not_at_once(monkeypatch):
    clock, output = Clock(monkeypatch, "difftune.training.callbacks"), io.StringIO()
    bar = RichProgress("answers", console=Console(file=output, force_terminal=False, width=120))
    for done in range(12):
        bar.note(f"evaluating sums, {done} of 12")
        clock.now += 10
    assert output.getvalue().splitlines() == [f"answers: evaluating sums, {done} of 12" for done in (3, 6, 9)]
    bar.disable()
    clock.now += 100
    bar.note("evaluating")
    assert len(output.getvalue().splitlines()) == 3
