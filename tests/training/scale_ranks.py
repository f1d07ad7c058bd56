"""Trainings of a tiny model, by name: alone in the process of a test, or on several ranks as a worker of `ranks.py`."""

import math
import os
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from torch.distributed.tensor import DTensor

from difftune.checkpoints.sharded import FreshWeights, fill_model
from difftune.evaluation.early_stop import Patience
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.adapter_settings import AdapterSettings
from difftune.modeling.adapters import add_adapter
from difftune.modeling.modeling import recompute_blocks
from difftune.training.finetune import FinetuneModule
from difftune.training.strategies import build_strategy
from tests.training.toy import VOCABULARY, ToyData, build_trainer

SCENARIOS = {
    "full": {},
    "lora": {"lora": True},
    "tied": {"architecture": {"tie_word_embeddings": True}},
    "accumulation": {"accumulate": 3, "clip": 0.05},
    "three_steps": {"steps": 3},
    "tied_three_steps": {"steps": 3, "architecture": {"tie_word_embeddings": True}, "lora": True},
    "diff_v2": {"steps": 3, "architecture": {"attention": "diff_v2"}},
    "recomputed": {"steps": 3, "checkpoint_every": 2},
    "recomputed_lora": {"steps": 3, "checkpoint_every": 1, "lora": True},
    "kept_gathered": {"steps": 3, "reshard_after_forward": False},
    "offloaded": {"steps": 3, "cpu_offload": True},
    "nan_on_one_rank": {"steps": 5, "poison": 2},
    "no_labels": {"steps": 5, "data": {"spoil": (2,)}},
    "patience": {"patience": 2},
    "bfloat16": {"steps": 3, "param_dtype": torch.bfloat16},
    "bfloat16_weights": {"steps": 3, "dtype": torch.bfloat16, "lora": True},
    "tensor": {"steps": 3, "architecture": {"qk_norm": True}, "tensor_parallel_size": 2},
    "tensor_skeleton": {"steps": 3, "skeleton": True, "tensor_parallel_size": 2},
    "tensor_diff_v2": {"steps": 3, "architecture": {"attention": "diff_v2"}, "tensor_parallel_size": 2},
    "tensor_softmax": {"steps": 3, "architecture": {"attention": "softmax"}, "tensor_parallel_size": 2},
}
"""What to train, by name: arguments of :func:`train`."""


class Poisoned(FinetuneModule):
    """The last rank's loss is not a number in one step."""

    poison = None

    def compute_loss(self, batch):
        loss_sum, count = super().compute_loss(batch)
        is_last = self.trainer.global_rank == self.trainer.world_size - 1
        return (loss_sum * math.nan if is_last and self.trainer.global_step == self.poison else loss_sum), count


class Evaluated(Callback):
    """Tells a patience of the loss of every step, as an evaluation would."""

    def __init__(self, patience):
        self.patience = patience

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.patience.on_evaluation(trainer, {"loss": pl_module.logged["train/loss"]})


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
    return DiffTransformerForCausalLM(tiny_config(**settings))


def tiny_config(**settings):
    architecture = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "attention": "diff_v1",
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    }
    return DiffTransformerConfig(**{**architecture, **settings})


def fresh_skeleton(config, seed):
    """A model on the meta device, and the weights that a fresh one with this seed has."""
    with torch.device("meta"):
        model = DiffTransformerForCausalLM(config)
    return model, FreshWeights(partial(DiffTransformerForCausalLM, config), seed)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    strategy,
    devices,
    *,
    steps=20,
    accumulate=1,
    clip=1.0,
    architecture=None,
    dtype=torch.float32,
    lora=False,
    checkpoint_every=None,
    poison=None,
    patience=None,
    data=None,
    skeleton=False,
    **sharding,
):
    """Train one scenario; return its curve, its parameters by name, and what every rank had counted."""
    model, load_weights = cast_weights(tiny_model(**(architecture or {})), dtype), None
    if skeleton and devices > 1:
        model, weights = fresh_skeleton(tiny_config(), seed=3)
        load_weights = partial(fill_model, weights=weights)
    if lora:
        seed_everything(4, verbose=False)
        add_adapter(model, AdapterSettings(rank=4, alpha=8))
    if checkpoint_every:
        recompute_blocks(model, every=checkpoint_every)
    curve = Curve()
    module = Poisoned(model, lr=3e-3, warmup_steps=3, total_steps=20, schedule="cosine", load_weights=load_weights)
    module.poison = poison
    trainer = build_trainer(
        [curve, *([Evaluated(Patience("loss", "min", patience))] if patience else [])],
        devices=devices,
        strategy=build_strategy(strategy, devices=devices, **sharding) if devices > 1 else "auto",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        log_every_n_steps=1,
    )
    trainer.fit(module, ToyData(rows=8, **(data or {})))
    counted = (trainer.global_step, module.tokens_seen, module.label_tokens_seen, module.skipped_steps)
    everyone = [counted]
    if devices > 1:
        everyone = [None] * devices
        torch.distributed.all_gather_object(everyone, counted)
    return {
        "loss": torch.tensor(curve.loss, dtype=torch.float64),
        "norm": torch.tensor(curve.norm, dtype=torch.float64),
        "parameters": {name: whole(p) for name, p in module.model.named_parameters()},
        "sharded": sorted(name for name, p in module.model.named_parameters() if isinstance(p, DTensor)),
        "counted": everyone,
    }


def main(arguments):
    """``FOLDER STRATEGY[:SCENARIO] ...``: train them one after the other; rank 0 saves the results."""
    folder, *names = arguments
    devices = int(os.environ["WORLD_SIZE"])
    for name in names:
        strategy, _, scenario = name.partition(":")
        results = train(strategy, devices, **SCENARIOS[scenario])
        print(name, "done", flush=True)
        if torch.distributed.get_rank() == 0:
            torch.save(results, Path(folder) / f"{strategy}-{scenario}-{devices}.pt")
