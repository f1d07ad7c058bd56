"""Trainings on two ranks, one after the other in one program, whose results a test reads from a folder."""

import os
import socket
import sys
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


def main(folder):
    """Become two ranks by forking, which pays for the imports once, as torchrun would set them up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    child = os.fork()
    rank = "1" if child == 0 else "0"
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    plain = train(folder / "plain", double=True)
    straight = train(folder / "dropout", dropout=0.2)
    torch.distributed.barrier()
    if rank == "0":
        AtomicCheckpointIO().remove_checkpoint(folder / "dropout/checkpoints/step-00000009")
    torch.distributed.barrier()
    resumed = train(folder / "dropout", dropout=0.2)
    torch.distributed.destroy_process_group()
    if rank == "0":
        assert os.waitpid(child, 0)[1] == 0, "rank 1 failed"
        torch.save({"plain": plain, "straight": straight, "resumed": resumed}, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
