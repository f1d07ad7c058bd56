import json

import pytest
import torch
from lightning.pytorch import Callback

from difftune.training import checkpoint_io
from difftune.training.callbacks import LambdaMonitor, RichProgress, Throughput
from difftune.training.checkpoint import Checkpointing
from difftune.training.checkpoint_io import AtomicCheckpointIO, find_resumable, list_checkpoints
from difftune.training.loggers import MetricsLogger
from tests.training.toy import Recorder, ToyData, build_module, build_trainer, parameters


def fit(folder=None, *, steps=20, ckpt_path=None, accumulate=2, callbacks=(), data=None, logger=False, **settings):
    """Train the toy; checkpoints, if a folder is given, every 4 steps and as ``settings`` say."""
    names = ("every_n_steps", "keep_last", "best_metric", "best_mode")
    saving = {"every_n_steps": 4, **{name: settings.pop(name) for name in names if name in settings}}
    recorder = Recorder()
    module = build_module(dropout=0.2, **settings)
    checkpointing = [Checkpointing(folder, **saving)] if folder else []
    trainer = build_trainer(
        [recorder, *callbacks, *checkpointing],
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=logger,
    )
    trainer.fit(module, data or ToyData(), ckpt_path=ckpt_path)
    return module, recorder, trainer


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_resumed_is_bitwise_the_straight_run(tmp_path):
    straight, fed, _ = fit()
    fit(tmp_path, steps=11)
    path = find_resumable(tmp_path)
    assert path.name == "step-00000011"
    resumed, fed_later, trainer = fit(tmp_path, ckpt_path=path)
    assert trainer.global_step == 20
    assert torch.equal(parameters(straight.model), parameters(resumed.model))
    straight_steps, resumed_steps = dict(fed.steps), dict(fed_later.steps)
    for step in range(12, 21):
        assert torch.equal(straight_steps[step], resumed_steps[step]), step
    assert len(fed_later.batches) == 18
    for (number, batch), (later_number, later) in zip(fed.batches[22:], fed_later.batches, strict=True):
        assert number == later_number and torch.equal(batch, later)
    assert (straight.tokens_seen, straight.skipped_steps) == (resumed.tokens_seen, resumed.skipped_steps)
    assert straight.logged["train/loss"] == resumed.logged["train/loss"]


def test_without_the_random_state_it_would_not_be(tmp_path, monkeypatch):
    # Shows that the test above can fail: dropout is on.
    straight, _, _ = fit()
    fit(tmp_path, steps=11)
    monkeypatch.setattr("difftune.training.checkpoint.restore_rng", lambda state: None)
    resumed, _, _ = fit(tmp_path, ckpt_path=find_resumable(tmp_path))
    assert not torch.equal(parameters(straight.model), parameters(resumed.model))


@pytest.mark.parametrize("batches", [8, 7])
def test_a_run_that_ended_with_its_data_has_nothing_left_to_do(batches, tmp_path):
    first, _, trainer = fit(tmp_path, steps=-1, data=ToyData(batches=batches), every_n_steps=None)
    assert trainer.global_step == 4
    again, recorder, trainer = fit(
        tmp_path, steps=-1, data=ToyData(batches=batches), ckpt_path=find_resumable(tmp_path)
    )
    assert trainer.global_step == 4 and recorder.batches == []
    assert torch.equal(parameters(first.model), parameters(again.model))
    assert names(tmp_path) == ["step-00000004"]


def test_checkpoints_are_regular_last_and_pruned(tmp_path):
    fit(tmp_path, steps=14, every_n_steps=4, keep_last=3)
    assert names(tmp_path) == ["step-00000008", "step-00000012", "step-00000014"]
    fit(tmp_path / "b", steps=3, every_n_steps=None)
    assert names(tmp_path / "b") == ["step-00000003"]


class StopAtBatch(Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            trainer.should_stop = True


def test_a_stop_inside_a_window_waits_for_its_end(tmp_path):
    # Batches 6, 7 and 8 are the third window.
    straight, _, _ = fit(accumulate=3)
    _, recorder, trainer = fit(tmp_path, accumulate=3, callbacks=[StopAtBatch(6)])
    assert trainer.global_step == 3 and len(recorder.batches) == 9
    assert names(tmp_path) == ["step-00000003"]
    resumed, _, _ = fit(tmp_path, accumulate=3, ckpt_path=find_resumable(tmp_path))
    assert torch.equal(parameters(straight.model), parameters(resumed.model))


def test_a_truncated_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, caplog):
    straight, _, _ = fit()
    fit(tmp_path, steps=12)
    file = tmp_path / "step-00000012" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    path = find_resumable(tmp_path)
    assert path.name == "step-00000008" and "step-00000012 (checkpoint.pt has 1000 bytes" in caplog.text
    resumed, _, _ = fit(tmp_path, ckpt_path=path)
    assert torch.equal(parameters(straight.model), parameters(resumed.model))
    # The damaged one must not count among the newest, and is kept for whoever wants to look.
    assert names(tmp_path) == ["abandoned-step-00000012", "step-00000016", "step-00000020"]


def test_everything_in_a_checkpoint_is_plain(tmp_path):
    loggers = MetricsLogger(tmp_path / "metrics.jsonl")
    callbacks = [Throughput(), LambdaMonitor(), RichProgress()]
    fit(tmp_path, steps=4, callbacks=callbacks, logger=loggers)
    loaded = torch.load(tmp_path / "step-00000004" / "checkpoint.pt", weights_only=True)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= set(loaded)
    assert loaded["ToyData"] == {"rows_consumed": 32}
    assert loaded["difftune"]["tokens_seen"] == 32 * 12
    assert all(name.startswith("model.") for name in loaded["state_dict"])


class Full:
    """A disk on which the checkpoints of some steps find no room."""

    def __init__(self, monkeypatch, steps):
        original = checkpoint_io.torch.save

        def save(checkpoint, file):
            if checkpoint["global_step"] in steps:
                file.write(b"half of it")
                raise OSError(28, "No space left on device")
            return original(checkpoint, file)

        monkeypatch.setattr(checkpoint_io.torch, "save", save)


def test_a_full_disk_spares_the_old_checkpoint_and_the_training(tmp_path, monkeypatch, caplog):
    Full(monkeypatch, {8, 12})
    _, _, trainer = fit(tmp_path, steps=13, keep_last=1, every_n_steps=4)
    assert trainer.global_step == 13
    assert names(tmp_path) == ["step-00000013"]
    assert "checkpoint of step 8 NOT saved ([Errno 28] No space left on device)" in caplog.text
    assert "the newest checkpoint is that of step 4" in caplog.text


def test_a_full_disk_at_the_end_is_an_error_and_the_old_checkpoint_survives(tmp_path, monkeypatch):
    Full(monkeypatch, {8, 10})
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, steps=10, keep_last=1)
    assert names(tmp_path) == ["step-00000004"]
    assert find_resumable(tmp_path) is not None


class Evaluate(Callback):
    """Reports a metric by step, as an evaluation does; optionally at the end again."""

    def __init__(self, values, at_end=None):
        self.values, self.at_end, self.saving = values, at_end, None

    def on_train_start(self, trainer, pl_module):
        self.saving = next(c for c in trainer.callbacks if isinstance(c, Checkpointing))
        if trainer.global_step in self.values:
            self.report(trainer)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step in self.values and self.saving._stepped(trainer):
            self.report(trainer)

    def on_train_end(self, trainer, pl_module):
        if self.at_end is not None:
            self.saving.on_evaluation(trainer, {"eval/acc": self.at_end})

    def report(self, trainer):
        self.saving.on_evaluation(trainer, {"eval/acc": self.values[trainer.global_step], "eval/other": 9.0})


def best_of(folder):
    record = json.loads((folder / "best.json").read_text())
    weights = torch.load(folder / "best" / "checkpoint.pt", weights_only=True)
    assert (folder / "best").resolve().name == f"step-{record['step']:08d}"
    assert weights["global_step"] == record["step"]
    return record["step"], record["value"]


def test_the_best_checkpoint_has_the_weights_that_were_evaluated(tmp_path):
    values = {0: 0.95, 3: 0.2, 5: 0.7, 7: float("nan"), 9: 0.7, 13: 0.4}
    _, recorder, _ = fit(tmp_path, steps=14, callbacks=[Evaluate(values)], best_metric="eval/acc", keep_last=1)
    assert best_of(tmp_path) == (5, 0.7)
    # Step 3 was best once and is gone; regular and last ones are kept as ever.
    assert names(tmp_path) == ["best", "best.json", "step-00000005", "step-00000014"]
    saved = torch.load(tmp_path / "best" / "checkpoint.pt", weights_only=True)["state_dict"]
    at_5 = dict(recorder.steps)[5]
    assert torch.equal(torch.cat([saved[f"model.{n}"].flatten() for n in order()]), at_5)


def order():
    return [name for name, _ in build_module().model.named_parameters()]


def test_the_best_may_be_the_smallest_and_come_at_the_end(tmp_path):
    evaluate = Evaluate({4: 2.0}, at_end=1.5)
    fit(tmp_path, steps=6, callbacks=[evaluate], best_metric="eval/acc", best_mode="min")
    assert best_of(tmp_path) == (6, 1.5)


def test_the_best_is_remembered_by_a_resumed_run(tmp_path):
    settings = {"best_metric": "eval/acc", "keep_last": 1}
    fit(tmp_path, steps=10, callbacks=[Evaluate({5: 0.7})], **settings)
    path = find_resumable(tmp_path)
    fit(tmp_path, steps=14, ckpt_path=path, callbacks=[Evaluate({10: 0.3, 12: 0.6})], **settings)
    assert best_of(tmp_path) == (5, 0.7)
    path = find_resumable(tmp_path)
    fit(tmp_path, steps=18, ckpt_path=path, callbacks=[Evaluate({14: 0.3, 16: 0.8})], **settings)
    assert best_of(tmp_path) == (16, 0.8)


def test_a_best_that_finds_no_room_leaves_the_old_best(tmp_path, monkeypatch):
    Full(monkeypatch, {7})
    fit(tmp_path, steps=9, callbacks=[Evaluate({5: 0.7, 7: 0.9})], best_metric="eval/acc", keep_last=1)
    assert best_of(tmp_path) == (5, 0.7)


def test_leftovers_are_removed_and_later_checkpoints_set_aside(tmp_path, caplog):
    fit(tmp_path, steps=8)
    (tmp_path / ".tmp-step-00000012").mkdir()
    fit(tmp_path, steps=6, ckpt_path=tmp_path / "step-00000004", every_n_steps=None)
    assert names(tmp_path) == ["abandoned-step-00000008", "step-00000004", "step-00000006"]
    assert "step-00000008 is later than step 4" in caplog.text


def test_other_hyperparameters_take_effect_on_resume_with_a_warning(tmp_path, caplog):
    fit(tmp_path, steps=4)
    _, _, trainer = fit(tmp_path, steps=6, ckpt_path=find_resumable(tmp_path), lr=5e-3, weight_decay=0.3)
    assert "decay.lr 0.01 -> 0.005" in caplog.text and "decay.weight_decay 0.1 -> 0.3" in caplog.text
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.3


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(tmp_path):
    fit(tmp_path, steps=4)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be resumed from: it has no manifest.json; choose another"):
        fit(tmp_path, steps=6, ckpt_path=tmp_path / "step-00000004")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "at least 1, or None"),
        ({"keep_last": 0}, "could not be resumed"),
        ({"best_mode": "biggest"}, "max or min, got 'biggest'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Checkpointing(tmp_path, **settings)


def test_metrics_of_an_interrupted_run_have_each_step_once(tmp_path):
    def lines(folder):
        parsed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(x["step"], x["tokens"], x["name"], x["value"]) for x in parsed if x["name"].startswith("train/")]

    def run(folder, resume=None, stop=()):
        step = None if resume is None else int(resume.name[-8:])
        logger = MetricsLogger(folder / "metrics.jsonl", resume_step=step)
        fit(folder / "ckpt", ckpt_path=resume, logger=logger, callbacks=stop)

    class Crash(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 16:
                raise KeyError("the machine broke")

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run(tmp_path / "a")
    with pytest.raises(KeyError):
        run(tmp_path / "b", stop=[Crash()])
    newest = list_checkpoints(tmp_path / "b" / "ckpt")[-1]
    AtomicCheckpointIO().remove_checkpoint(newest)  # so that step 15 is logged already when it is trained again
    assert newest.name == "step-00000016"
    run(tmp_path / "b", resume=find_resumable(tmp_path / "b" / "ckpt"))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
