"""A model, a data module and a trainer, small enough to train hundreds of times; also run as a program by tests."""

import argparse
import os
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from difftune.modeling.lambdas import LambdaV1
from difftune.training.checkpoint import Checkpointing
from difftune.training.finetune import FinetuneModule
from difftune.training.loggers import MetricsLogger
from difftune.training.preemption import Preemption

VOCABULARY, WIDTH, LENGTH = 29, 16, 12


class Layer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.lambda_full = LambdaV1(4, 0.2)
        for parameter in self.lambda_full.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.norm = nn.LayerNorm(WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return x + self.dropout(self.proj(self.norm(x - self.lambda_full().to(x.dtype) * before)).tanh())


class ToyModel(nn.Module):
    """Called like the real one; predicts the next token from this one and the one before."""

    def __init__(self, dropout=0.0, layers=2):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(layers))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids, labels, use_cache=False, z_loss=0.0):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits, labels = self.lm_head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, labels, ignore_index=-100, reduction="sum")
        return SimpleNamespace(loss_sum=loss, num_label_tokens=(labels != -100).sum())


def row(index, seed=0):
    """Row ``index`` of an endless stream: random tokens, of which a varying number are labels."""
    generator = torch.Generator().manual_seed(seed * 100_003 + index)
    ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
    labels = ids.clone()
    labels[: int(torch.randint(1, LENGTH - 1, (), generator=generator))] = -100
    return ids, labels


class Stream(IterableDataset):
    def __init__(self, start, rows, batches, rank, world, spoil, delay):
        self.start, self.rows, self.batches, self.spoil, self.delay = start, rows, batches, spoil, delay
        self.rank, self.world = rank, world

    def __iter__(self):
        number = self.start // self.rows
        while self.batches is None or number < self.batches:
            picked = range(number * self.rows, (number + 1) * self.rows)[self.rank :: self.world]
            ids, labels = map(torch.stack, zip(*(row(i) for i in picked), strict=True))
            if number in self.spoil:
                labels = torch.full_like(labels, -100)
            time.sleep(self.delay)
            yield {"input_ids": ids, "labels": labels}
            number += 1


class ToyData(LightningDataModule):
    """Micro-batches of ``rows`` rows over all ranks; those numbered in ``spoil`` have no labels."""

    def __init__(self, rows=4, batches=None, spoil=(), delay=0.0):
        super().__init__()
        self.rows, self.batches, self.spoil, self.delay, self.start = rows, batches, spoil, delay, 0

    def train_dataloader(self):
        sampling = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        rank, world = sampling["rank"], sampling["num_replicas"]
        stream = Stream(self.start, self.rows, self.batches, rank, world, self.spoil, self.delay)
        return DataLoader(stream, batch_size=None)

    def state_dict(self):
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        return {"rows_consumed": done * self.rows}

    def load_state_dict(self, state_dict):
        self.start = state_dict["rows_consumed"]


class Recorder(Callback):
    """Keeps what was fed and what was learned from it."""

    def __init__(self):
        self.batches, self.steps = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((batch_idx, batch["input_ids"].clone()))

    def on_train_batch_end(self, trainer, pl_module, *args):
        if not self.steps or self.steps[-1][0] != trainer.global_step:
            self.steps.append((trainer.global_step, parameters(pl_module.model)))


def parameters(model):
    """All parameters of a model in one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def build_module(dropout=0.0, double=False, seed=1, model=None, **settings):
    seed_everything(seed, verbose=False)
    model = model or ToyModel(dropout)
    settings = {"lr": 1e-2, "total_steps": 20, "schedule": "cosine", "warmup_steps": 3, **settings}
    return FinetuneModule(model.double() if double else model, **settings)


def build_trainer(callbacks=(), **settings):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 20,
        "logger": False,
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks),
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, Checkpointing) for c in callbacks),
        "use_distributed_sampler": False,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 5,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def main():
    """Train as a process that can be signalled; print a line a step, exit as the real program does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--devices", type=int, default=1)
    arguments = parser.parse_args()

    class Announcer(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            print(f"rank {trainer.global_rank} process {os.getpid()} step {trainer.global_step}", flush=True)

    torch.set_num_threads(1)
    with Preemption() as preemption:
        trainer = build_trainer(
            [Announcer(), preemption, Checkpointing(f"{arguments.folder}/checkpoints", every_n_steps=6)],
            devices=arguments.devices,
            strategy="ddp" if arguments.devices > 1 else "auto",
            accumulate_grad_batches=2,
            logger=MetricsLogger(f"{arguments.folder}/metrics.jsonl"),
        )
        # The delay leaves the sender of the signal time.
        trainer.fit(build_module(dropout=0.1), ToyData(delay=0.2))
    sys.exit(preemption.exit_code or 0)


if __name__ == "__main__":
    main()
