"""How several devices train together."""

import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.constants import default_pg_timeout

from difftune.training.checkpoint_sharded import ShardedCheckpoints
from difftune.training.sharding import move_unsharded, shard_model

STRATEGIES = ("auto", "ddp", "fsdp")
"""Names of strategies."""

FILL = 0.5
"""Share of a device that weights, gradients and optimiser may take with `ddp`; the rest is for activations."""


class FSDP2Strategy(ShardedCheckpoints, ModelParallelStrategy):
    """Fully sharded data parallelism by ``torch.distributed.fsdp.fully_shard``, through Lightning.

    The training module shards its model in ``configure_model``, by :meth:`shard`.

    Args:
        data_parallel_size: Ranks over which batches are split and the model is sharded.
        tensor_parallel_size: Ranks that share each layer.
        cpu_offload: As of :func:`~difftune.training.sharding.shard_model`.
        timeout: After which a rank gives up waiting for the others. None: torch's.
        sharding: Its other options.
    """

    def __init__(
        self,
        data_parallel_size: int,
        tensor_parallel_size: int = 1,
        *,
        cpu_offload: bool = False,
        timeout: timedelta | None = None,
        **sharding: Any,
    ) -> None:
        super().__init__(
            timeout=timeout or default_pg_timeout,
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            # Norms of gradients on the host are summed over the ranks there.
            process_group_backend="cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None,
        )
        self.cpu_offload, self.sharding = cpu_offload, sharding

    @property
    def weights_device(self) -> torch.device:
        """Where this rank keeps its shards."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def shard(self, model: nn.Module) -> None:
        """Shard a model over the ranks, as :func:`~difftune.training.sharding.shard_model` does."""
        shard_model(model, self.device_mesh, cpu_offload=self.cpu_offload, **self.sharding)

    def model_to_device(self) -> None:
        """Move the module to the device, but shards that stay on the host."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        move_unsharded(self.model, self.root_device)


class Choice(NamedTuple):
    """A strategy by name, and why."""

    name: str
    reason: str


def choose_strategy(devices: int, training_bytes: int, device_bytes: int) -> Choice:
    """What ``auto`` stands for.

    Args:
        devices: How many there are, over all machines.
        training_bytes: Weights, gradients and optimiser of the whole model.
        device_bytes: Memory of one device.

    Returns:
        ``auto`` for one device; ``ddp`` where ``training_bytes`` are at most half of ``device_bytes``; else ``fsdp``.

    Example:
        >>> choose_strategy(8, 48 * 2**30, 80 * 2**30).name
        'fsdp'
    """
    if devices == 1:
        return Choice("auto", "one device")
    sizes = f"{training_bytes / 2**30:.1f} GiB, {{}} half of the {device_bytes / 2**30:.1f} GiB of a device"
    fits = training_bytes <= FILL * device_bytes
    what = "weights, gradients and optimiser take " + sizes.format("no more than" if fits else "more than")
    return Choice("ddp" if fits else "fsdp", what)


def kind_of_device(accelerator: str) -> str:
    """``cuda``, ``mps`` or ``cpu``: what a Trainer with this accelerator trains on here.

    Example:
        >>> kind_of_device("cpu")
        'cpu'
    """
    if accelerator not in ("auto", "gpu"):
        return accelerator
    here = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return here if accelerator == "auto" or here != "cpu" else "cuda"


def count_devices(accelerator: str, devices: int | str | list[int], num_nodes: int = 1) -> int:
    """How many devices a Trainer with these arguments uses, over all machines.

    Args:
        accelerator: As of the Trainer.
        devices: As of the Trainer.
        num_nodes: Machines.

    Raises:
        ValueError: If torchrun started another number of processes.

    Example:
        >>> count_devices("cpu", 2, num_nodes=3)
        6
    """
    kind = AcceleratorRegistry.get(kind_of_device(accelerator))
    found = kind.parse_devices(kind.auto_device_count() if devices == "auto" else devices)
    count = (found if isinstance(found, int) else len(found or ())) * num_nodes
    started = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started is not None and int(started) != count:
        raise ValueError(
            f"torchrun started {started} processes, and trainer.devices={devices} on {num_nodes} machines makes "
            f"{count}: set trainer.devices and trainer.num_nodes to what torchrun was given"
        )
    return count


def named_devices(accelerator: str, devices: int | str | list[int], num_nodes: int = 1) -> int:
    """How many devices these arguments mean, over all machines, whether they are here or not.

    Args:
        accelerator: As of the Trainer.
        devices: As of the Trainer; `auto` is all of this machine's.
        num_nodes: Machines.

    Example:
        >>> named_devices("gpu", [0, 3], num_nodes=2), named_devices("gpu", "8")
        (4, 8)
    """
    text = str(devices)
    if isinstance(devices, list):
        count = len(devices)
    elif text in ("auto", "-1"):
        count = max(1, AcceleratorRegistry.get(kind_of_device(accelerator)).auto_device_count())
    else:
        count = int(text) if text.isdecimal() else len(text.strip(",").split(","))
    return count * num_nodes


def build_strategy(
    name: str, *, devices: int = 1, tensor_parallel_size: int = 1, timeout_s: float = 1800.0, **sharding: Any
) -> Strategy | str:
    """Turn a name into what ``Trainer(strategy=...)`` takes.

    Args:
        name: ``auto`` (one device: none; several: Lightning's choice, which is data parallel), ``ddp`` (a copy of the
            model on every device; gradients live in the communication buckets, which saves a copy of them) or
            ``fsdp`` (parameters, gradients and optimiser sharded over all devices).
        devices: How many there are, over all machines.
        tensor_parallel_size: How many of them share each layer; only of ``fsdp``.
        timeout_s: Seconds after which a rank gives up waiting for the others.
        sharding: Options of :class:`FSDP2Strategy`; the others have none.

    Returns:
        A name or a strategy object.

    Raises:
        ValueError: For any other name, or if the devices do not divide into groups.
    """
    timeout = timedelta(seconds=timeout_s)
    if name == "auto":
        return "auto"
    if name == "ddp":
        return DDPStrategy(timeout=timeout, gradient_as_bucket_view=True, broadcast_buffers=False)
    if name != "fsdp":
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    if devices % tensor_parallel_size:
        raise ValueError(
            f"{devices} devices do not divide into groups of tensor_parallel_size={tensor_parallel_size}: choose a "
            "divisor of the number of devices"
        )
    return FSDP2Strategy(devices // tensor_parallel_size, tensor_parallel_size, timeout=timeout, **sharding)
