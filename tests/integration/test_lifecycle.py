"""Whole runs as a user starts them: real processes, real signals, real files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from difftune.checkpoints.load import load_model
from difftune.report.summary import read_metrics
from tests.conftest import ROOT, shared_data

RUN = (sys.executable, str(ROOT / "cli.py"))
STAGES = (
    "trainer.max_steps=40",
    "optim.warmup_steps=2",
    "data.train.*.options.count=300",
    "evaluation.tasks.*.limit=8",
    "evaluation.max_new_tokens=4",
    "trainer.log_every_n_steps=1",
    "logging.loggers=[jsonl]",
    "model.hidden_size=32",
    "model.intermediate_size=32",
)


def difftune(*arguments, wait=True):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*RUN, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not wait:
        return process
    shown, _ = process.communicate(timeout=300)
    return process.returncode, shown


def metric(run_dir, name, stage):
    return {
        line["step"]: line["value"] for line in read_metrics(run_dir) if (line["name"], line["stage"]) == (name, stage)
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["sigterm", "sigusr1"])
def test_a_signalled_run_goes_on_as_if_nothing_had_happened(tmp_path, number):
    recipe = ("fit", "--config", "recipes/quickstart.yaml", *STAGES)
    if number == signal.SIGUSR1:
        recipe = (*recipe, "data.num_workers=1")
    code, shown = difftune(*recipe, f"run_dir={tmp_path / 'straight'}")
    assert code == 0, shown

    killed = tmp_path / "killed"
    process = difftune(*recipe, f"run_dir={killed}", wait=False)
    deadline = time.monotonic() + 300
    while len(metric(killed, "train/loss", "traces")) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number, shown
    stopped_at = max(metric(killed, "train/loss", "traces"))
    assert 5 <= stopped_at < 40 and "the same command goes on from here" in shown

    code, shown = difftune(*recipe, f"run_dir={killed}")
    assert code == 0 and "stage answers has ended before" in shown, shown
    for stage in ("answers", "traces"):
        for name in ("train/loss", "train/grad_norm", "eval/arithmetic/accuracy"):
            assert metric(killed, name, stage) == metric(tmp_path / "straight", name, stage), (stage, name)
    expected, actual = (load_model(folder / "export") for folder in (tmp_path / "straight", killed))
    for (name, weight), other in zip(expected.named_parameters(), actual.parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.slow
def test_two_processes_equal_one_in_both_stages(tmp_path):
    recipe = ("fit", "--config", "recipes/quickstart.yaml", *STAGES, "trainer.max_steps=5", "evaluation.tasks=[]")
    recipe = (*recipe, "evaluation.every_fraction=null", "export=null", "data.packing=false")
    for name, options in (
        ("one", ["data.micro_batch_size=8"]),
        ("two", ["data.micro_batch_size=4", "trainer.devices=2"]),
    ):
        code, shown = difftune(*recipe, f"run_dir={tmp_path / name}", *options)
        assert code == 0, shown
    for stage in ("answers", "traces"):
        one, two = (metric(tmp_path / name, "train/loss", stage) for name in ("one", "two"))
        assert list(one) == list(two) == [1, 2, 3, 4, 5]
        assert [two[step] for step in two] == pytest.approx([one[step] for step in one], rel=1e-5)
        labels = [metric(tmp_path / name, "train/label_tokens", stage) for name in ("one", "two")]
        assert labels[0] == labels[1]


@pytest.mark.slow
def test_real_mathematics_end_to_end(tmp_path):
    """GSM8K is trained on for a few steps; all eight test sets are loaded, answered and graded."""
    data = shared_data()
    code, shown = difftune(
        "fit",
        "--config=recipes/gsm8k_small.yaml",
        f"data.train=[{{path: {data / 'gsm8k_train.jsonl'}, limit: 300}}]",
        f"evaluation.tasks=[{{path: {data / 'math_eval' / 'gsm8k.jsonl'}, name: gsm8k, limit: 4}}]",
        "evaluation.max_new_tokens=8",
        "model.hidden_size=32",
        "model.intermediate_size=32",
        "trainer.max_steps=4",
        "optim.warmup_steps=1",
        f"run_dir={tmp_path / 'run'}",
    )
    assert code == 0, shown
    losses = metric(tmp_path / "run", "train/loss", "main")
    assert losses[4] < losses[1] and metric(tmp_path / "run", "eval/gsm8k/n", "main") == {4: 4.0}

    files = sorted((data / "math_eval").glob("*.jsonl"))
    code, shown = difftune(
        "evaluate",
        f"--model={tmp_path / 'run' / 'export'}",
        *(f"--data={file}" for file in files),
        "--limit=3",
        "--max-new-tokens=8",
        f"--out={tmp_path / 'results'}",
    )
    assert code == 0 and len(files) == 8, shown
    results = json.loads((tmp_path / "results" / "results.json").read_text())["tasks"]
    assert set(results) == {file.stem for file in files}
    assert all(result["n"] == 3 for result in results.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "--config", "recipes/quickstart.yaml", "optim.lrr=1", "run_dir={tmp}/run"), "did you mean"),
        (
            ("fit", "--config", "recipes/quickstart.yaml", "data.train.*.path=missing.jsonl", "run_dir={tmp}"),
            "missing.jsonl",
        ),
        (
            ("fit", "--config", "recipes/quickstart.yaml", "model.num_attention_heads=256", "run_dir={tmp}/run"),
            "must be a multiple of num_attention_heads (256)",
        ),
        (
            (
                "fit",
                "--config",
                "recipes/quickstart.yaml",
                "model.attention_backend=flash",
                *STAGES,
                "run_dir={tmp}/run",
            ),
            "needs flash-attn, which is not installed",
        ),
        (("evaluate", "--model", "{tmp}/nowhere", "--data", "synthetic:arithmetic"), "nowhere"),
    ],
    ids=["misspelt-key", "missing-data", "heads-that-do-not-fit", "no-flash-attn", "missing-model"],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments, message, tmp_path):
    code, shown = difftune(
        *(argument.format(tmp=tmp_path) if "{tmp}" in argument else argument for argument in arguments)
    )
    assert code == 2 and message in shown and "Traceback" not in shown, shown
