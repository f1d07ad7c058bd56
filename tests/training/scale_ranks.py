"""Trainings of a tiny model, by name: alone in the process of a test, or on several ranks as a worker of `ranks.py`."""

import os
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from torch.distributed.tensor import DTensor

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.training.strategies import build_strategy
from tests.training.toy import VOCABULARY, ToyData, build_module, build_trainer

SCENARIOS = {
    "full": {"steps": 20},
    "lora": {"steps": 20, "lora": True},
    "tied": {"steps": 20, "architecture": {"tie_word_embeddings": True}},
    "accumulation": {"steps": 20, "accumulate": 3, "clip": 0.05},
    "diff_v2": {"steps": 3, "architecture": {"attention": "diff_v2"}},
    "three_steps": {"steps": 3},
}
"""What to train, by name: arguments of :func:`train`."""


class Curve(Callback):
    """Keeps what every step logged."""

    def __init__(self):
        self.loss, self.norm = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if len(self.loss) < trainer.global_step:
            self.loss.append(pl_module.logged["train/loss"])
            self.norm.append(pl_module.logged["train/grad_norm"])


def tiny_model(**settings):
    seed_everything(3, verbose=False)
    architecture = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention": "diff_v1",
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    }
    return DiffTransformerForCausalLM(DiffTransformerConfig(**{**architecture, **settings}))


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    strategy, devices, *, steps=20, accumulate=1, architecture=None, lora=False, model=None, clip=1.0, **sharding
):
    """Train one scenario; return its curve, its parameters by name, and what the module had counted."""
    model = model or tiny_model(**(architecture or {}))
    if lora:
        seed_everything(4, verbose=False)
        add_adapter(model, AdapterSettings(rank=4, alpha=8))
    curve = Curve()
    module = build_module(model=model, lr=3e-3)
    trainer = build_trainer(
        [curve],
        devices=devices,
        strategy=build_strategy(strategy, devices=devices, **sharding) if devices > 1 else "auto",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        log_every_n_steps=1,
    )
    trainer.fit(module, ToyData(rows=8))
    return {
        "loss": torch.tensor(curve.loss, dtype=torch.float64),
        "norm": torch.tensor(curve.norm, dtype=torch.float64),
        "parameters": {name: whole(p) for name, p in module.model.named_parameters()},
        "sharded": sorted(name for name, p in module.model.named_parameters() if isinstance(p, DTensor)),
        "counted": (module.tokens_seen, module.label_tokens_seen, module.skipped_steps),
    }


def main(arguments):
    """``FOLDER STRATEGY[:SCENARIO] ...``: train them one after the other; rank 0 saves the results."""
    folder, *names = arguments
    devices = int(os.environ["WORLD_SIZE"])
    for name in names:
        strategy, _, scenario = name.partition(":")
        results = train(strategy, devices, **SCENARIOS[scenario])
        if torch.distributed.get_rank() == 0:
            torch.save(results, Path(folder) / f"{strategy}-{scenario}-{devices}.pt")
