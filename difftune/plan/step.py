"""The moments of a training step of one rank: what a trace of the step, shards and caches come to together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from difftune.builder.distill import loss_options
from difftune.config import Config, StageConfig
from difftune.modeling import DiffTransformerConfig
from difftune.ops import Documents
from difftune.plan.model import build_skeleton, build_teacher_skeleton, tensor_bytes
from difftune.plan.trace import LOSS_BACKWARD, TRACED_BLOCKS, Phase, trace_step
from difftune.training.distill import STORED, DistillModule
from difftune.training.finetune import FinetuneModule
from difftune.training.teachers import OnlineTeacher

PROMPT_TOKENS = 512
"""Assumed of the prompts of a task that generates answers."""
DOCUMENTS_A_ROW = 4
"""Assumed of packed rows, whose documents on the CPU are copied together by length."""


@dataclass(frozen=True)
class Machine:
    """What the run would have."""

    is_gpu: bool
    """Whether GPU kernels are counted."""
    devices: int
    """In all."""
    memory: int
    """Of one device, bytes."""
    gpu: str
    """Name, for the peak arithmetic."""
    mfu: float
    """Share of that peak that the model's own arithmetic is assumed to use."""
    strategy: str = "ddp"
    """How several devices work together: `ddp` or `fsdp`."""


@dataclass(frozen=True)
class Moment:
    """Memory of one rank at one moment of a step, bytes."""

    where: str
    """Phase of the step, or `evaluation`."""
    weights: int
    """Of this rank: the whole model or its shard; of a teacher too."""
    gathered: int
    """Weights gathered from the other ranks, and gradients on their way to them."""
    optimizer: int
    """Two moments of everything that is trained, or this rank's share."""
    gradients: int
    """Of everything that is trained, or this rank's share."""
    activations: int
    """And whatever else is computed: the logits of a chunk, gradients of activations."""
    cache: int = 0
    """Keys and values of an evaluation."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gathered + self.optimizer + self.gradients + self.activations + self.cache


class Shards(NamedTuple):
    """How a stage is spread over the devices."""

    model: int
    """Ranks that hold the model together."""
    context: int
    """Ranks that hold a row together."""


def shards(stage: StageConfig, machine: Machine) -> Shards:
    """How a stage is spread over the devices of a machine."""
    sharded = machine.devices if machine.strategy == "fsdp" else 1
    return Shards(sharded, stage.trainer.context_parallel_size)


def trained_tokens(stage: StageConfig, machine: Machine) -> int:
    """Label tokens of a micro-batch of one rank: every token but the first of each row."""
    return stage.data.micro_batch_size * (_row(stage, machine) - 1)


def _row(stage: StageConfig, machine: Machine) -> int:
    """Tokens of a row that one rank has."""
    return max(2, stage.data.seq_len // shards(stage, machine).context)


def phases(config: Config, stage: StageConfig, shape: DiffTransformerConfig, machine: Machine) -> list[Phase]:
    """The phases of a micro-batch of one rank, as if it held the whole model; traced once for the same settings.

    Args:
        config: The recipe.
        stage: Of it.
        shape: The architecture.
        machine: Whose kernels are counted.
    """
    settings = (shape.to_dict(), config.model, config.adapter, stage.data, stage.distill, stage.optim.z_loss)
    key = repr((*settings, stage.trainer.precision, stage.trainer.fsdp, shards(stage, machine), machine.is_gpu))
    if key not in _traced:
        _traced[key] = _trace(config, stage, shape, machine)
    return _traced[key]


_traced: dict[str, list[Phase]] = {}


def _trace(config: Config, stage: StageConfig, shape: DiffTransformerConfig, machine: Machine) -> list[Phase]:
    gathered_in = stage.trainer.fsdp.param_dtype
    if machine.strategy == "fsdp" and gathered_in is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=gathered_in))
    # With some blocks computed again and others not, they are not alike.
    differ = config.model.gradient_checkpointing and config.model.gradient_checkpointing_every > 1
    blocks = shape.num_hidden_layers if differ else min(TRACED_BLOCKS, shape.num_hidden_layers)
    model = build_skeleton(config, shape, blocks)
    data, distill = stage.data, stage.distill
    rows, length = data.micro_batch_size, _row(stage, machine)
    label_tokens = trained_tokens(stage, machine)
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids, "position_ids": ids}
    if data.packing:
        parts = DOCUMENTS_A_ROW
        ends = {row * length + part * length // parts for row in range(rows) for part in range(parts + 1)}
        batch["cu_seqlens"] = Documents(torch.tensor(sorted(ends), dtype=torch.int32))
    else:
        batch["attention_mask"] = ids
    module: FinetuneModule
    if distill.teacher is None:
        module = FinetuneModule(model, lr=1.0, z_loss=stage.optim.z_loss)
    else:
        module = _distilling(stage, model)
        if distill.top_k is not None:
            shapes = ((label_tokens, distill.top_k), (label_tokens, distill.top_k), (label_tokens,))
            stored = getattr(torch, distill.stored_dtype)
            for name, size, dtype in zip(STORED, shapes, (torch.int32, stored, stored), strict=True):
                batch[name] = torch.empty(size, dtype=dtype, device="meta")
    return trace_step(
        module,
        batch,
        num_blocks=shape.num_hidden_layers,
        label_tokens=label_tokens,
        autocast=None if stage.trainer.precision == "32-true" else computes_in(config, stage, machine),
        gpu=machine.is_gpu,
    )


def moments(
    config: Config, stage: StageConfig, shape: DiffTransformerConfig, machine: Machine, traced: list[Phase]
) -> list[Moment]:
    """The highest moment of the forward, the loss, the backward; the optimiser's step; every evaluation.

    Args:
        config: The recipe.
        stage: Of it.
        shape: The architecture.
        machine: The devices.
        traced: Of :func:`phases`.
    """
    # All blocks have the same parameters.
    more = max(0, shape.num_hidden_layers - TRACED_BLOCKS)
    model = build_skeleton(config, shape, shape.num_hidden_layers - more)
    how, block = shards(stage, machine), model.model.layers[0]
    whole = tensor_bytes(model) + more * tensor_bytes(block)
    trained = tensor_bytes(model, trained=True) + more * tensor_bytes(block, trained=True)
    fsdp = stage.trainer.fsdp
    held = 0 if how.model > 1 and fsdp.cpu_offload else 1
    weights = held * whole // how.model
    teacher = 0
    if stage.distill.teacher is not None and stage.distill.top_k is None:
        teacher = tensor_bytes(build_teacher_skeleton(stage.distill.teacher, stage.distill.teacher_dtype))
    optimizer, gradients = held * 2 * trained // how.model, held * trained // how.model
    accumulates = stage.trainer.accumulate_grad_batches > 1
    found: dict[str, Moment] = {}
    made = 0
    for phase in traced:
        gathered = _gathered(model, stage, phase, shape.num_hidden_layers) if how.model > 1 else 0
        # The second micro-batch adds to the gradients of the first; a shard has its share of what was made so far.
        own = trained if accumulates or (how.model > 1 and made) else made
        activations = phase.peak if accumulates else max(phase.peak, phase.peak_with_gradients)
        activations += _gathered_keys(config, stage, shape, machine, phase)
        moment = Moment(str(phase), weights + teacher, gathered, optimizer, held * own // how.model, activations)
        name = phase.name.split(" of ")[0]
        best = found.get(name)
        if best is None or moment.total > best.total:
            found[name] = moment
        made += phase.gradients
    # Without the fused kernel, which a gradient scaler cannot use, a copy of the moments is made.
    scratch = trained // how.model if stage.trainer.precision == "16-mixed" else 0
    step = Moment("optimiser step", weights + teacher, 0, optimizer, gradients, scratch)
    # An evaluation gathers the weights once, for every rank to generate by itself.
    replica = _size(model, fsdp.param_dtype) + more * _size(block, fsdp.param_dtype) if how.model > 1 else 0
    evaluations = [
        Moment(
            f"evaluation {name}",
            weights + teacher,
            replica,
            optimizer,
            0,
            0,
            cache,
        )
        for name, cache in evaluation_caches(config, stage, shape, machine).items()
    ]
    return [*found.values(), step, *evaluations]


def _gathered(model: Any, stage: StageConfig, phase: Phase, num_blocks: int) -> int:
    """What a rank holds of others' shards: the root, the block that runs and the one fetched ahead; gradients sent."""
    fsdp, blocks = stage.trainer.fsdp, model.model.layers
    root = _size(model.lm_head, fsdp.param_dtype) + _size(model.model.norm, fsdp.param_dtype)
    if (
        phase.block is None
        and phase.name in ("forward", "backward")
        and model.lm_head.weight is not model.model.embed_tokens.weight
    ):
        root += _size(model.model.embed_tokens, fsdp.param_dtype)
    held = min(2, num_blocks) if fsdp.reshard_after_forward else num_blocks
    sent = 0
    if phase.name == "backward":
        sent = _size(blocks[0], fsdp.reduce_dtype or "float32", trained=True)
    return root + held * _size(blocks[0], fsdp.param_dtype) + sent


def _size(module: torch.nn.Module, dtype: str | None, *, trained: bool = False) -> int:
    """Bytes of a module's parameters in a dtype; None is their own."""
    if dtype is None:
        return tensor_bytes(module, trained=trained)
    width = getattr(torch, dtype).itemsize
    return sum(width * p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _gathered_keys(
    config: Config, stage: StageConfig, shape: DiffTransformerConfig, machine: Machine, phase: Phase
) -> int:
    """Keys and values of other ranks' tokens: of every block until its backward, or of one that is computed again."""
    how = shards(stage, machine)
    if how.context == 1:
        return 0
    itemsize = computes_in(config, stage, machine).itemsize
    others = stage.data.micro_batch_size * (stage.data.seq_len - stage.data.seq_len // how.context)
    one = others * cache_width(shape) * itemsize
    if config.model.gradient_checkpointing:
        return one if phase.block is not None else 0
    before = phase.name == "forward" and phase.block is None
    at = (
        shape.num_hidden_layers
        if phase.name in ("loss", LOSS_BACKWARD)
        else 0
        if phase.block is None or before
        else phase.block + 1
    )
    return one * at


def computes_in(config: Config, stage: StageConfig, machine: Machine) -> torch.dtype:
    """The dtype of products and of what they leave: that of mixed precision, of gathered weights, or of the model."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    gathered = stage.trainer.fsdp.param_dtype if machine.strategy == "fsdp" else None
    return mixed.get(stage.trainer.precision, getattr(torch, gathered or config.model.dtype))


def cache_width(shape: DiffTransformerConfig) -> int:
    """Numbers that the cache of one layer holds of a token: keys and values."""
    assert shape.head_dim is not None and shape.num_key_value_heads is not None
    return shape.num_key_value_heads * shape.head_dim + shape.num_kv_groups * shape.value_head_dim


def evaluation_caches(
    config: Config, stage: StageConfig, shape: DiffTransformerConfig, machine: Machine
) -> dict[str, int]:
    """Bytes of keys and values that each task of a stage holds at once, one layer twice while it grows."""
    settings, found = stage.evaluation, {}
    # Evaluations during training run in its precision.
    itemsize = computes_in(config, stage, machine).itemsize
    for task in settings.tasks:
        keys = vars(task)
        rows = keys.get("batch_size") or settings.batch_size * max(1, settings.num_samples)
        answer = keys.get("max_new_tokens") or settings.max_new_tokens
        if "lengths" in keys:
            length = max(task.lengths) + answer  # type: ignore[attr-defined]  # of those kinds that have it
        elif "max_tokens" in keys or "length" in keys:
            length, rows = keys.get("max_tokens") or keys["length"], 1
        else:
            length = PROMPT_TOKENS + answer
        if "max_batch_tokens" in keys:
            rows = max(1, min(rows, keys["max_batch_tokens"] // length))
        found[task.task_name()] = rows * length * cache_width(shape) * itemsize * (shape.num_hidden_layers + 1)
    return found


class _SkeletonTeacher(OnlineTeacher):
    """A teacher without weights, of which nothing can be asked."""

    def _probe(self, device: torch.device) -> None:
        """Has no values to compare."""


class _SkeletonDistillation(DistillModule):
    """The module without a Trainer, at its first step."""

    def _count(self, *parts: torch.Tensor) -> None:
        """Nobody reads the sums."""

    def _align_weight(self) -> float:
        return self.align_weight


def _distilling(stage: StageConfig, model: Any) -> DistillModule:
    distill = stage.distill
    teacher = None
    if distill.top_k is None:
        assert distill.teacher is not None, "checked by the caller"
        skeleton = build_teacher_skeleton(distill.teacher, distill.teacher_dtype)
        teacher = _SkeletonTeacher(skeleton, vocab_size=model.config.vocab_size)
    return _SkeletonDistillation(
        model,
        teacher=teacher,
        **loss_options(distill),
        lr=1.0,
        z_loss=stage.optim.z_loss,
    )
