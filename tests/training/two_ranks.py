"""Trainings on two ranks, one after the other as a worker of `ranks.py`, whose results a test reads from a folder."""

from pathlib import Path

import torch

from difftune.training.checkpoint import Checkpointing
from difftune.training.checkpoint_io import AtomicCheckpointIO, find_resumable
from difftune.training.loggers import MetricsLogger
from tests.training.toy import ToyData, build_module, build_trainer, parameters


def train(folder, **settings):
    """Go on from what is in ``folder``, to step 9; return the parameters."""
    module = build_module(**settings)
    trainer = build_trainer(
        [Checkpointing(folder / "checkpoints", every_n_steps=6)],
        max_steps=9,
        devices=2,
        strategy="ddp",
        accumulate_grad_batches=2,
        logger=MetricsLogger(folder / "metrics.jsonl"),
    )
    trainer.fit(module, ToyData(), ckpt_path=find_resumable(folder / "checkpoints"))
    return parameters(module.model)


def main(arguments):
    """Train into the folder that is given; rank 0 saves the results."""
    folder = Path(arguments[0])
    plain = train(folder / "plain", double=True)
    straight = train(folder / "dropout", dropout=0.2)
    torch.distributed.barrier()
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        AtomicCheckpointIO().remove_checkpoint(folder / "dropout/checkpoints/step-00000009")
    torch.distributed.barrier()
    resumed = train(folder / "dropout", dropout=0.2)
    torch.distributed.destroy_process_group()
    if is_first:
        torch.save({"plain": plain, "straight": straight, "resumed": resumed}, folder / "results.pt")
