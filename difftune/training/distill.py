"""Distillation: the loss of fine-tuning, with the teacher's distribution beside the labels."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from difftune.losses import TopK, linear_divergence
from difftune.modeling.modeling import shift_labels
from difftune.training.alignment import alignment_loss, attention_outputs
from difftune.training.finetune import FinetuneModule
from difftune.training.strategies import FSDP2Strategy
from difftune.training.teachers import OnlineTeacher

STORED = ("teacher_indices", "teacher_log_probs", "teacher_log_tail")
"""Keys of a batch that hold a stored teacher: the fields of `TopK`, a row for each label token of the batch."""

Sampler = Callable[[nn.Module, dict[str, torch.Tensor], int, int, int], dict[str, torch.Tensor]]
"""From the student, a batch, its number in the run, the rank, and the ranks of a machine to a batch whose answers the
student wrote; called on all ranks."""


class DistillModule(FinetuneModule):
    """Trains a student on ``weight * divergence + (1 - weight) * cross entropy``, both a label token.

    Everything else is :class:`~difftune.training.finetune.FinetuneModule`: the exact mean over the label tokens of an
    optimiser step, skipped steps, schedules, checkpoints. The teacher is no part of the module: it is in no checkpoint.

    Logged besides, with every ``train/loss``: ``train/divergence`` and, for ``weight`` below 1,
    ``train/cross_entropy`` (z-loss included), in nats a label token. On-policy also ``train/on_policy_tokens``: how
    many of the label tokens of this step the student wrote.

    On-policy, batches are spread evenly: batch ``n`` is the student's if ``share * (n + 1)`` passes a whole number. Its
    loss is ``weight * divergence`` alone, since nobody wants it to learn its own texts by heart; the samples are taken
    as given, no gradient passes through the choice of a token (Agarwal et al., arXiv:2306.13649, section 3).

    Args:
        model: The student.
        teacher: Runs at every batch. None: batches bring what was stored of one, under the keys ``STORED``.
        divergence: A name of :data:`difftune.losses.DIVERGENCES`.
        weight: Of the divergence, above 0 and at most 1; at 1 the cross entropy is not computed.
        temperature: Divides the logits of both.
        beta: Of ``generalized_jsd``.
        align_weight: Of the match of attention outputs (:func:`~difftune.training.alignment.alignment_loss`) at the
            first step; it falls linearly to 0 over ``align_steps``. For a student that was converted from the teacher.
        align_steps: Optimiser steps of that warm-up.
        on_policy: Lets the student write the answers of a batch. None: never.
        on_policy_share: Share of the batches that are given to it, 0 to 1. ``tokens_seen`` counts the batches as the
            data bring them.
        options: Those of :class:`~difftune.training.finetune.FinetuneModule`.

    Raises:
        ValueError: If ``weight`` is out of range; while training, if a batch brings no stored teacher and none runs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: OnlineTeacher | None,
        divergence: str = "forward_kl",
        weight: float = 0.5,
        temperature: float = 1.0,
        beta: float = 0.5,
        align_weight: float = 0.0,
        align_steps: int = 0,
        on_policy: Sampler | None = None,
        on_policy_share: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if not 0 < weight <= 1:
            raise ValueError(f"weight of the divergence must be above 0 and at most 1, got {weight}")
        if align_weight and teacher is None:
            raise ValueError("attention outputs can be matched to a teacher that runs: set distill.top_k=null")
        if on_policy is not None and teacher is None:
            raise ValueError("answers of the student need a teacher that runs: set distill.top_k=null")
        self.teacher = teacher
        self.on_policy, self.on_policy_share = on_policy, on_policy_share
        self.batches_seen = 0
        """Batches of this rank so far."""
        self.align_weight, self.align_steps = align_weight, align_steps
        self.divergence, self.weight, self.temperature, self.beta = divergence, weight, temperature, beta

    def configure_model(self) -> None:
        """Shard student and teacher, where the strategy does."""
        super().configure_model()
        strategy = self.trainer.strategy
        if self.teacher is not None and isinstance(strategy, FSDP2Strategy):
            self.teacher.shard(strategy.shard, strategy.weights_device)

    def on_train_start(self) -> None:
        """The teacher to the device of the student; the sums of both parts of the loss."""
        super().on_train_start()
        if self.teacher is not None:
            self.teacher.to(self.device)
        # Summed divergence, summed cross entropy, its label tokens, and those that the student wrote.
        self._parts = self._window.new_zeros(4)

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Both parts of the loss, weighted and summed over the label tokens, and how many these are."""
        stored = [batch[name] for name in STORED if name in batch]
        batch = {name: tensor for name, tensor in batch.items() if name not in STORED}
        if self.teacher is None and len(stored) < len(STORED):
            if not bool((batch["labels"] != -100).any()):
                # The last batch of an epoch can leave a rank without rows; it has to step with the others.
                stored = [torch.zeros(0, 1, device=self.device, dtype=torch.int64)]
                stored += [torch.zeros(0, 1, device=self.device), torch.zeros(0, device=self.device)]
                return self.compute_loss({**batch, **dict(zip(STORED, stored, strict=True))})
            raise ValueError("no teacher runs, and the batch brings nothing stored of one: run difftune prepare")
        is_own = self._is_own()
        if is_own:
            assert self.on_policy is not None, "see _is_own"
            ranks = self.trainer.num_devices
            batch = self.on_policy(self.model, batch, self.batches_seen, self.global_rank, ranks)
        self.batches_seen += 1
        labels = batch["labels"]
        align_weight = self._align_weight()
        with ExitStack() as stack:
            if align_weight and self.teacher is not None:
                theirs = stack.enter_context(attention_outputs(self.teacher.model))
                mine = stack.enter_context(attention_outputs(self.model))
            targets = TopK(*stored) if self.teacher is None else self.teacher(batch)
            if self.weight == 1 or is_own:
                batch["labels"] = torch.full_like(labels, -100)
            output = self.model(**batch, use_cache=False, z_loss=self.z_loss)
        divergence, count = linear_divergence(
            output.last_hidden_state,
            self.model.get_output_embeddings().weight,  # type: ignore[operator]  # of a transformers model
            shift_labels(labels),
            targets,
            divergence=self.divergence,
            temperature=self.temperature,
            beta=self.beta,
        )
        counts = (torch.zeros_like(count), count) if is_own else (count, torch.zeros_like(count))
        self._count(divergence.detach(), output.loss_sum.detach(), *counts)
        loss = self.weight * divergence + (1 - self.weight) * output.loss_sum
        if align_weight:
            loss = loss + align_weight * alignment_loss(mine, theirs, shift_labels(labels) != -100)
        return loss, count

    def _count(self, *parts: torch.Tensor) -> None:
        """Add to the sums that are logged."""
        self._parts += torch.stack([part.to(self._dtype) for part in parts])

    def _is_own(self) -> bool:
        """Whether this batch is one whose answers the student writes; alike on all ranks."""
        if self.on_policy is None:
            return False
        return math.floor((self.batches_seen + 1) * self.on_policy_share) > math.floor(
            self.batches_seen * self.on_policy_share
        )

    def _align_weight(self) -> float:
        """Weight of the match of attention outputs at this step."""
        if not self.align_weight:
            return 0.0
        return self.align_weight * max(0.0, 1 - self.trainer.global_step / max(1, self.align_steps))

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Take the means of both parts over the optimiser step, before its window is closed."""
        sums = torch.cat((self._parts, self._window[1:]))
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        self._last_parts = torch.stack((sums[0] / sums[4], sums[1] / sums[2], sums[3]))
        self._parts = torch.zeros_like(self._parts)
        super().configure_gradient_clipping(*args, **kwargs)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Add both parts to the metrics of the training."""
        if "train/loss" in metrics:
            divergence, cross_entropy, own_tokens = self._last_parts.tolist()
            metrics = {**metrics, "train/divergence": divergence}
            # A step on the student's own texts alone has none.
            if self.weight < 1 and not math.isnan(cross_entropy):
                metrics["train/cross_entropy"] = cross_entropy
            if self.on_policy is not None:
                metrics["train/on_policy_tokens"] = own_tokens
        super().log_metrics(metrics, step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the number of batches, which says whose the next one is and seeds the samples."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["difftune"]["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take that number back; a run that was no distillation has none."""
        super().on_load_checkpoint(checkpoint)
        self.batches_seen = checkpoint["difftune"].get("batches_seen", 0)
