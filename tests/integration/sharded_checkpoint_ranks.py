"""Commands of difftune, one after the other, on several ranks; a worker of `ranks.py`."""

import json
import os
import shutil
import signal
from pathlib import Path

import torch

from difftune import cli
from difftune.commands import run  # noqa: F401 - the imports of a run, paid once for all ranks
from difftune.training.finetune import FinetuneModule


def signal_second_rank_in_a_step(number):
    """From now on the second optimiser step of a training signals the last rank, in the middle of it."""
    step = FinetuneModule.training_step

    def signalled(module, batch, batch_idx):
        if module.trainer.global_step == 1 and module.trainer.global_rank == module.trainer.world_size - 1:
            os.kill(os.getpid(), number)
        return step(module, batch, batch_idx)

    FinetuneModule.training_step = signalled


def forget_last_stage(words):
    """Leave a run as it is when its first stage has just ended."""
    (run_dir,) = (Path(word.removeprefix("run_dir=")) for word in words if word.startswith("run_dir="))
    if os.environ["RANK"] == "0":
        shutil.rmtree(run_dir / "checkpoints" / "traces")
    torch.distributed.barrier()


def main(arguments):
    """``FILE``: JSON, a list of ``[name, words of the command line]``; the exit codes go into a file a rank."""
    path = Path(arguments[0])
    codes = {}
    for name, words in json.loads(path.read_text()):
        if name.startswith("signalled"):
            signal_second_rank_in_a_step(signal.SIGUSR1)
        if name.startswith("again"):
            forget_last_stage(words)
        codes[name] = cli.main(words)
        path.with_name(f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes))
