"""One of two ranks that train while the second is told to stop at step 4, in the middle of an evaluation."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import nn

from difftune.evaluation.callback import ScheduledEvaluation
from tests.evaluation.test_callback import TOKENIZER, FakeTask, Training, fit, steps


class OneWeight(Training):
    """Stops after step 4."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(torch.ones(1, 1)).sum()

    def on_train_batch_end(self, *unused: object) -> None:
        self.trainer.should_stop = self.trainer.global_step >= 4


def main(arguments: list[str]) -> None:
    """Train, and write what this rank saw to ``rank-N.json`` in the folder that is named."""
    folder = Path(arguments[0])
    module = OneWeight(nn.Linear(1, 1))

    def should_stop() -> bool:
        trainer: Trainer = module.trainer
        return trainer.global_rank == 1 and trainer.global_step >= 4

    evaluation = ScheduledEvaluation(
        [FakeTask(size=5)], TOKENIZER, every_n_steps=2, samples_dir=folder / "samples", should_stop=should_stop
    )
    fit(evaluation, folder, module, devices=2, strategy="ddp")
    report = {"steps": steps(module), "stopped": module.trainer.should_stop, "results": list(evaluation.results)}
    (folder / f"rank-{module.global_rank}.json").write_text(json.dumps(report))
