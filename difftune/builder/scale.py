"""From a config to how its devices work together: the strategy, and a model that no process ever holds whole."""

import dataclasses
import logging
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.strategies import Strategy

from difftune.checkpoints.sharded import FreshWeights, StoredWeights, load_skeleton
from difftune.config import Config, StageConfig
from difftune.config.checks_scale import fsdp_problems
from difftune.environment import total_memory_bytes
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.training.devices import device_problem
from difftune.training.strategies import build_strategy, choose_strategy, count_devices, kind_of_device
from difftune.training.tensor_parallel import check_tensor_parallel

log = logging.getLogger(__name__)

# Weights, gradients and two moments of AdamW, all in the dtype of the weights.
_COPIES = 4


def settle_strategies(config: Config, architecture: DiffTransformerConfig) -> Config:
    """Decide what `trainer.strategy: auto` is in every stage, and say why.

    Args:
        config: The recipe.
        architecture: Of its model.

    Returns:
        The recipe with stages, none of which has several devices and `auto`.

    Raises:
        ValueError: If the model has to be sharded and something else in the recipe forbids it; if torchrun started
            another number of processes than the recipe has devices; if devices are not here.
    """
    stages = config.resolved_stages()
    asked = {stage.trainer.strategy for stage in stages}
    for trainer in (stage.trainer for stage in stages):
        if (problem := device_problem(trainer.accelerator, trainer.devices, trainer.num_nodes)) is not None:
            raise ValueError(problem)
    if any(stage.trainer.accelerator == "auto" for stage in stages) and kind_of_device("auto") == "cpu":
        log.info("accelerator auto: there is no GPU here, the CPU is used")
    for stage in stages:
        # What it refuses, it refuses before anything is read.
        build_stage_strategy(stage)
        check_tensor_parallel(architecture, stage.trainer.fsdp.tensor_parallel_size)
    # One for the run: a later stage goes on with the model as the first one sharded it.
    settled = "fsdp" if "fsdp" in asked else None
    if settled is None and "auto" in asked:
        settled = _settle(config, stages[0], architecture)
    resolved = [
        dataclasses.replace(
            stage, trainer=dataclasses.replace(stage.trainer, strategy=_of_stage(stage.trainer.strategy, settled))
        )
        for stage in stages
    ]
    config = dataclasses.replace(config, stages=resolved)
    if not is_sharded(config):
        _require_memory(config, architecture)
    return config


def is_sharded(config: Config) -> bool:
    """Whether a settled recipe trains a sharded model."""
    return any(stage.trainer.strategy == "fsdp" for stage in config.resolved_stages())


def build_stage_strategy(stage: StageConfig) -> Strategy | str:
    """The strategy of a stage, for its Trainer."""
    trainer, fsdp = stage.trainer, stage.trainer.fsdp
    if trainer.strategy != "fsdp":
        return build_strategy(trainer.strategy, timeout_s=trainer.timeout_s)
    return build_strategy(
        "fsdp",
        timeout_s=trainer.timeout_s,
        devices=count_devices(trainer.accelerator, trainer.devices, trainer.num_nodes),
        tensor_parallel_size=fsdp.tensor_parallel_size,
        reshard_after_forward=fsdp.reshard_after_forward,
        cpu_offload=fsdp.cpu_offload,
        param_dtype=None if fsdp.param_dtype is None else getattr(torch, fsdp.param_dtype),
        reduce_dtype=getattr(torch, fsdp.reduce_dtype or "float32"),
    )


def build_stored_skeleton(path: str | Path, dtype: torch.dtype, attention_backend: str) -> DiffTransformerForCausalLM:
    """A model on the meta device whose attribute `weights_on_disk` fills it when it has been sharded."""
    model, weights = load_skeleton(path, dtype=dtype, attention_backend=attention_backend)
    return _with_weights(model, weights)


def build_fresh_skeleton(
    architecture: DiffTransformerConfig, dtype: torch.dtype, seed: int
) -> DiffTransformerForCausalLM:
    """As `build_stored_skeleton`, of a fresh model: the values are those that one process begins with."""
    with torch.device("meta"):
        model = DiffTransformerForCausalLM(architecture)
    cast_weights(model, dtype)
    return _with_weights(model, FreshWeights(partial(DiffTransformerForCausalLM, architecture), seed))


def _with_weights(
    model: DiffTransformerForCausalLM, weights: StoredWeights | FreshWeights
) -> DiffTransformerForCausalLM:
    # What a model is made of stays with it: adapters compare their base with it, in later stages too.
    object.__setattr__(model, "weights_on_disk", weights)
    return model


def _settle(config: Config, stage: StageConfig, architecture: DiffTransformerConfig) -> str:
    trainer = stage.trainer
    devices = count_devices(trainer.accelerator, trainer.devices, trainer.num_nodes)
    if config.model.quantization is not None and devices > 1:
        log.info("strategy ddp on %d devices: 4-bit weights are not sharded", devices)
        return "ddp"
    size = training_bytes(config, architecture)
    choice = choose_strategy(devices, size, _memory_of_device(trainer.accelerator, devices // trainer.num_nodes))
    if devices > 1:
        log.info("strategy %s on %d devices: %s", choice.name, devices, choice.reason)
    problems = fsdp_problems(config) if choice.name == "fsdp" else []
    if problems:
        raise ValueError("\n  ".join([f"strategy fsdp, for {choice.reason}:", *problems]))
    return choice.name


def _require_memory(config: Config, architecture: DiffTransformerConfig) -> None:
    """Refuse a model that one process holds whole, and whose weights alone are more than this machine has."""
    count = num_parameters(architecture)
    needed, there = count * getattr(torch, config.model.dtype).itemsize, total_memory_bytes()
    if needed > there:
        raise ValueError(
            f"model: its {count:,} parameters in {config.model.dtype} take {needed / 2**30:,.0f} GiB, and this machine "
            f"has {there / 2**30:,.0f} GiB of memory: make it smaller (model.hidden_size, num_hidden_layers, "
            "intermediate_size, vocab_size), or shard it over several machines with trainer.strategy=fsdp"
        )


def training_bytes(config: Config, architecture: DiffTransformerConfig) -> int:
    """Weights, gradients and optimiser of a model that is not sharded; beside an adapter, the frozen weights alone."""
    copies = 1 if config.adapter is not None else _COPIES
    return copies * num_parameters(architecture) * getattr(torch, config.model.dtype).itemsize


def num_parameters(architecture: DiffTransformerConfig) -> int:
    """How many parameters a model has, a shared one counted once; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiffTransformerForCausalLM(architecture).parameters())


def _of_stage(asked: str, settled: str | None) -> str:
    return settled if settled is not None and (asked == "auto" or settled == "fsdp") else asked


def _memory_of_device(accelerator: str, processes: int) -> int:
    """Bytes that one of several processes of this machine has for its model."""
    if kind_of_device(accelerator) == "cuda" and torch.cuda.is_available():
        # Asking how much is free would leave a context of every process on the first device.
        return int(torch.cuda.get_device_properties(0).total_memory)
    return total_memory_bytes() // max(1, processes)
