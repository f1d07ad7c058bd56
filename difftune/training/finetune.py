"""Supervised fine-tuning, with a loss that is exactly the mean over the label tokens of each optimiser step.

How the normalisation works. An optimiser step sees ``W`` ranks times up to ``k`` micro-batches
(``accumulate_grad_batches``), each with its own number of label tokens. The loss to minimise is the sum of
their losses over the sum of their counts, ``sum(loss_sum) / N``. Averaging the means of micro-batches, as a
trainer does by default, gives tokens in short batches more weight. Here instead:

1. ``training_step`` returns ``loss_sum / S``. ``S`` is a power of two near the size of a micro-batch, the
   same for a whole run: it keeps float16 in range, and undoing it is exact.
2. Lightning divides that by ``k``, whether the window is full or, at the end of the data, partial.
   ``backward`` seeds the gradient with ``k``, which undoes the division exactly.
3. A data-parallel strategy averages gradients over the ranks. The gradient is now that of
   ``sum(loss_sum) / (S W)``.
4. ``configure_gradient_clipping``, the hook between backward and step, averages ``loss_sum`` and the count of
   the window over the ranks (one small all-reduce) and multiplies the gradients by ``S / (N / W)``. Scaling
   and clipping are one pass over them.

``N`` counts what was really in the window, so a partial one needs no special case. The result equals one
batch holding all the rows, up to rounding in the sums.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from transformers import PreTrainedConfig

from difftune.modeling.adapters import file_key
from difftune.modeling.lambdas import WARMUP_STEP
from difftune.training.adapter_state import check_adapter
from difftune.training.context_parallel import build_context_group, require_whole_products, split_batch
from difftune.training.gradients import rescale_and_clip_
from difftune.training.loggers import MetricsLogger, is_log_step
from difftune.training.optim import (
    Schedule,
    build_optimizer,
    build_parameter_groups,
    build_schedule,
    reset_hyperparameters,
)
from difftune.training.optimizer_state import by_name, in_order, keep_own_kernels, parameter_names
from difftune.training.sharding import finish_gradients
from difftune.training.strategies import FSDP2Strategy

log = logging.getLogger(__name__)

_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
# Optimiser steps between two looks at the counters of skipped steps, where a look makes the host wait.
_LOOK_EVERY = 10


class FinetuneModule(LightningModule):
    """Trains a causal language model on batches with labels.

    The model is called as ``model(**batch, use_cache=False, z_loss=...)`` and returns ``loss_sum`` (scalar,
    nats) and ``num_label_tokens`` (scalar). It is put into train mode; what is trainable is what requires a
    gradient.

    Every optimiser step whose loss or gradient is not finite, or that has no label token at all, is skipped:
    parameters and moments stay as they are, the step counts. ``max_nonfinite_steps`` of them in a row stop
    the run. Under float16 an overflow that the gradient scaler answers by a smaller scale is part of its
    search and does not count.

    Logged every ``trainer.log_every_n_steps`` optimiser steps, at the first and at the last: ``train/loss``
    (mean of this step's label tokens over all ranks, in nats, z-loss included), ``train/grad_norm`` (before
    clipping), ``train/lr``, ``train/label_tokens`` (of this step) and ``train/skipped_steps`` (so far).

    Args:
        model: The model.
        lr: Peak learning rate.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: Of matrices; see :func:`~difftune.training.optim.build_parameter_groups`.
        lambda_lr: Peak learning rate of the lambda parameters. None: ``lr``.
        warmup_steps: Optimiser steps of linear warm-up.
        schedule: ``linear``, ``cosine`` or ``constant``.
        min_lr_ratio: Last learning rate as a share of the peak.
        total_steps: Optimiser steps over which the schedule runs. None: what the Trainer expects to do.
        z_loss: Weight of the squared log-partition in the loss.
        max_nonfinite_steps: Skipped steps in a row that stop the run, at least 1.
        adapter_config: Of the adapter inside the model, as in ``adapter_config.json``. Checkpoints then hold it, and
            of the weights those that are trained alone. None: the whole model.
        context_parallel_size: Processes that share the rows of a micro-batch, each with a part of their tokens. The
            data must give all of them the same rows.
        load_weights: Called with the model and ``device`` when the strategy has sharded it, to fill what is on the meta
            device. None: the model has its weights.

    Raises:
        ValueError: If ``max_nonfinite_steps`` is below 1; at set-up, if the Trainer's precision or clipping
            does not fit.
        RuntimeError: While training, after ``max_nonfinite_steps`` skipped steps in a row.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        lambda_lr: float | None = None,
        warmup_steps: int = 0,
        schedule: Schedule = "linear",
        min_lr_ratio: float = 0.0,
        total_steps: int | None = None,
        z_loss: float = 0.0,
        max_nonfinite_steps: int = 5,
        adapter_config: dict[str, Any] | None = None,
        context_parallel_size: int = 1,
        load_weights: Callable[..., None] | None = None,
    ) -> None:
        super().__init__()
        if max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps must be at least 1, got {max_nonfinite_steps}")
        self.model = model
        self.lr, self.betas, self.eps = lr, (betas[0], betas[1]), eps
        self.weight_decay, self.lambda_lr = weight_decay, lambda_lr
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.min_lr_ratio, self.total_steps = min_lr_ratio, total_steps
        self.z_loss, self.max_nonfinite_steps = z_loss, max_nonfinite_steps
        self.adapter_config = adapter_config
        self.context_parallel_size = context_parallel_size
        self._context_group: torch.distributed.ProcessGroup | None = None
        # The frozen base is not in the checkpoint; what is, on_load_checkpoint compares name by name.
        self.strict_loading = adapter_config is None

        self.tokens_seen = 0
        """Positions trained on so far, padding included, over all ranks (whose batches have one shape)."""
        self.label_tokens_seen = 0
        """Label tokens learned from so far, over all ranks; up to date at log steps and checkpoints."""
        self.skipped_steps = 0
        """Optimiser steps skipped so far, as of the last look."""
        self.logged: dict[str, float] = {}
        """The last value of every metric that was logged from training."""
        self.clock = 0.0
        """When the last batch ended, callbacks included (``time.perf_counter``): from then on training is on."""
        self._skipped_in_a_row = 0
        self._loss_divisor: int | None = None
        self._resumed = False
        self._load_weights = load_weights

    def configure_model(self) -> None:
        """Shard the model, where the strategy does; a second call changes nothing."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            strategy.shard(self.model)
            if self._load_weights is not None:
                self._load_weights(self.model, device=strategy.weights_device)

    def setup(self, stage: str) -> None:
        """Refuse Trainer settings that would not do what they say; put the model into train mode."""
        trainer = self.trainer
        if trainer.precision not in _PRECISIONS:
            raise ValueError(
                f"precision={trainer.precision} would round lambda and rotary frequencies to 16 bits: use "
                "bf16-mixed, or a bfloat16 model (lambda stays in float32) with precision=32-true"
            )
        if trainer.gradient_clip_val is not None and trainer.gradient_clip_algorithm == "value":
            raise ValueError("gradient_clip_algorithm=value is not supported: gradients are clipped by their norm")
        if self.context_parallel_size > 1:
            require_whole_products(trainer.strategy)
            self._context_group = build_context_group(
                self.context_parallel_size, getattr(trainer.strategy, "_timeout", None)
            )
        self.model.train()  # from_pretrained leaves it in eval mode, and Lightning keeps that
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.count_tokens = lambda: self.tokens_seen

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW in parameter groups, with a rate that changes every optimiser step."""
        groups = build_parameter_groups(
            self.model, lr=self.lr, weight_decay=self.weight_decay, lambda_lr=self.lambda_lr
        )
        # Layers that are divided over ranks lie on another mesh than the rest: fused kernels take one mesh.
        is_divided = self.num_replicas < self.trainer.world_size
        fused = self._scaler is None and not is_divided
        optimizer = build_optimizer(
            groups, betas=self.betas, eps=self.eps, fused=fused, foreach=False if is_divided else None
        )
        keep_own_kernels(optimizer)
        self._groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        total = self.trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        self._scheduler = build_schedule(
            optimizer,
            warmup_steps=self.warmup_steps,
            total_steps=total,
            schedule=self.schedule,
            min_lr_ratio=self.min_lr_ratio,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Counters on the device; hyperparameters of this run into a restored optimiser."""
        # float64 counts tokens exactly beyond 2^24; MPS has none.
        self._dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._window = torch.zeros(2, dtype=self._dtype, device=self.device)
        counters = (self.skipped_steps, self._skipped_in_a_row, self.label_tokens_seen)
        self._counters = torch.tensor(counters, dtype=torch.int64, device=self.device)
        if self._resumed:
            for change in reset_hyperparameters(self._scheduler, self._groups):
                log.warning("resumed with another setting than the checkpoint's: %s", change)
        elif self.trainer.world_size > 1:
            # Seeded alike, the ranks would drop out the same positions of different rows.
            # Those that share each layer have one batch, and must.
            torch.manual_seed(torch.initial_seed() + self._sampling("rank", 0))
        self.clock = time.perf_counter()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of a micro-batch, summed over its label tokens, over the constant ``S``.

        Args:
            batch: ``input_ids`` and ``labels`` of shape ``(B, T)``, and whatever else the model takes.
            batch_idx: Not used.
        """
        if self._loss_divisor is None:
            size = self.trainer.strategy.broadcast(batch["labels"].numel())
            self._loss_divisor = 2 ** int(math.log2(size))
        loss_sum, num_label_tokens = self.compute_loss(batch)
        self._window += torch.stack((loss_sum.detach().to(self._dtype), num_label_tokens.to(self._dtype)))
        self.tokens_seen += batch["input_ids"].numel() * (self.num_replicas // self.context_parallel_size)
        return loss_sum / self._loss_divisor

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a micro-batch: summed over its label tokens, shape ``()``, and how many they are, shape ``()``."""
        inputs = batch if self._context_group is None else split_batch(batch, self._context_group)
        output = self.model(**inputs, use_cache=False, z_loss=self.z_loss)
        return output.loss_sum, output.num_label_tokens

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate, undoing Lightning's division by ``accumulate_grad_batches`` exactly."""
        loss.backward(torch.full_like(loss, self.trainer.accumulate_grad_batches), *args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Make summed gradients those of the mean loss, clip them, and have the step skipped if need be."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self._window)
            self._window /= self.trainer.world_size
        loss_sum, labels = self._window.unbind()
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            finish_gradients(self.model, self.trainer.strategy.device_mesh)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        assert self._loss_divisor is not None
        norm = rescale_and_clip_(gradients, self._loss_divisor / labels, gradient_clip_val)
        bad = ~(norm.isfinite() & loss_sum.isfinite() & (labels > 0))
        labels = labels * self.num_replicas
        self._last_step = torch.stack((loss_sum / self._window[1], norm.to(self._dtype), labels))
        self._window = torch.zeros_like(self._window)

        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # What a gradient scaler would set: the fused kernel leaves everything as it is, and nobody waits.
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad:
            optimizer.zero_grad()
            if self._scaler is not None and loss_sum.isfinite() and labels > 0 and self._scaler.get_scale() > 1:
                return
        skipped, in_a_row, label_tokens = self._counters.unbind()
        learned = torch.where(bad, 0, labels.long())
        self._counters = torch.stack((skipped + bad, (in_a_row + 1) * bad, label_tokens + learned))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, free the gradients at once, and report."""
        optimizer.step(closure=optimizer_closure)
        # Lightning would hold them until after the next forward.
        optimizer.zero_grad()
        # global_step counts this step only when the hook has returned.
        step = self.trainer.global_step + 1
        logs = is_log_step(self.trainer, step)
        if logs or self.device.type == "cpu" or step % _LOOK_EVERY == 0:
            self._look_at_counters(step)
        if logs:
            loss, norm, labels = self._last_step.tolist()
            self.log_metrics(
                {
                    "train/loss": loss,
                    "train/grad_norm": norm,
                    "train/lr": optimizer.param_groups[0]["lr"],
                    "train/label_tokens": labels,
                    "train/skipped_steps": self.skipped_steps,
                },
                step,
            )

    def on_train_batch_end(self, *args: Any) -> None:
        """Start the clock of the next batch; Lightning calls this after the callbacks."""
        self.clock = time.perf_counter()

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Send metrics to every logger, and keep them in ``logged`` for whoever shows them.

        Args:
            metrics: Value by name, plain numbers.
            step: Optimiser steps done.
        """
        self.logged.update(metrics)
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters, and the architecture, by which the weights can be loaded without this run."""
        self._read_counters()
        names = [parameter_names(optimizer.param_groups, self) for optimizer in self.trainer.optimizers]
        checkpoint["optimizer_states"] = list(map(by_name, checkpoint["optimizer_states"], names))
        checkpoint["difftune"] = {
            "tokens_seen": self.tokens_seen,
            "label_tokens_seen": self.label_tokens_seen,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "loss_divisor": self._loss_divisor,
        }
        if self.adapter_config is not None:
            saved = self._adapter_shapes()
            checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in saved}
            checkpoint["adapter_config"] = self.adapter_config
            return
        config = getattr(self.model, "config", None)
        if isinstance(config, PreTrainedConfig):
            checkpoint["model_config"] = json.loads(config.to_json_string())
            generation = getattr(self.model, "generation_config", None)
            if generation is not None:
                checkpoint["generation_config"] = json.loads(generation.to_json_string())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters back; refuse a checkpoint of another kind of run, or of another adapter."""
        self.check_checkpoint(checkpoint)
        groups = build_parameter_groups(
            self.model, lr=self.lr, weight_decay=self.weight_decay, lambda_lr=self.lambda_lr
        )
        names = parameter_names(groups, self)
        checkpoint["optimizer_states"] = [in_order(saved, names) for saved in checkpoint["optimizer_states"]]
        state = checkpoint["difftune"]
        self.tokens_seen, self.label_tokens_seen = state["tokens_seen"], state["label_tokens_seen"]
        self.skipped_steps, self._skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self._loss_divisor = state["loss_divisor"]
        self._resumed = True
        for logger in self.trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.resume_step = checkpoint["global_step"]

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError for a checkpoint of another kind of run, or of another adapter."""
        check_adapter(checkpoint, self.adapter_config, self._adapter_shapes())

    def _adapter_shapes(self) -> dict[str, torch.Size]:
        """Shape by name, as in the state dict, of an adapter's tensors; a tied weight has both of its names."""
        trained = [(n, p) for n, p in self.named_parameters(remove_duplicate=False) if p.requires_grad]
        # How far the warm-up of its own lambda is.
        steps = [(n, b) for n, b in self.named_buffers() if n.endswith(WARMUP_STEP) and file_key(n) is not None]
        return {name: tensor.shape for name, tensor in (*trained, *steps)}

    def _read_counters(self) -> None:
        """Bring the counters from the device; this waits for it."""
        self.skipped_steps, self._skipped_in_a_row, self.label_tokens_seen = self._counters.tolist()

    def _look_at_counters(self, step: int) -> None:
        """Say which steps were skipped; stop after too many in a row."""
        before = self.skipped_steps
        self._read_counters()
        if self.skipped_steps == before:
            return
        loss, norm, labels = self._last_step.tolist()
        message = (
            f"by optimiser step {step}, {self.skipped_steps} were skipped, {self._skipped_in_a_row} of them "
            f"in a row (this step: loss {loss:g}, gradient norm {norm:g}, {labels:g} label tokens)"
        )
        if self._skipped_in_a_row >= self.max_nonfinite_steps:
            raise RuntimeError(
                f"stopped, since max_nonfinite_steps={self.max_nonfinite_steps}: {message}; lower the learning "
                "rate, or go back to an earlier checkpoint"
            )
        if self.trainer.is_global_zero:
            log.warning("%s", message)

    @property
    def num_replicas(self) -> int:
        """Ranks that have batches of their own: all of them, unless some share each layer."""
        return self._sampling("num_replicas", 1)

    def _sampling(self, key: str, alone: int) -> int:
        kwargs = self.trainer.distributed_sampler_kwargs
        return alone if kwargs is None else int(kwargs[key])

    @property
    def _scaler(self) -> Any:
        """The gradient scaler of float16, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)
