"""What `difftune plan` says: whether a run fits, what holds the memory, how long it takes, and what to change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from difftune.builder.scale import training_bytes
from difftune.config import AdapterConfig, Config, StageConfig
from difftune.data.forecast import Forecast
from difftune.environment import total_memory_bytes
from difftune.modeling import DiffTransformerConfig, count_parameters
from difftune.ops.linear_cross_entropy import CHUNK_ELEMENTS
from difftune.plan.model import architecture, build_skeleton
from difftune.plan.step import (
    DOCUMENTS_A_ROW,
    PROMPT_TOKENS,
    Machine,
    Moment,
    computes_in,
    moments,
    phases,
    shards,
    trained_tokens,
)
from difftune.plan.trace import fused_kernels_cover, kept_a_block
from difftune.training.flops import PEAKS, ModelFlops
from difftune.training.strategies import choose_strategy

GIB = 2**30
RESERVE = 2 * GIB
"""What a GPU loses to the CUDA context, to NCCL and to gaps between blocks of memory: assumed, not measured."""


@dataclass(frozen=True)
class Suggestion:
    """A change, and what it brings."""

    change: str
    """As overrides of the command line."""
    saves: int
    """Bytes of the peak."""
    peak: int
    """Bytes, with the change."""
    cost: str
    """What it costs."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs of one rank, bytes."""

    stage: str
    machine: Machine
    available: int
    """Memory for the run on one device."""
    parameters: dict[str, int]
    """Counts: total, trainable, lambda."""
    moments: list[Moment]
    """The highest of each kind of phase, the optimiser's step, and the evaluation."""
    kept_a_block: int
    """Activations that a block keeps for its backward, as the recipe says."""
    kept_without_checkpointing: int
    """The same if nothing is computed again."""
    kept_with_checkpointing: int
    """The same if every block is computed again."""
    logits: int
    """Logits and their gradient held at once, of a chunk of tokens."""
    all_logits: int
    """What the logits of all tokens would take in float32; they are never held."""
    flops_per_token: float
    """Forward and backward, in documents as long as a row."""
    tokens_a_step: int
    hours: float | None
    """Of training, at the stated share of the peak; None without `trainer.max_steps`, or on a CPU."""
    assumptions: list[str]
    suggestions: list[Suggestion]
    """Made where it does not fit."""

    @property
    def peak(self) -> Moment:
        """The highest moment."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def step_flops(self) -> float:
        """Of an optimiser step, all devices."""
        return self.flops_per_token * self.tokens_a_step

    @property
    def tokens_per_hour(self) -> float:
        """Of all devices at the stated share of the peak."""
        machine = self.machine
        return 3600 * machine.devices * machine.mfu * PEAKS[machine.gpu] / self.flops_per_token

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory."""
        return self.peak.total <= self.available


def plan_stages(
    config: Config,
    *,
    gpus: int | None = None,
    gpu_memory_gib: float | None = None,
    gpu: str = "H100",
    mfu: float = 0.4,
) -> list[StagePlan]:
    """Plan every stage of a recipe.

    Args:
        config: The recipe. With `trainer.accelerator: cpu` the CPU is planned for, otherwise GPUs.
        gpus: How many; None: `trainer.devices` times `trainer.num_nodes`, or 1.
        gpu_memory_gib: Of one; None: 80, or of the CPU's machine.
        gpu: A name that `difftune.training.flops` knows, for the hours.
        mfu: Share of its peak.

    Raises:
        ValueError: If an argument is out of range, or the model cannot be described without its weights.
    """
    if gpu not in PEAKS:
        raise ValueError(f"--gpu {gpu} is unknown: choose one of {', '.join(PEAKS)}")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu must be above 0 and at most 1, got {mfu:g}")
    shape = architecture(config)
    plans = []
    for stage in config.resolved_stages():
        is_gpu = stage.trainer.accelerator != "cpu"
        devices = stage.trainer.devices
        listed = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
        memory = gpu_memory_gib * GIB if gpu_memory_gib else 80 * GIB if is_gpu else total_memory_bytes()
        count = gpus or listed * stage.trainer.num_nodes
        strategy = stage.trainer.strategy
        if strategy == "auto":
            quantized = config.model.quantization is not None
            strategy = "ddp" if quantized else choose_strategy(count, training_bytes(config, shape), int(memory)).name
        plans.append(_plan(config, stage, shape, Machine(is_gpu, count, int(memory), gpu, mfu, strategy)))
    return plans


def _plan(config: Config, stage: StageConfig, shape: DiffTransformerConfig, machine: Machine) -> StagePlan:
    checkpoints = config.model.gradient_checkpointing
    traced = phases(config, stage, shape, machine)
    found = moments(config, stage, shape, machine, traced)
    kept = {checkpoints: kept_a_block(traced)}
    other = _changed(config, lambda c: setattr(c.model, "gradient_checkpointing", not checkpoints))
    kept[not checkpoints] = kept_a_block(phases(other, stage, shape, machine))
    # Weights in 4 bits take part in products as any others do.
    plain = build_skeleton(_changed(config, lambda c: setattr(c.model, "quantization", None)), shape)
    trainer = stage.trainer
    tokens = stage.data.micro_batch_size * stage.data.seq_len
    tokens_a_step = tokens * trainer.accumulate_grad_batches * machine.devices // shards(stage, machine).context
    flops = ModelFlops.of_model(plain).of_training(1, 1, stage.data.seq_len / 2)
    forecast = Forecast(
        tokens_an_epoch=0,
        label_tokens_an_epoch=0,
        steps=trainer.max_steps if trainer.max_steps > 0 else None,
        tokens_a_step=tokens_a_step,
        tokens_per_s=machine.mfu * PEAKS[machine.gpu] / flops if machine.is_gpu else None,
        devices=machine.devices,
    )
    rows = min(trained_tokens(stage, machine), max(1, CHUNK_ELEMENTS // shape.vocab_size))
    available = machine.memory - (RESERVE if machine.is_gpu else 0)
    peak = max(moment.total for moment in found)
    return StagePlan(
        stage=stage.name,
        machine=machine,
        available=available,
        parameters=count_parameters(plain),
        moments=found,
        kept_a_block=kept[checkpoints],
        kept_without_checkpointing=kept[False],
        kept_with_checkpointing=kept[True],
        logits=4 * rows * shape.vocab_size,
        all_logits=4 * tokens * shape.vocab_size,
        flops_per_token=flops,
        tokens_a_step=tokens_a_step,
        hours=forecast.hours,
        assumptions=_assumptions(config, stage, shape, machine),
        suggestions=_suggestions(config, stage, shape, machine, peak) if peak > available else [],
    )


def _changed(config: Config, change: Callable[[Config], None]) -> Config:
    changed = copy.deepcopy(config)
    change(changed)
    return changed


def _suggestions(
    config: Config, stage: StageConfig, shape: DiffTransformerConfig, machine: Machine, peak: int
) -> list[Suggestion]:
    """Changes that lower the peak, the largest saving first."""
    found = []
    for change, cost, overrides in _candidates(config, stage, machine):
        other, other_stage, other_machine = copy.deepcopy(config), copy.deepcopy(stage), machine
        if overrides.get("trainer.strategy") == "fsdp":
            other_machine = replace(machine, strategy="fsdp")
        for key, value in overrides.items():
            section, _, name = key.partition(".")
            if key == "adapter":
                other.adapter = value
            elif section == "model":
                setattr(other.model, name, value)
            else:
                setattr(getattr(other_stage, section), name, value)
        traced = phases(other, other_stage, shape, other_machine)
        total = max(m.total for m in moments(other, other_stage, shape, other_machine, traced))
        if total < peak:
            found.append(Suggestion(change, peak - total, total, cost))
    return sorted(found, key=lambda suggestion: suggestion.peak)


def _candidates(config: Config, stage: StageConfig, machine: Machine) -> list[tuple[str, str, dict[str, Any]]]:
    """What can be changed: as overrides for people, its cost, and the keys."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    model, data, trainer = config.model, stage.data, stage.trainer
    if not model.gradient_checkpointing:
        found.append(
            ("model.gradient_checkpointing=true", "a forward more", {"model.gradient_checkpointing": True}),
        )
    rows = stage.evaluation.batch_size
    if rows > 1 and stage.evaluation.tasks:
        found.append((f"evaluation.batch_size={rows // 2}", "slower answers", {"evaluation.batch_size": rows // 2}))
    if data.micro_batch_size > 1:
        half, steps = data.micro_batch_size // 2, trainer.accumulate_grad_batches * 2
        found.append(
            (
                f"data.micro_batch_size={half} trainer.accumulate_grad_batches={steps}",
                "smaller products, the same step",
                {"data.micro_batch_size": half, "trainer.accumulate_grad_batches": steps},
            )
        )
    if model.dtype == "float32" and machine.is_gpu:
        found.append(
            (
                "model.dtype=bfloat16 trainer.precision=32-true",
                "weights and moments of 8 bits of precision" if config.adapter is None else "a rounded base",
                {"model.dtype": "bfloat16", "trainer.precision": "32-true"},
            )
        )
    if config.adapter is None:
        found.append(
            ("adapter.preset=attention", "an adapter instead of the whole model", {"adapter": AdapterConfig()})
        )
    elif model.quantization is None and machine.strategy != "fsdp":
        found.append(
            ("model.quantization=nf4", "a base in 4 bits, dequantised for each product", {"model.quantization": "nf4"})
        )
    if machine.devices > 1 and machine.strategy != "fsdp" and model.quantization is None:
        found.append(("trainer.strategy=fsdp", "weights are gathered block by block", {"trainer.strategy": "fsdp"}))
    if data.seq_len > 2048:
        found.append((f"data.seq_len={data.seq_len // 2}", "other data", {"data.seq_len": data.seq_len // 2}))
    return found


def _assumptions(config: Config, stage: StageConfig, shape: DiffTransformerConfig, machine: Machine) -> list[str]:
    found = []
    if machine.is_gpu:
        half = computes_in(config, stage, machine) != torch.float32
        if shape.attention != "softmax" and fused_kernels_cover(half, shape.head_dim or 0, shape.value_head_dim):
            found.append("attention by the fused Triton kernels: compute capability 8.0 or 9.0")
        else:
            found.append("attention keeps q, k, v, its output and one number a query, as flash-attn and torch's do")
        found.append(f"{RESERVE / GIB:.0f} GiB of a GPU are lost to CUDA, NCCL and gaps between blocks of memory")
    else:
        found.append("memory of tensors alone: interpreter, libraries and the allocator's gaps come on top")
        if stage.data.packing:
            found.append(f"{DOCUMENTS_A_ROW} documents of one length in a packed row")
    found.append("every token is learned; documents are as long as a row in the arithmetic")
    if any(not hasattr(task, "lengths") for task in stage.evaluation.tasks):
        found.append(f"prompts of evaluations have {PROMPT_TOKENS} tokens where the task does not say")
    if machine.strategy == "fsdp":
        found.append("sharded memory was added up, not traced: two gathered blocks at once, gradients sent in one copy")
        if stage.trainer.fsdp.tensor_parallel_size > 1:
            found.append("activations under tensor parallelism are counted whole: less than that is needed")
    return found
