"""The keys of `trainer.fsdp` in a recipe: a model sharded over several devices."""

from dataclasses import dataclass

from difftune.config.field import key as _key


@dataclass
class FsdpConfig:
    """How the strategy `fsdp` shards parameters, gradients and optimiser over the devices, a block at a time."""

    reshard_after_forward: bool = True
    """Free the gathered weights of a block after its forward, and gather them again for its backward. false: one
    exchange a block less, and all gathered weights are held from forward to backward."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimiser in the memory of the host, and step there: slow, for the largest models."""
    param_dtype: str | None = _key(None, choices=("bfloat16", "float16"))
    """In which gathered weights are exchanged and computed with; the sharded ones and the optimiser stay in
    `model.dtype`, lambda in float32. null: `model.dtype`."""
    reduce_dtype: str | None = _key(None, choices=("float32", "bfloat16"))
    """In which gradients are summed over the devices. null: float32."""
    tensor_parallel_size: int = _key(1, low=1)
    """Devices that share each layer: every one has some of the heads, with both maps of each, and a part of the gated
    unit. The other devices share the batch. 1: none do."""
