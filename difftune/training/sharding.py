"""FSDP2: a model sharded block by block, so that no device holds more of it than one block and its own share.

Every block is a unit that is gathered when it runs. An embedding that is not tied is a unit of its own; the head (with
the embedding, if they are tied) and the last norm belong to the root, which stays gathered from forward to backward.

Lambda stays apart: some vectors a layer, in float32 whatever the dtype of the model, of which sharding would save
nothing and cost one more exchange a layer. Each rank has all of it, and its gradients are averaged in one exchange
before an optimiser step (:func:`average_replicated_gradients`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from difftune.training.optim import is_lambda


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> list[nn.Parameter]:
    """Shard a causal language model over a mesh, in place; a second call changes nothing.

    Args:
        model: Ours, with adapters inside or not, or any of transformers' with ``get_decoder().layers``: a teacher. Give
            the causal language model itself, not PEFT's wrapper around it. Its parameters may be on the meta device.
        mesh: One dimension, over which the batch is split.
        reshard_after_forward: Free a gathered block after its forward and gather it again in the backward. False
            saves that exchange and holds the gathered model from forward to backward.
        cpu_offload: Keep the shards, their gradients and the optimiser in the memory of the host.
        param_dtype: In which gathered weights compute. None: that of the shards.
        reduce_dtype: In which gradients are averaged. None: ``param_dtype``.

    Returns:
        The parameters that are not sharded: each rank has them whole.
    """
    replicated = [p for name, p in model.named_parameters() if is_lambda(name)]
    if isinstance(model, FSDPModule):
        return replicated
    offload: OffloadPolicy = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": offload,
        "ignored_params": set(replicated),
    }
    decoder = model.get_decoder()  # type: ignore[operator]  # of a transformers model
    for layer in decoder.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if embedding.weight is not head.weight:
        fully_shard(embedding, reshard_after_forward=reshard_after_forward, **options)
    # The root is needed again at once, at the start of the backward.
    fully_shard(model, reshard_after_forward=False, **options)
    return replicated


def average_replicated_gradients(parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average over the ranks, in one exchange, the gradients that sharding leaves to each of them.

    Args:
        parameters: What :func:`shard_model` returned; those without a gradient are passed over.
        mesh: As there.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients or mesh.size() == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat, group=mesh.get_group())
    flat /= mesh.size()
    for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))
