"""The warm-up of lambda, one step of it after each optimiser step."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from difftune.modeling.lambdas import WARMUP_STEP, warming_up


class LambdaWarmup(Callback):
    """Advances the warm-up of every lambda that has one; a model without is left alone.

    How far it is stands in the model's own buffers, so checkpoints and exports have it, and a resumed run goes on from
    there. Put it before callbacks that evaluate: they then see the weights that are saved in the same step. A skipped
    optimiser step counts, as it does for the learning rate.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here on; refuse a model in which the steps cannot be counted.

        Raises:
            ValueError: If lambda was cast to 16 bits, where counting by one ends at 256 or 2,048.
        """
        self._step = trainer.global_step
        for module in warming_up(pl_module):
            dtype = module.get_buffer(WARMUP_STEP).dtype
            if dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"lambda is {dtype}, in which the steps of its warm-up cannot be counted: keep it in float32, as "
                    "load_model(dtype=...) does"
                )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """One step further, if the optimiser stepped."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        for module in warming_up(pl_module):
            module.advance()
