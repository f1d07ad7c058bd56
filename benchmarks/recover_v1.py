"""How much of what a Llama loses when it becomes DIFF V1 comes back, with and without the Llama as teacher.

python -m benchmarks.recover_v1 [--steps 1000] [--recovery 65] [--seeds 3] [--lr 1e-3 3e-3] [--hidden-size 64]

A small Llama is trained for a minute on Python's standard library as bytes and converted as `difftune convert` does it.
Each way then trains the same copy on the same rows, at each learning rate; the loss is taken on files that were held
out. The share recovered is that of the loss that the conversion added. 65 steps are 100K tokens. Every row is printed
when it is there, and at the end the mean over the seeds with a 95% interval (Student's t); also of the difference, seed
by seed, from cross entropy alone at that one of its rates which is best. The last rows train the Llama itself on by the
same steps: what the text still had to teach, which cross entropy brings a student besides.
"""

import argparse
import copy
import logging
import math
import statistics
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM

from benchmarks.common import machine, table
from benchmarks.upcycle_v1 import LENGTH, ROWS, build, library_bytes, llama_config, loss, rows_of, train
from difftune.checkpoints.llama import config_from_llama
from difftune.checkpoints.streams import in_order
from difftune.checkpoints.upcycle import config_to_v1, to_diff_v1
from difftune.report.compare import t95
from difftune.training.distill import DistillModule
from difftune.training.finetune import FinetuneModule
from difftune.training.teachers import OnlineTeacher

TEST_ROWS = 64
BASELINE = "cross entropy alone"
LLAMA = "(the Llama itself by cross entropy)"
WAYS = {
    BASELINE: None,
    "half cross entropy, half forward KL": {"weight": 0.5},
    "forward KL": {"weight": 1.0},
    "reverse KL": {"weight": 1.0, "divergence": "reverse_kl"},
    "half each, attention outputs matched first": {"weight": 0.5, "align_weight": 1.0},
}


class Rows(IterableDataset):
    """The same rows for every way."""

    def __init__(self, content: torch.Tensor, seed: int) -> None:
        self.content, self.seed = content, seed

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            ids = rows_of(self.content, ROWS, generator)
            yield {"input_ids": ids, "labels": ids.clone()}


class Bytes(LightningDataModule):
    """A loader of them."""

    def __init__(self, content: torch.Tensor, seed: int) -> None:
        super().__init__()
        self.rows = Rows(content, seed)

    def train_dataloader(self) -> DataLoader:
        """Endless."""
        return DataLoader(self.rows, batch_size=None)


def recover(
    model: nn.Module, teacher: LlamaForCausalLM, way: dict | None, data: Bytes, steps: int, lr: float
) -> nn.Module:
    """Train a copy of a model, one way."""
    student = copy.deepcopy(model)
    options = {"lr": lr, "weight_decay": 0.0, "warmup_steps": max(1, steps // 10), "total_steps": steps}
    if way is None:
        module = FinetuneModule(student, **options)
    else:
        align = {"align_steps": steps // 3} if "align_weight" in way else {}
        module = DistillModule(
            student, teacher=OnlineTeacher(teacher, vocab_size=teacher.config.vocab_size), **way, **align, **options
        )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return student


def prepare(seed: int, hidden_size: int, steps: int, learned: torch.Tensor) -> tuple[LlamaForCausalLM, nn.Module]:
    """A Llama that was trained, and what `difftune convert` makes of it."""
    torch.manual_seed(seed)
    config = llama_config(hidden_size, 3 * hidden_size)
    llama = train(LlamaForCausalLM(config), learned, steps, 3e-3, seed=2 * seed + 1)
    own = config_from_llama(config)
    target = config_to_v1(own, subln="plain", lambda_init=0.05)
    tensors = {name: tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"}
    return llama, build(target, dict(to_diff_v1(own, target, in_order(tensors))))


def interval(values: Sequence[float], unit: str = "{:+.1%}") -> str:
    """Mean and half the width of its 95% interval."""
    mean = unit.format(statistics.fmean(values))
    if len(values) < 2:
        return mean
    half = t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {unit.format(half).lstrip('+')}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of the Llama's training")
    parser.add_argument("--recovery", type=int, default=65, help="steps of each way")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="1 to 10")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    learned, held_out = library_bytes()
    amount = args.recovery * ROWS * LENGTH / 1e5
    print(
        f"Loss on held-out bytes, nats; Llama of hidden {args.hidden_size}, {args.steps} steps; {args.recovery} steps "
        f"of recovery, {amount:.2f} x 100K tokens"
    )
    print(machine(args.threads, "transformers"), flush=True)
    shares: dict[tuple[str, float], list[float]] = {(name, lr): [] for name in [*WAYS, LLAMA] for lr in args.lr}
    losts = []
    for seed in range(args.seeds):
        llama, converted = prepare(seed, args.hidden_size, args.steps, learned)
        before, after = loss(llama, held_out, TEST_ROWS), loss(converted, held_out, TEST_ROWS)
        losts.append(after - before)
        print(f"seed {seed}: the Llama {before:.4f}, converted {after:.4f}", flush=True)
        for (name, lr), found in shares.items():
            if name == LLAMA:
                # It was frozen as a teacher.
                own = copy.deepcopy(llama).requires_grad_(True)
                trained = train(own, learned, args.recovery, lr, seed=2 * seed + 2)
            else:
                trained = recover(converted, llama, WAYS[name], Bytes(learned, 2 * seed + 2), args.recovery, lr)
            end = loss(trained, held_out, TEST_ROWS)
            found.append((after - end) / losts[-1] if losts[-1] else math.nan)
            print(f"seed {seed}: {name}, lr {lr:g}: {end:.4f}, recovered {found[-1]:.1%}", flush=True)
    base = max((found for (name, _), found in shares.items() if name == BASELINE), key=statistics.fmean)
    rows = []
    for (name, lr), found in shares.items():
        ahead = interval([share - other for share, other in zip(found, base, strict=True)])
        each = interval([share / amount for share in found])
        rows.append([name, f"{lr:g}", interval(found), each, "" if name == LLAMA or found is base else ahead])
    print(f"lost by the conversion, nats: {interval(losts, '{:.4f}')}; {args.seeds} seeds, mean and 95% interval")
    print(table(["way", "lr", "recovered", "per 100K tokens", "ahead of cross entropy alone"], rows))


if __name__ == "__main__":
    main()
