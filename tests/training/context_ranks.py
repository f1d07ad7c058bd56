"""Rows shared by 2 of 4 ranks, and by all 4: losses and gradients that a test compares with those of one process."""

from pathlib import Path

import torch
from lightning.pytorch import seed_everything

from difftune.data.datamodule import SFTDataModule
from difftune.data.sources import Source
from difftune.data.tokenizers import build_tokenizer
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.training.context_parallel import build_context_group, split_batch
from difftune.training.finetune import FinetuneModule
from difftune.training.strategies import FSDP2Strategy, build_strategy
from tests.training.scale_ranks import whole
from tests.training.toy import build_trainer

KINDS = ("diff_v1", "diff_v2", "softmax")
LENGTH = 48


def build_model(kind, checkpointing=False):
    seed_everything(3, verbose=False)
    config = DiffTransformerConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2 if kind == "diff_v2" else 4,
        head_dim=8,
        attention=kind,
        initializer_range=0.2,
    )
    model = DiffTransformerForCausalLM(config).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.chunk_mlp(5)
    return model


def batch_of(packed):
    """Two rows; packed, with documents that begin and end inside chunks, at their edges, and across the middle."""
    generator = torch.Generator().manual_seed(0)
    length = LENGTH if packed else LENGTH - 5
    ids = torch.randint(64, (2, length), generator=generator)
    labels = ids.clone()
    labels[:, ::5] = -100
    if not packed:
        mask = torch.ones_like(ids)
        mask[1, -9:] = 0
        labels[1, -9:] = -100
        positions = torch.arange(length).expand(2, -1)
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
    lengths = [7, 5, 30, 6, 1, 23, 24]
    labels[0, [0, 7, 12, 42]] = labels[1, [0, 1, 24]] = -100
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, -1)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seqlens": ends}


def loss_and_gradients(kind, packed, group=None, checkpointing=False):
    """Summed loss, number of labels and all gradients in one vector: of this process's part, given a group."""
    model = build_model(kind, checkpointing)
    batch = batch_of(packed)
    output = model(**(batch if group is None else split_batch(batch, group)), use_cache=False, z_loss=1e-3)
    output.loss_sum.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return torch.cat([output.loss_sum.detach()[None], output.num_label_tokens[None].float(), gradients])


def train(packing, strategy="auto", devices=1, context_parallel_size=1):
    """Parameters after three optimiser steps of the real data module and trainer, and what was logged."""
    data = SFTDataModule(
        tokenizer=build_tokenizer("digits"),
        train=[Source("synthetic:arithmetic", options={"count": 200})],
        seq_len=64,
        micro_batch_size=4 * context_parallel_size // devices,
        packing=packing,
        context_parallel_size=context_parallel_size,
    )
    module = FinetuneModule(build_model("diff_v1"), lr=1e-3, total_steps=3, context_parallel_size=context_parallel_size)
    trainer = build_trainer(
        max_steps=3,
        max_epochs=1,
        devices=devices,
        strategy=build_strategy(strategy, devices=devices),
        accumulate_grad_batches=2,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    logged = {name: module.logged[name] for name in ("train/loss", "train/grad_norm", "train/label_tokens")}
    counted = {"tokens": module.tokens_seen, "rows": data.state_dict()["rows_consumed"]}
    return torch.cat([whole(p).flatten() for p in module.model.parameters()]), logged, counted


def main(arguments):
    results = {}
    for strategy in ("ddp", "fsdp"):
        for packing in (True, False):
            results["train", strategy, packing] = train(packing, strategy, devices=4, context_parallel_size=2)
    for size in (2, 4):
        group = build_context_group(size)
        for kind in KINDS:
            for packed in (True, False):
                for checkpointing in (True, False)[kind != "diff_v1" :]:
                    total = loss_and_gradients(kind, packed, group, checkpointing)
                    torch.distributed.all_reduce(total, group=group)
                    results[size, kind, packed, checkpointing] = total
    tensor_parallel = FSDP2Strategy(data_parallel_size=2, tensor_parallel_size=2)
    module = FinetuneModule(build_model("diff_v1"), lr=1e-3, total_steps=1, context_parallel_size=2)
    trainer = build_trainer(max_steps=1, max_epochs=1, devices=4, strategy=tensor_parallel)
    try:
        trainer.fit(module, train_dataloaders=[])
    except ValueError as error:
        results["tensor parallel"] = str(error)
    if torch.distributed.get_rank() == 0:
        torch.save(results, Path(arguments[0]) / "results.pt")
    torch.distributed.destroy_process_group()
