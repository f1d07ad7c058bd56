import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from difftune.training import loggers
from difftune.training.loggers import MetricsLogger, build_loggers, is_log_step


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys(path):
    return [(line["stage"], line["step"], line["name"], line["value"]) for line in lines(path)]


def test_a_line_has_step_tokens_name_value_stage_and_time(tmp_path):
    logger = MetricsLogger(tmp_path / "deep" / "metrics.jsonl", stage="answers")
    logger.count_tokens = lambda: 4096
    logger.log_metrics({"train/loss": torch.tensor(1.5), "train/label_tokens": 7}, step=3)
    first, second = lines(logger.path)
    assert first.pop("time") == pytest.approx(second.pop("time")) and first["value"] == 1.5
    assert second == {"step": 3, "tokens": 4096, "name": "train/label_tokens", "value": 7, "stage": "answers"}


def test_lines_are_on_disk_at_once_and_appended(tmp_path):
    logger = MetricsLogger(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        logger.log_metrics({"a": step}, step=step)
        assert len(lines(logger.path)) == step


def test_what_is_not_finite_is_null(tmp_path):
    logger = MetricsLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf)}, step=1)
    assert [line["value"] for line in lines(logger.path)] == [None, None, None]


def test_a_resumed_run_takes_out_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    earlier = MetricsLogger(path, stage="one")
    earlier.log_metrics({"a": 0.0}, step=9)
    interrupted = MetricsLogger(path, stage="two")
    for step in (0, 5, 10, 15):
        interrupted.log_metrics({"a": float(step)}, step=step)
    with path.open("a") as file:
        file.write('{"step": 16, "tok')
    resumed = MetricsLogger(path, stage="two", resume_step=10)
    # A metric of the very step of the checkpoint is there already; another one of that step is not.
    resumed.log_metrics({"a": 99.0, "eval": 1.0}, step=10)
    resumed.log_metrics({"a": 15.0}, step=15)
    assert keys(path) == [
        ("one", 9, "a", 0.0),
        ("two", 0, "a", 0.0),
        ("two", 5, "a", 5.0),
        ("two", 10, "a", 10.0),
        ("two", 10, "eval", 1.0),
        ("two", 15, "a", 15.0),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_stage_that_starts_anew_takes_out_its_old_lines_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for stage in ("one", "two"):
        MetricsLogger(path, stage=stage).log_metrics({"a": 0.0}, step=4)
    MetricsLogger(path, stage="two").log_metrics({"a": 1.0}, step=1)
    assert keys(path) == [("one", 4, "a", 0.0), ("two", 1, "a", 1.0)]


def test_a_full_disk_loses_no_line(tmp_path, monkeypatch, caplog):
    logger = MetricsLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"a": 1.0}, step=1)

    class HalfWritten:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[:5])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(loggers, "open", lambda *args: HalfWritten(open(*args)), raising=False)  # noqa: SIM115
    logger.log_metrics({"a": 2.0}, step=2)
    assert "cannot be written" in caplog.text
    monkeypatch.undo()
    logger.log_metrics({"a": 3.0}, step=3)
    assert [line["value"] for line in lines(logger.path)] == [1.0, 2.0, 3.0]


def test_a_file_that_cannot_be_opened_at_first_loses_no_line_either(tmp_path, caplog):
    blocker = tmp_path / "folder"
    blocker.write_text("in the way")
    logger = MetricsLogger(blocker / "metrics.jsonl")
    logger.log_metrics({"a": 1.0}, step=1)
    assert "cannot be opened" in caplog.text
    blocker.unlink()
    logger.log_metrics({"a": 2.0}, step=2)
    assert [line["step"] for line in lines(logger.path)] == [1, 2]


@pytest.mark.parametrize(("every", "expected"), [(5, [1, 5, 10, 12]), (0, []), (100, [1, 12])])
def test_log_steps_are_the_first_the_last_and_every_nth(every, expected):
    trainer = SimpleNamespace(log_every_n_steps=every, max_steps=12)
    assert [step for step in range(13) if is_log_step(trainer, step)] == expected


def test_tensorboard_writes_below_the_run_folder(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps in ((None, (5, 10, 15)), (10, (15,))):
        jsonl, board = build_loggers(
            ["jsonl", "tensorboard"], run_dir=tmp_path, stage="traces", resume_step=resume_step
        )
        for step in steps:
            board.log_metrics({"train/loss": float(step)}, step=step)
        board.finalize("success")
    assert (jsonl.path, jsonl.resume_step) == (tmp_path / "metrics.jsonl", 10)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "traces")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15]


def test_an_absent_package_is_named_with_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(ImportError, match=rf"pip install 'difftune\[{name}\]'"):
            build_loggers([name], run_dir=tmp_path)


def test_wandb_and_mlflow_get_the_run_folder_and_names(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "_silenced_by_errors", lambda logger: logger)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(loggers, "WandbLogger", lambda *args, **kwargs: ("wandb", args, kwargs))
    monkeypatch.setattr(loggers, "MLFlowLogger", lambda *args, **kwargs: ("mlflow", args, kwargs))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "quickstart"
    (_, (title,), wandb), (_, _, mlflow) = build_loggers(
        ["wandb", "mlflow"], run_dir=run_dir, stage="answers", project="maths"
    )
    assert title == "quickstart-answers" and wandb["project"] == "maths" and wandb["resume"] == "allow"
    again = build_loggers(["wandb"], run_dir=run_dir, stage="answers")[0][2]
    other = build_loggers(["wandb"], run_dir=run_dir, stage="traces")[0][2]
    assert wandb["id"] == again["id"] != other["id"]
    assert mlflow["tracking_uri"] == f"file:{run_dir / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking")
    assert build_loggers(["mlflow"], run_dir=run_dir)[0][2]["tracking_uri"] == "http://tracking"


def test_an_unknown_logger_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of jsonl, tensorboard, wandb, mlflow, got 'comet'"):
        build_loggers(["comet"], run_dir=tmp_path)


def test_a_logger_that_cannot_write_says_so_once_and_is_silent(tmp_path, monkeypatch, caplog):
    calls = []

    def full(self, *args, **kwargs):
        calls.append(args)
        raise OSError(28, "No space left on device")

    # Behind Lightning, which makes a ValueError of it.
    monkeypatch.setattr(EventFileWriter, "add_event", full)
    (logger,) = build_loggers(["tensorboard"], run_dir=tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
        logger.save()
    logger.finalize("success")
    assert len(calls) <= 2 and caplog.text.count("TensorBoardLogger cannot write") == 1


def test_other_errors_of_a_logger_are_not_hidden(tmp_path, monkeypatch):
    def wrong(self, *args, **kwargs):
        raise TypeError("a fault of the program")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", wrong)
    (logger,) = build_loggers(["tensorboard"], run_dir=tmp_path)
    with pytest.raises(TypeError, match="a fault of the program"):
        logger.log_metrics({"loss": 1.0}, 1)
