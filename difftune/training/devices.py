"""Whether the devices that a recipe asks for are on this machine: said before a training starts, and by doctor."""

import os
from collections.abc import Mapping

import torch

from difftune.training.strategies import kind_of_device, named_devices

LAUNCHERS = (
    "TORCHELASTIC_RUN_ID",
    "SLURM_NTASKS",
    "MASTER_ADDR",
    "OMPI_COMM_WORLD_SIZE",
    "LSB_JOBID",
    "KUBERNETES_PORT",
)
"""Variables of what starts processes on several machines."""
_PER_CORE = 16


def device_problem(
    accelerator: str, devices: int | str | list[int] = 1, num_nodes: int = 1, environ: Mapping[str, str] = os.environ
) -> str | None:
    """Why a training could not start on these devices; None if it could.

    Devices of the CPU are processes. Where the CPU was only what `auto` came to, at most one a core is allowed: eight
    devices that were meant to be GPUs would become eight slow processes.

    Args:
        accelerator: As of the Trainer.
        devices: As of the Trainer.
        num_nodes: Machines.
        environ: Variables of the process.

    Example:
        >>> device_problem("cpu", 2) is None
        True
    """
    kind = kind_of_device(accelerator)
    remedy = "set trainer.accelerator=cpu (--device cpu), or auto"
    # The registered accelerator of Lightning cannot count what is not there.
    wanted = len(_numbers(devices)) or (int(str(devices)) if str(devices).lstrip("-").isdecimal() else 1)
    if kind == "cuda" and not torch.cuda.is_available():
        build = "torch finds none" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        number = f"{max(wanted, 1)} cuda device{'s' if wanted > 1 else ''}"
        return f"trainer.accelerator={accelerator} wants {number}, and there is no GPU here: {build}; {remedy}"
    if kind == "mps" and not torch.backends.mps.is_available():
        return f"trainer.accelerator={accelerator}: this machine has no Apple GPU that torch can use (mps); {remedy}"
    if num_nodes > 1 and not any(name in environ for name in LAUNCHERS):
        return (
            f"trainer.num_nodes={num_nodes}: the other machines would be waited for in vain; start this command on "
            f"each of them by torchrun --nnodes {num_nodes} or by Slurm (docs/how-to/scale.md), or set num_nodes=1"
        )
    wanted = named_devices(accelerator, devices)
    asked = f"trainer.devices={devices}"
    if kind == "cpu":
        return _cpu_problem(accelerator, devices, wanted, asked)
    there = torch.cuda.device_count() if kind == "cuda" else 1
    missing = [index for index in _numbers(devices) if index >= there]
    if missing or wanted > there:
        have = f"{there} {kind} device{'s are' if there > 1 else ' is'} here"
        return f"{asked}: {have}{f', numbered from 0, so no {missing[0]}' if missing else ''}; ask for fewer"
    return None


def _cpu_problem(accelerator: str, devices: int | str | list[int], wanted: int, asked: str) -> str | None:
    cores = os.cpu_count() or 1
    if isinstance(devices, list) or (isinstance(devices, str) and "," in devices):
        return f"{asked}: on the CPU a number of processes is needed, not a list of them, such as trainer.devices=2"
    if accelerator == "auto" and wanted > cores:
        return (
            f"{asked}: there is no GPU here, so trainer.accelerator=auto came to the CPU, whose devices are processes, "
            f"one a core: {cores} at most. Set trainer.devices=1, or ask for the processes by trainer.accelerator=cpu"
        )
    if wanted > _PER_CORE * cores:
        return f"{asked}: {wanted} processes on {cores} cores; at most {_PER_CORE * cores} are started on this machine"
    return None


def _numbers(devices: int | str | list[int]) -> list[int]:
    """The numbers of the devices, where they are named one by one."""
    if isinstance(devices, list):
        return devices
    if isinstance(devices, str) and "," in devices:
        return [int(part) for part in devices.split(",") if part.strip()]
    return []
