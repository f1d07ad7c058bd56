"""Checks of what several devices can do with the rest of a recipe."""

from difftune.config.fsdp import FsdpConfig
from difftune.config.recipe import Config, StageConfig

MAX_DEVICES = 100_000
"""Of one machine; what it really has is looked at before a training starts."""


def scale_problems(config: Config) -> list[str]:
    """Everything of a config that does not go with its strategies, as `key: what, and what to do`."""
    stages = config.resolved_stages()
    problems = []
    if config.model.gradient_checkpointing_every > 1 and not config.model.gradient_checkpointing:
        problems.append("model.gradient_checkpointing_every: does nothing alone; set model.gradient_checkpointing=true")
    settings = {(stage.trainer.strategy, _plain(stage)) for stage in stages}
    if len(settings) > 1 and any(stage.trainer.strategy == "fsdp" for stage in stages):
        problems.append("trainer.strategy: a model is sharded once a run; set strategy and fsdp at the top level")
    for stage in stages:
        if (problem := devices_problem(stage.trainer.devices)) is not None and problem not in problems:
            problems.append(problem)
        problems += [text for text in _stage_problems(stage) if text not in problems]
        if stage.trainer.strategy == "fsdp":
            problems += [text for text in fsdp_problems(config) if text not in problems]
    return problems


def devices_problem(devices: int | str | list[int]) -> str | None:
    """What is wrong with `trainer.devices`, whatever this machine has; None if nothing is.

    Example:
        >>> devices_problem("0,1") is None, devices_problem(0)
        (True, 'trainer.devices: 0 trains on nothing; set a number from 1 on, or auto for all')
    """
    what = f"trainer.devices: {str(devices)[:80] if isinstance(devices, list) else repr(devices)[:80]}"
    if isinstance(devices, str):
        if devices == "auto":
            return None
        parts = [part.strip() for part in devices.removesuffix(",").split(",")]
        if devices.strip() != "-1" and not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            return f"{what} is neither a number, nor numbers with commas between, such as 0,1, nor auto"
        devices = int(devices) if "," not in devices else [int(part) for part in parts]
    if isinstance(devices, list):
        if not devices or min(devices) < 0:
            return f"{what} names no devices; list their numbers, counted from 0, as in [0, 1]"
        return f"{what} names a device twice; list each once" if len(set(devices)) < len(devices) else None
    if devices == -1 or 1 <= devices <= MAX_DEVICES:
        return None
    if devices > MAX_DEVICES:
        return f"{what} are more than a machine has; set at most {MAX_DEVICES}"
    return f"{what} trains on nothing; set a number from 1 on, or auto for all"


def fsdp_problems(config: Config) -> list[str]:
    """What keeps a config from being trained with the strategy `fsdp`."""
    problems = []
    if config.model.quantization is not None:
        problems.append(
            f"model.quantization: {config.model.quantization} weights cannot be sharded; leave it out, or set "
            "trainer.strategy=ddp"
        )
    if config.adapter is not None and config.adapter.use_dora:
        problems.append(
            "adapter.use_dora: needs the length of every row of the model to begin with, which fsdp shards; set "
            "use_dora=false, or trainer.strategy=ddp"
        )
    if config.adapter is not None and any(s.trainer.fsdp.tensor_parallel_size > 1 for s in config.resolved_stages()):
        problems.append(
            "trainer.fsdp.tensor_parallel_size: divides whole projections, and adapter puts LoRA beside them; set 1, "
            "with which fsdp shards the model as finely, or leave out adapter"
        )
    return problems


def _stage_problems(stage: StageConfig) -> list[str]:
    trainer, fsdp = stage.trainer, stage.trainer.fsdp
    problems = []
    if trainer.strategy != "fsdp":
        if fsdp.tensor_parallel_size > 1:
            problems.append("trainer.fsdp.tensor_parallel_size: is for trainer.strategy=fsdp; set that, or 1")
        elif fsdp != FsdpConfig() and trainer.strategy == "ddp":
            problems.append("trainer.fsdp: does nothing with trainer.strategy=ddp; set fsdp or auto, or leave it out")
        return problems
    if trainer.accelerator == "mps":
        problems.append("trainer.strategy: fsdp runs on CUDA and the CPU, not on mps; leave it out")
    if trainer.precision == "16-mixed":
        problems.append("trainer.precision: fsdp has no gradient scaler; set bf16-mixed, or trainer.fsdp.param_dtype")
    if trainer.precision == "bf16-mixed" and fsdp.param_dtype is not None:
        problems.append(
            f"trainer.fsdp.param_dtype: {fsdp.param_dtype} and precision=bf16-mixed say the same twice; "
            "set precision=32-true"
        )
    if fsdp.cpu_offload and trainer.accelerator == "cpu":
        problems.append("trainer.fsdp.cpu_offload: the model is in the memory of the host already; leave it out")
    return problems


def _plain(stage: StageConfig) -> str:
    """What has to be the same in every stage, comparable."""
    trainer = stage.trainer
    return repr((trainer.fsdp, trainer.accelerator, trainer.devices, trainer.num_nodes))
