"""Runs of the command line on two ranks that share one model: what they leave, and what reads it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from difftune.checkpoints.load import load_model
from difftune.cli import main
from difftune.commands import run
from difftune.config import load_config
from tests.integration.test_adapter_runs import QUICKSTART, make_base
from tests.ranks import run_ranks

TOLERANCE = 1e-5
STAGE = "traces"
ALONE, SHARED = 4, 2
"""Rows of a micro-batch, of one process and of each of two."""
SHORT = (
    "trainer.max_steps=3",
    "trainer.accelerator=cpu",
    "optim.warmup_steps=1",
    # AdamW makes steps of this size of every gradient, of one that is almost nothing but rounding too.
    "optim.lr=3e-4",
    "data.train.*.options.count=200",
    "evaluation.tasks=[]",
    "evaluation.every_fraction=null",
    "logging.loggers=[jsonl]",
    "logging.progress_bar=false",
    "checkpoint.every_n_steps=2",
    "checkpoint.best_metric=null",
    "tokenizer=null",
)
ADAPTER = "adapter={preset: attention, rank: 4, dropout: 0.0}"


def overrides(base, run_dir, *more):
    return [*SHORT, f"model.path={base}", f"run_dir={run_dir}", *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    base = make_base(folder / "base")
    for name, more in (("alone", ()), ("alone-lora", (ADAPTER,))):
        settings = (*more, f"data.micro_batch_size={ALONE}", "trainer.devices=1")
        assert run.fit(load_config(QUICKSTART, overrides(base, folder / name, *settings))) == 0
    shared = (f"data.micro_batch_size={SHARED}", "trainer.devices=2", "trainer.strategy=fsdp")
    commands = [
        (name, ["fit", "--config", str(QUICKSTART), *overrides(base, folder / run_dir, *shared, *more)])
        for name, run_dir, more in (
            ("full", "full", ()),
            ("again", "full", ()),
            ("lora", "lora", (ADAPTER,)),
            ("signalled", "signalled", (ADAPTER,)),
        )
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.txt\n')
    scontrol.chmod(0o755)
    slurm = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "maths"}
    worker = "tests.integration.sharded_checkpoint_ranks"
    result = run_ranks(worker, str(folder / "commands.json"), env=slurm)
    (folder / "output.txt").write_text(result.output)
    return folder


def newest(folder, name, step=3):
    return folder / name / "checkpoints" / STAGE / f"step-{step:08d}"


def codes(folder):
    return [json.loads((folder / f"codes-{rank}.json").read_text()) for rank in (0, 1)]


def curve(folder, name):
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["value"] for line in lines if line["name"] == "train/loss"}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 13)[None], use_cache=False).logits


@pytest.mark.parametrize("kind", ["", "-lora"])
def test_two_ranks_that_share_a_model_train_what_one_process_trains(runs, kind):
    assert [code["lora" if kind else "full"] for code in codes(runs)] == [0, 0]
    ours, theirs = curve(runs, "lora" if kind else "full"), curve(runs, f"alone{kind}")
    assert ours.keys() == theirs.keys() and ours
    assert all(abs(ours[step] - theirs[step]) <= TOLERANCE for step in ours)


def test_a_stage_begins_with_what_the_one_before_left_in_shards(runs):
    assert [code["again"] for code in codes(runs)] == [0, 0]
    # What this and the other tests look at is of the second time, from the checkpoint of the first stage.
    assert "stage answers has ended before: passed over" in (runs / "output.txt").read_text()


def test_the_model_is_exported_at_the_end_and_its_checkpoint_loads_as_a_model(runs):
    assert (newest(runs, "full") / "shards").is_dir()
    from_checkpoint = logits(load_model(newest(runs, "full")))
    # The format of an export is another: its projections are fused, and rounded otherwise.
    exported = logits(load_model(runs / "full" / "export"))
    assert (from_checkpoint - exported).abs().max() <= TOLERANCE * exported.abs().max()
    alone = logits(load_model(newest(runs, "alone")))
    assert (from_checkpoint - alone).abs().max() <= TOLERANCE * alone.abs().max()


def test_export_makes_a_plain_folder_of_a_sharded_checkpoint(runs, tmp_path):
    words = ["export", "--model", str(newest(runs, "full")), "--format", "difftune", "--out", str(tmp_path / "plain")]
    assert main(words) == 0
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    assert torch.equal(logits(load_model(tmp_path / "plain")), logits(load_model(newest(runs, "full"))))


def test_generate_answers_from_a_sharded_checkpoint(runs, capsys):
    assert main(["generate", "--model", str(newest(runs, "full")), "--prompt", "1+1=", "--max-new-tokens", "4"]) == 0


def test_a_sharded_checkpoint_is_evaluated_like_its_export(runs, tmp_path):
    for name, model in (("shards", newest(runs, "full")), ("export", runs / "full" / "export")):
        words = ["evaluate", "--model", str(model), "--data", "synthetic:arithmetic", "--limit", "4"]
        assert main([*words, "--max-new-tokens", "8", "--out", str(tmp_path / name)]) == 0
    shards, export = (
        sorted(json.loads(line)["text"] for line in (tmp_path / name / "samples" / "arithmetic.jsonl").open())
        for name in ("shards", "export")
    )
    assert shards == export and len(shards) == 4


def test_the_adapter_is_saved_whole_and_small_with_lambda_and_equals_that_of_one_process(runs):
    ours = load_file(runs / "lora" / "export" / "adapter_model.safetensors")
    theirs = load_file(runs / "alone-lora" / "export" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).abs().max() <= TOLERANCE for name in ours)
    assert sum("lambda_full" in name for name in ours) == 2 * 4
    of_checkpoint = sum(file.stat().st_size for file in newest(runs, "lora").rglob("*") if file.is_file())
    whole = (runs / "base" / "model.safetensors").stat().st_size
    assert (runs / "lora" / "export" / "adapter_model.safetensors").stat().st_size < 0.5 * whole
    assert of_checkpoint < 2 * whole


def test_a_sharded_checkpoint_of_an_adapter_is_merged_like_any_other(runs, tmp_path):
    assert main(["merge", str(newest(runs, "lora")), "--out", str(tmp_path / "merged")]) == 0
    assert main(["merge", str(newest(runs, "alone-lora")), "--out", str(tmp_path / "alone")]) == 0
    ours, theirs = (logits(load_model(tmp_path / name)) for name in ("merged", "alone"))
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_usr1_to_one_rank_saves_once_requeues_the_job_once_and_exits_138_on_all(runs):
    assert [code["signalled"] for code in codes(runs)] == [138, 138]
    checkpoints = runs / "signalled" / "checkpoints" / "answers"
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-00000002"]
    assert (runs / "scontrol.txt").read_text().splitlines() == ["requeue 77"]


def test_one_process_goes_on_with_what_two_ranks_left(runs):
    settings = (ADAPTER, f"data.micro_batch_size={ALONE}", "trainer.devices=1", "trainer.strategy=auto")
    base, run_dir = runs / "base", runs / "signalled"
    assert run.fit(load_config(QUICKSTART, overrides(base, run_dir, *settings))) == 0
    ours, theirs = curve(runs, "signalled"), curve(runs, "alone-lora")
    assert abs(ours[3] - theirs[3]) <= TOLERANCE
