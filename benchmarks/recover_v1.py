"""How much of what a Llama loses when it becomes DIFF V1 comes back, with and without the Llama as teacher.

python -m benchmarks.recover_v1 [--steps 1000] [--recovery 130] [--hidden-size 128]

A small Llama is trained for some minutes on Python's standard library as bytes and converted as `difftune convert` does
it. Each way then trains the same copy on the same rows; the loss is taken on files that were held out. The share
recovered is that of the loss that the conversion added; per 100K tokens, of which a recovery of 130 steps has 200K.
"""

import argparse
import copy
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import machine, table
from benchmarks.upcycle_v1 import LENGTH, ROWS, build, library_bytes, loss, rows_of, train
from difftune.checkpoints.llama import config_from_llama
from difftune.checkpoints.streams import in_order
from difftune.checkpoints.upcycle import config_to_v1, to_diff_v1
from difftune.training.distill import DistillModule
from difftune.training.finetune import FinetuneModule
from difftune.training.teachers import OnlineTeacher

TEST_ROWS = 128
WAYS = {
    "cross entropy alone": None,
    "half cross entropy, half forward KL": {"weight": 0.5},
    "forward KL": {"weight": 1.0},
    "reverse KL": {"weight": 1.0, "divergence": "reverse_kl"},
    "forward KL, attention outputs matched first": {"weight": 1.0, "align_weight": 1.0},
}


class Rows(IterableDataset):
    """The same rows for every way."""

    def __init__(self, content: torch.Tensor) -> None:
        self.content = content

    def __iter__(self):
        generator = torch.Generator().manual_seed(2)
        while True:
            ids = rows_of(self.content, ROWS, generator)
            yield {"input_ids": ids, "labels": ids.clone()}


class Bytes(LightningDataModule):
    """A loader of them."""

    def __init__(self, content: torch.Tensor) -> None:
        super().__init__()
        self.content = content

    def train_dataloader(self) -> DataLoader:
        """Endless."""
        return DataLoader(Rows(self.content), batch_size=None)


def recover(
    model: nn.Module, teacher: LlamaForCausalLM, way: dict | None, content: torch.Tensor, steps: int
) -> nn.Module:
    """Train a copy of the converted model, one way."""
    student = copy.deepcopy(model)
    options = {"lr": 5e-4, "weight_decay": 0.0, "warmup_steps": max(1, steps // 10), "total_steps": steps}
    if way is None:
        module = FinetuneModule(student, **options)
    else:
        align = {"align_steps": steps // 3} if "align_weight" in way else {}
        module = DistillModule(student, teacher=OnlineTeacher(teacher, vocab_size=256), **way, **align, **options)
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
    trainer.fit(module, Bytes(content))
    return student


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--recovery", type=int, default=130)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    learned, held_out = library_bytes()
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = train(LlamaForCausalLM(config), learned, args.steps, 3e-3, seed=1)
    own = config_from_llama(config)
    target = config_to_v1(own, subln="plain", lambda_init=0.05)
    tensors = {name: tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"}
    converted = build(target, dict(to_diff_v1(own, target, in_order(tensors))))

    before, after = loss(llama, held_out, TEST_ROWS), loss(converted, held_out, TEST_ROWS)
    lost = after - before
    rows = [["the Llama", f"{before:.4f}", "", ""], ["converted", f"{after:.4f}", "0%", ""]]
    amount = args.recovery * ROWS * LENGTH / 1e5
    for name, way in WAYS.items():
        end = loss(recover(converted, llama, way, learned, args.recovery), held_out, TEST_ROWS)
        share = (after - end) / lost
        rows.append([name, f"{end:.4f}", f"{share:.0%}", f"{share / amount:.0%}"])
    print(
        f"Loss on held-out bytes, nats; Llama of hidden {args.hidden_size}, {args.steps} steps; {args.recovery} steps "
        f"of recovery, {amount:.2f} x 100K tokens"
    )
    print(machine(args.threads, "transformers"))
    print(table(["way", "loss", "recovered", "per 100K tokens"], rows))


if __name__ == "__main__":
    main()
