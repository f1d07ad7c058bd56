"""`difftune fit` with a model sharded over two processes: the run folder is that of one process."""

import json
import sys

import pytest
from safetensors.torch import load_file

from difftune import cli
from difftune.checkpoints.load import load_model
from difftune.report.summary import read_metrics
from tests.conftest import ROOT
from tests.ranks import run_group, run_ranks

RECIPE = (
    "fit",
    "--config",
    "recipes/quickstart.yaml",
    "trainer.max_steps=4",
    "optim.warmup_steps=2",
    "data.train.*.options.count=200",
    "evaluation.tasks=[]",
    "evaluation.every_fraction=null",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "logging.loggers=[jsonl]",
)
FRESH = ("model.hidden_size=32", "model.intermediate_size=32", "model.tie_word_embeddings=false")
TWO = ("trainer.strategy=fsdp", "trainer.devices=2", "data.micro_batch_size=4")


def metrics(folder):
    return {
        (line["stage"], line["step"], line["name"]): (line["value"], line["tokens"])
        for line in read_metrics(folder)
        if line["name"].startswith("train/")
    }


def assert_same_metrics(several, one):
    assert several.keys() == one.keys()
    for key, (value, tokens) in one.items():
        assert several[key] == (pytest.approx(value, abs=1e-5), tokens), key


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A fresh model in two stages, and an adapter on what came out, by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    adapter = (f"model.path={folder / 'one' / 'export'}", "adapter={rank: 4, train_norms: true}", "tokenizer=digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert cli.main([*RECIPE, *FRESH, f"run_dir={folder / 'one'}"]) == 0
        assert cli.main([*RECIPE, *adapter, f"run_dir={folder / 'one-adapter'}"]) == 0
    jobs = [
        [*RECIPE, *FRESH, *TWO, f"run_dir={folder / 'two'}"],
        [*RECIPE, *adapter, *TWO, f"run_dir={folder / 'two-adapter'}"],
    ]
    done = run_ranks("tests.integration.fit_ranks", json.dumps(jobs))
    return folder, done.output


def test_two_processes_train_and_export_what_one_does(runs):
    folder, _ = runs
    assert_same_metrics(metrics(folder / "two"), metrics(folder / "one"))
    one, two = (load_model(folder / name / "export").state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_two_processes_train_and_export_the_adapter_of_one(runs):
    folder, _ = runs
    assert_same_metrics(metrics(folder / "two-adapter"), metrics(folder / "one-adapter"))
    exports = [folder / f"{name}-adapter" / "export" for name in ("one", "two")]
    one, two = (load_file(export / "adapter_model.safetensors") for export in exports)
    assert one.keys() == two.keys() and any("lambda_full" in name for name in one)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    first, second = (json.loads((export / "adapter_config.json").read_text()) for export in exports)
    assert first == second


def test_the_first_rank_alone_speaks_and_writes(runs):
    folder, output = runs
    first, second = output.split("--- rank 1\n")
    assert "traces 4/4" in first and "exported" in first
    assert "loss" not in second and "exported" not in second
    keys = [(line["stage"], line["step"], line["name"]) for line in read_metrics(folder / "two")]
    assert len(keys) == len(set(keys))


def test_lightning_starts_the_other_process_itself(tmp_path):
    command = [sys.executable, "cli.py", *RECIPE, *FRESH, *TWO, "trainer.max_steps=3", f"run_dir={tmp_path}"]
    done = run_group(command, env={"HF_HUB_OFFLINE": "1"})
    assert done.output.count("traces 3/3") == 1, done.output
    assert (tmp_path / "checkpoints/traces/done.json").is_file()


def test_processes_that_are_not_in_the_recipe_are_refused(tmp_path):
    job = [*RECIPE, *FRESH, f"run_dir={tmp_path / 'run'}"]
    done = run_ranks("tests.integration.fit_ranks", json.dumps([job]), check=False)
    assert done.returncode == 2
    assert "torchrun started 2 processes, and trainer.devices=auto on 1 machines makes 1" in done.output
    assert not (tmp_path / "run").exists()
