import json
import subprocess

import pytest

from difftune.modeling import DiffTransformerConfig
from difftune.verification import training
from difftune.verification.training import verify_training

CONFIG = DiffTransformerConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1)
WHATS = [
    "micro-batches = one batch",
    "gone on from step 3 = straight through",
    "two devices with ddp = one",
    "two devices with fsdp = one",
]


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Trainings that write what a test says, by the name of their folder; returns that, and what was started."""
    losses = {name: [float(step) for step in range(6)] for name in ("whole", "parts", "ddp", "fsdp")}
    losses["gone-on"] = [None, None, None, 3.0, 4.0, 5.0]
    started = []

    def fit(recipe, folder, processes=1):
        started.append((folder.name, recipe, processes))
        if isinstance(losses[folder.name], str):
            return losses[folder.name]
        for step in (3, 6):
            (folder / f"checkpoints/main/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        lines = [
            {"name": "train/loss", "step": step + 1, "value": value}
            for step, value in enumerate(losses[folder.name])
            if value is not None
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return None

    monkeypatch.setattr(training, "_fit", fit)
    monkeypatch.setattr(training, "_weights", lambda folder: {})
    return losses, started


def states(tmp_path, accelerator="gpu", devices=2):
    return {
        claim.what: claim.state for claim in verify_training(CONFIG, tmp_path, accelerator=accelerator, devices=devices)
    }


def test_equal_losses_hold(written, tmp_path):
    assert states(tmp_path) == dict.fromkeys(WHATS, "holds")
    recipes = {name: (recipe, processes) for name, recipe, processes in written[1]}
    # Every training sees the same eight rows a step.
    assert {"data.micro_batch_size=8"} <= set(recipes["whole"][0])
    assert {"data.micro_batch_size=2", "trainer.accumulate_grad_batches=4"} <= set(recipes["parts"][0])
    for name in ("ddp", "fsdp"):
        recipe, processes = recipes[name]
        assert {"data.micro_batch_size=4", "trainer.devices=2", f"trainer.strategy={name}"} <= set(recipe)
        assert processes == 2
    # From a checkpoint that lies in its own folder, and none other.
    assert not any(word.startswith("resume=") for word in recipes["gone-on"][0])
    assert (tmp_path / "gone-on/checkpoints/main/step-00000003").is_dir()


@pytest.mark.parametrize(("name", "what"), zip(["parts", "gone-on", "ddp", "fsdp"], WHATS, strict=True))
@pytest.mark.parametrize("step", [3, 5])
def test_a_loss_that_differs_fails(written, tmp_path, name, what, step):
    written[0][name][step] += 2e-5
    assert states(tmp_path) == {**dict.fromkeys(WHATS, "holds"), what: "fails"}


def test_on_the_cpu_going_on_is_equal_to_the_last_bit(written, tmp_path, monkeypatch):
    import torch

    weights = {"whole": torch.ones(2), "gone-on": torch.ones(2)}
    monkeypatch.setattr(training, "_weights", lambda folder: {"w": weights[folder.name]})
    assert states(tmp_path / "a", accelerator="cpu")[WHATS[1]] == "holds"
    weights["gone-on"] = torch.tensor([1.0, 1.0 + 2**-23])
    assert states(tmp_path / "b", accelerator="cpu")[WHATS[1]] == "fails"


def test_a_training_that_stops_early_fails(written, tmp_path):
    written[0]["ddp"] = [0.0, 1.0]
    assert states(tmp_path)[WHATS[2]] == "fails"


def test_a_training_that_breaks_says_how(written, tmp_path):
    written[0]["fsdp"] = "exit code 1: no memory"
    (claim,) = [
        claim for claim in verify_training(CONFIG, tmp_path, accelerator="gpu", devices=2) if claim.state == "fails"
    ]
    assert (claim.what, claim.found) == (WHATS[3], "exit code 1: no memory")


def test_without_a_first_training_there_is_nothing_to_compare(written, tmp_path):
    written[0]["whole"] = "exit code 2: bad"
    assert states(tmp_path) == {"a training ends": "fails"}


def test_one_device_tries_no_two(written, tmp_path):
    found = states(tmp_path, devices=1)
    assert [found[what] for what in WHATS] == ["holds", "holds", "not tried", "not tried"]
    assert len(written[1]) == 3


def test_a_training_that_fails_is_told_by_its_last_lines(tmp_path):
    failure = training._fit(["optim.lr=-1"], tmp_path / "run")
    assert failure is not None and failure.startswith("exit code 2: ") and "optim.lr" in failure


def test_the_launcher_of_this_process_is_not_that_of_the_trainings(tmp_path, monkeypatch):
    """Lightning would take what Slurm or torchrun says of this process for their number of ranks."""
    seen = {}

    def run(command, env, **options):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(training.subprocess, "run", run)
    for name in ("SLURM_NTASKS", "SLURM_JOB_NAME", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert training._fit([], tmp_path / "run") is None
    assert not [
        name for name in seen if "RANK" in name or "WORLD_SIZE" in name or name.startswith(("SLURM", "TORCHEL"))
    ]
    assert seen["CUDA_VISIBLE_DEVICES"] == "1"
