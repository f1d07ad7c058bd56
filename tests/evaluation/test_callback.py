import json
import logging
import random
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from difftune.data.problems import load_problems
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.callback import ScheduledEvaluation
from difftune.evaluation.math import MathTask
from difftune.training.preemption import Preemption
from tests.clock import Clock
from tests.evaluation.scripted import tiny_model
from tests.ranks import run_ranks

TOKENIZER = build_tokenizer("digits")


class Training(LightningModule):
    """Trains a model on random tokens, which it draws from the global random state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tokens_seen = 0
        self.logged: list[tuple[int, dict[str, float]]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.tokens_seen += 24
        tokens = torch.randint(6, 102, (2, 12))
        logits = nn.functional.dropout(self.model(input_ids=tokens, use_cache=False).logits, 0.1, self.model.training)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["tokens_seen"]


@dataclass
class FakeSample:
    index: int


@dataclass
class FakeResult:
    complete: bool
    samples: list[FakeSample]

    def metrics(self) -> dict[str, float]:
        return {"accuracy": 0.5}


class FakeTask:
    """Records when it is run; `act` may do something in the middle of it."""

    kind = "fake"

    def __init__(
        self, name: str = "fake", complete: bool = True, act: Callable[[], None] = lambda: None, size: int = 1
    ) -> None:
        self.name, self.complete, self.act, self.size = name, complete, act, size
        self.num_items = size
        self.deadlines: list[float | None] = []
        self.closed = False

    def run(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        part: tuple[int, int],
        should_stop: Callable[[], bool] | None,
        deadline: float | None,
        on_block: Callable[[list[FakeSample]], None] | None = None,
    ) -> list[FakeSample]:
        self.deadlines.append(deadline)
        self.act()
        samples = [FakeSample(index) for index in range(part[0], self.size, part[1])]
        if on_block is not None:
            on_block(samples)
        return samples

    def summarise(self, samples: Iterable[FakeSample]) -> FakeResult:
        return FakeResult(self.complete, sorted(samples, key=lambda sample: sample.index))

    def close(self) -> None:
        self.closed = True


def fit(
    evaluation: ScheduledEvaluation | None,
    tmp_path: Path,
    module: Training | None = None,
    *,
    ckpt_path: str | None = None,
    callbacks: Iterable[Callback] = (),
    batches: int = 1000,
    **settings: Any,
) -> Training:
    torch.manual_seed(0)
    module = module or Training(tiny_model(initializer_range=0.1))
    trainer = Trainer(
        **{"max_steps": 8, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **settings},
        callbacks=[*([evaluation] if evaluation else []), *callbacks],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.arange(batches)), ckpt_path=ckpt_path)
    return module


def steps(module: Training) -> list[int]:
    return [step for step, _ in module.logged]


@pytest.mark.parametrize(
    ("schedule", "trainer", "expected"),
    [
        ({}, {}, [0, 8]),
        ({"before": False}, {}, [8]),
        ({"at_end": False}, {}, [0]),
        ({"every_n_steps": 3}, {}, [0, 3, 6, 8]),
        ({"every_n_steps": 4}, {}, [0, 4, 8]),
        ({"every_n_steps": 4, "at_end": False, "before": False}, {}, [4, 8]),
        ({"every_fraction": 0.25}, {}, [0, 2, 4, 6, 8]),
        ({"every_fraction": 0.3, "at_end": False}, {}, [0, 2, 5, 7]),
        ({"every_fraction": 0.5}, {"max_steps": -1, "max_epochs": 2, "batches": 3}, [0, 3, 6]),
        ({"every_n_tokens": 50}, {}, [0, 3, 5, 7, 8]),
        ({"every_n_tokens": 24, "every_n_steps": 2}, {"max_steps": 3}, [0, 1, 2, 3]),
        # Only optimiser steps count, not micro-batches.
        ({"every_n_steps": 1}, {"max_steps": 3, "accumulate_grad_batches": 4}, [0, 1, 2, 3]),
        ({"every_n_tokens": 50}, {"max_steps": 3, "accumulate_grad_batches": 4}, [0, 1, 2, 3]),
        # The data end before max_steps.
        ({}, {"max_epochs": 1, "batches": 5}, [0, 5]),
    ],
)
def test_evaluations_are_at_the_steps_that_were_asked_for(
    schedule: dict[str, Any], trainer: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    task = FakeTask()
    module = fit(ScheduledEvaluation([task], TOKENIZER, **schedule), tmp_path, **trainer)
    assert steps(module) == expected and len(task.deadlines) == len(expected)
    assert task.closed


def test_a_share_is_of_the_steps_that_the_training_module_counted(tmp_path: Path) -> None:
    """It knows how many ranks share the data."""
    module = Training(tiny_model(initializer_range=0.1))
    module.total_steps = 6
    evaluation = ScheduledEvaluation([FakeTask()], TOKENIZER, every_fraction=0.5, at_end=False)
    assert steps(fit(evaluation, tmp_path, module)) == [0, 3, 6]


def test_results_go_everywhere(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float], float]] = []

    def on_result(trainer: Trainer, metrics: dict[str, float]) -> None:
        seen.append((trainer.global_step, metrics, float(trainer.callback_metrics["eval/sums/accuracy"])))

    problems = load_problems("synthetic:arithmetic", limit=6)
    task = MathTask("sums", problems, max_new_tokens=6, batch_size=4)
    evaluation = ScheduledEvaluation(
        [task, FakeTask("other")],
        TOKENIZER,
        samples_dir=tmp_path / "samples",
        stage="answers",
        every_n_steps=5,
        on_result=on_result,
    )
    module = fit(evaluation, tmp_path)
    assert steps(module) == [0, 5, 8]
    for step, metrics in module.logged:
        assert metrics["eval/sums/n"] == 6 and 0 <= metrics["eval/sums/accuracy_low"] <= metrics["eval/sums/accuracy"]
        assert metrics["eval/other/accuracy"] == 0.5 and metrics["eval/sums/seconds"] > 0
        lines = (tmp_path / "samples" / f"answers-{step}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["task"] for row in rows] == ["sums"] * 6 + ["other"]
        assert {(row["step"], row["stage"]) for row in rows} == {(step, "answers")}
        assert [row["gold"] for row in rows[:6]] == [problem.answer for problem in problems]
    assert [(step, metrics) for step, metrics, _ in seen] == module.logged
    assert all(metrics["eval/sums/accuracy"] == pytest.approx(latest) for _, metrics, latest in seen)
    assert list(evaluation.results) == [0, 5, 8] and set(evaluation.results[8]) == {"sums", "other"}


def test_training_does_not_notice(tmp_path: Path) -> None:
    def train(*, evaluated: bool) -> tuple[list[torch.Tensor], Any]:
        random.seed(1)
        np.random.seed(1)
        task = MathTask("sums", load_problems("synthetic:arithmetic", limit=5), max_new_tokens=6, temperature=1.0)
        evaluation = ScheduledEvaluation([task], TOKENIZER, every_n_steps=1) if evaluated else None
        model = tiny_model(initializer_range=0.1, use_cache=False).train()
        model.model.layers[1].eval()
        module = fit(evaluation, tmp_path, Training(model), accumulate_grad_batches=2, max_steps=4)
        assert module.model.training and not module.model.model.layers[1].training
        assert module.model.config.use_cache is False
        return list(module.parameters()), (torch.rand(1), random.random(), np.random.rand())

    plain, state = train(evaluated=False)
    watched, watched_state = train(evaluated=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert state == watched_state


def test_an_evaluation_that_is_cut_is_logged_but_decides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[dict[str, float]] = []

    def on_result(trainer: Trainer, metrics: dict[str, float]) -> None:
        assert "eval/cut/accuracy" not in trainer.callback_metrics
        seen.append(metrics)

    tasks = [FakeTask("cut", complete=False), FakeTask("whole")]
    evaluation = ScheduledEvaluation(tasks, TOKENIZER, time_limit_s=60, on_result=on_result)
    with caplog.at_level(logging.WARNING):
        module = fit(evaluation, tmp_path, max_steps=1)
    assert all({"eval/cut/accuracy", "eval/whole/accuracy"} <= set(metrics) for _, metrics in module.logged)
    assert [{name.split("/")[1] for name in metrics} for metrics in seen] == [{"whole"}, {"whole"}]
    assert "evaluation of cut at step 1 is not complete after 60 s" in caplog.text


def test_the_time_limit_is_shared_among_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, "difftune.evaluation.callback")
    tasks = [FakeTask("a"), FakeTask("b", act=lambda: clock.pass_(0.2)), FakeTask("c")]
    fit(ScheduledEvaluation(tasks, TOKENIZER, time_limit_s=60, before=False), tmp_path, max_steps=1)
    # Of the 60 seconds a third, then half, then what b left of them.
    assert [task.deadlines for task in tasks] == [[1020], [1030], [1060]]


def test_a_real_time_limit_ends_an_evaluation(tmp_path: Path) -> None:
    problems = load_problems("synthetic:arithmetic", limit=4)
    task = MathTask("sums", problems, max_new_tokens=30_000, batch_size=1)
    module = Training(tiny_model(max_position_embeddings=100_000))
    with torch.no_grad():
        module.model.lm_head.weight[TOKENIZER.eos_token_id] = 0
    # Without an end the texts would take many minutes, and there would be four of them.
    fit(ScheduledEvaluation([task], TOKENIZER, time_limit_s=0.3, at_end=False), tmp_path, module, max_steps=1)
    assert module.logged[0][1]["eval/sums/n"] < 4


def test_a_stopped_evaluation_is_dropped_and_made_up_for_after_resuming(tmp_path: Path) -> None:
    stop = False

    class StopAtFour(FakeTask):
        def run(self, *args: Any, **settings: Any) -> list[FakeSample]:
            nonlocal stop
            stop = module.tokens_seen == 4 * 24
            return super().run(*args, **settings)

    class Preempted(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = stop

    def evaluation() -> ScheduledEvaluation:
        return ScheduledEvaluation(
            [StopAtFour()], TOKENIZER, every_n_steps=2, should_stop=lambda: stop, samples_dir=tmp_path / "samples"
        )

    module = Training(tiny_model())
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="four")
    fit(evaluation(), tmp_path, module, callbacks=[Preempted(), saving], enable_checkpointing=True)
    assert steps(module) == [0, 2], "neither at step 4 nor at the end"
    assert not (tmp_path / "samples" / "main-4.jsonl").exists()

    stop = False
    module = Training(tiny_model())
    module.tokens_seen = -1000  # loaded from the checkpoint

    class Resumed(FakeTask):
        pass

    resumed = ScheduledEvaluation([Resumed()], TOKENIZER, every_n_steps=2)
    fit(resumed, tmp_path, module, ckpt_path=str(tmp_path / "four.ckpt"))
    assert steps(module) == [4, 6, 8], "made up for at 4, and no evaluation of step 0 again"


def test_an_evaluation_stopped_before_the_first_step_is_made_up_for_at_step_0(tmp_path: Path) -> None:
    stopped = Training(tiny_model())
    preemption = Preemption()

    class StopNow(FakeTask):
        def run(self, *args: Any, **settings: Any) -> list[FakeSample]:
            preemption.signum = signal.SIGTERM
            return super().run(*args, **settings)

    evaluation = ScheduledEvaluation([StopNow()], TOKENIZER, should_stop=preemption.is_preempted)
    fit(evaluation, tmp_path, stopped, callbacks=[preemption])
    assert (steps(stopped), stopped.trainer.global_step) == ([], 0), "no step before the evaluation of step 0"


def test_an_evaluation_stopped_after_the_last_step_is_made_up_for(tmp_path: Path) -> None:
    stop = False

    class StopAtTheEnd(FakeTask):
        def run(self, *args: Any, **settings: Any) -> list[FakeSample]:
            nonlocal stop
            stop = True
            return super().run(*args, **settings)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="last")
    stopping = ScheduledEvaluation([StopAtTheEnd()], TOKENIZER, before=False, should_stop=lambda: stop)
    first = fit(stopping, tmp_path, callbacks=[saving], enable_checkpointing=True, max_steps=4)
    resumed = fit(
        ScheduledEvaluation([FakeTask()], TOKENIZER), tmp_path, max_steps=4, ckpt_path=str(tmp_path / "last.ckpt")
    )
    assert (steps(first), steps(resumed)) == ([], [4])


def test_a_resumed_run_goes_on_with_its_schedule(tmp_path: Path) -> None:
    schedule: dict[str, Any] = {"every_n_tokens": 60}
    straight = fit(ScheduledEvaluation([FakeTask()], TOKENIZER, **schedule), tmp_path)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="four")
    first = fit(
        ScheduledEvaluation([FakeTask()], TOKENIZER, **schedule, at_end=False),
        tmp_path,
        callbacks=[saving],
        enable_checkpointing=True,
        max_steps=4,
    )
    second = fit(
        ScheduledEvaluation([FakeTask()], TOKENIZER, **schedule), tmp_path, ckpt_path=str(tmp_path / "four.ckpt")
    )
    assert steps(first) + steps(second) == steps(straight)


def test_ranks_share_the_work_and_agree_on_stopping(tmp_path: Path) -> None:
    """Two processes: at step 4 one of them is told to stop while it evaluates; neither may wait for ever."""
    run_ranks("tests.evaluation.callback_ranks", str(tmp_path))
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert reports == [{"steps": [0, 2], "stopped": True, "results": [0, 2]}] * 2
    lines = (tmp_path / "samples" / "main-2.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3, 4]
    assert not (tmp_path / "samples" / "main-4.jsonl").exists()


def test_samples_that_cannot_be_written_do_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "samples").write_text("a file where the folder should be")
    evaluation = ScheduledEvaluation([FakeTask()], TOKENIZER, samples_dir=tmp_path / "samples")
    module = fit(evaluation, tmp_path, max_steps=2)
    assert steps(module) == [0, 2]
    assert "NOT written" in caplog.text


def test_the_precision_of_training_is_that_of_evaluation(tmp_path: Path) -> None:
    seen = []

    class Probe(FakeTask):
        def run(self, model: nn.Module, *args: Any, **settings: Any) -> list[FakeSample]:
            seen.append(model(input_ids=torch.tensor([[7]])).logits.dtype)
            return super().run(model, *args, **settings)

    fit(ScheduledEvaluation([Probe()], TOKENIZER), tmp_path, max_steps=1, precision="bf16-mixed")
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": [FakeTask("a"), FakeTask("a")]}, r"different names, got \['a', 'a'\]"),
        ({"every_n_steps": 0}, "every_n_steps must be above 0"),
        ({"every_n_tokens": -1}, "every_n_tokens must be above 0"),
        ({"every_fraction": 0.0}, "every_fraction must be above 0"),
        ({"every_fraction": 1.5}, "every_fraction must be at most 1"),
        ({"time_limit_s": 0}, "time_limit_s must be above 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduledEvaluation(**{"tasks": [FakeTask()], "tokenizer": TOKENIZER, **settings})


def test_a_share_of_an_endless_training_is_refused(tmp_path: Path) -> None:
    evaluation = ScheduledEvaluation([FakeTask()], TOKENIZER, every_fraction=0.1)
    with pytest.raises(ValueError, match=r"needs a known number of steps: set trainer\.max_steps"):
        fit(evaluation, tmp_path, max_steps=-1, max_time="00:00:00:30", max_epochs=-1)
