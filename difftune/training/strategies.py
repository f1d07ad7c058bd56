"""How several devices train together."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from difftune.training.sharding import shard_model

STRATEGIES = ("auto", "ddp", "fsdp")
"""Names of strategies."""


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism by ``torch.distributed.fsdp.fully_shard``, through Lightning.

    The training module shards its model in ``configure_model``, by :meth:`shard`.

    Args:
        data_parallel_size: Ranks over which batches are split and the model is sharded.
        tensor_parallel_size: Ranks that share each matrix product.
        sharding: Options of :func:`~difftune.training.sharding.shard_model`.
    """

    def __init__(self, data_parallel_size: int, tensor_parallel_size: int = 1, **sharding: Any) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=False,
        )
        self.sharding = sharding

    def shard(self, model: nn.Module) -> list[nn.Parameter]:
        """Shard a model over the ranks, as :func:`~difftune.training.sharding.shard_model` does."""
        return shard_model(model, self.device_mesh["data_parallel"], **self.sharding)


def build_strategy(name: str, *, devices: int = 1, **sharding: Any) -> Strategy | str:
    """Turn a name into what ``Trainer(strategy=...)`` takes.

    Args:
        name: ``auto`` (one device: none; several: Lightning's choice, which is data parallel), ``ddp`` (a copy of the
            model on every device; gradients live in the communication buckets, which saves a copy of them) or
            ``fsdp`` (parameters, gradients and optimiser sharded over all devices).
        devices: How many there are, over all machines.
        sharding: Options of :class:`FSDP2Strategy`; the others have none.

    Returns:
        A name or a strategy object.

    Raises:
        ValueError: For any other name.
    """
    if name == "auto":
        return "auto"
    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    if name == "fsdp":
        return FSDP2Strategy(data_parallel_size=devices, **sharding)
    raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
