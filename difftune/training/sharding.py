"""FSDP2: a model sharded block by block, so that no device holds more of it than one block and its own share.

Every block is a unit that is gathered when it runs. An embedding that is not tied is a unit of its own; the head (with
the embedding, if they are tied) and the last norm belong to the root, which stays gathered from forward to backward.

Lambda stays apart: some vectors a layer, in float32 whatever the dtype of the model, of which sharding would save
nothing and cost one more exchange a layer. Each rank has all of it, and its gradients are averaged in one exchange
before an optimiser step (:func:`finish_gradients`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from difftune.training.optim import is_lambda
from difftune.training.tensor_parallel import parallelize_layers, shared_parameters, sum_shared_gradients


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Shard a causal language model over a mesh, in place; a second call changes nothing.

    Args:
        model: Ours, with adapters inside or not, or any of transformers' with ``get_decoder().layers``: a teacher. Give
            the causal language model itself, not PEFT's wrapper around it. Its parameters may be on the meta device.
        mesh: With the dimensions ``data_parallel``, over which batches are split and the model is sharded, and
            ``tensor_parallel``, over which each layer is divided first if its size is not 1.
        reshard_after_forward: Free a gathered block after its forward and gather it again in the backward. False
            saves that exchange and holds the gathered model from forward to backward.
        cpu_offload: Keep the shards, their gradients and the optimiser in the memory of the host.
        param_dtype: In which gathered weights compute. None: that of the shards.
        reduce_dtype: In which gradients are averaged. None: float32 where ``param_dtype`` is given, else their own.
    """
    if isinstance(model, FSDPModule):
        return
    if mesh["tensor_parallel"].size() > 1:
        parallelize_layers(model, mesh["tensor_parallel"])
    offload: OffloadPolicy = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    options: dict[str, Any] = {
        "mesh": mesh["data_parallel"],
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=reduce_dtype or (torch.float32 if param_dtype is not None else None)
        ),
        "offload_policy": offload,
        "ignored_params": set(replicated_parameters(model)),
    }
    decoder = model.get_decoder()  # type: ignore[operator]  # of a transformers model
    for layer in decoder.layers:
        _apart_by_dtype(layer, options)
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if embedding.weight is not head.weight:
        fully_shard(embedding, reshard_after_forward=reshard_after_forward, **options)
    _apart_by_dtype(model, options)
    # The root is needed again at once, at the start of the backward.
    fully_shard(model, reshard_after_forward=False, **options)


def move_unsharded(model: nn.Module, device: torch.device) -> None:
    """Move what each rank has whole, parameters and buffers, to a device, in place; shards stay where they are."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            module._buffers[leaf] = buffer.to(device)


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that :func:`shard_model` does not shard: those of lambda."""
    return [parameter for name, parameter in model.named_parameters() if is_lambda(name)]


def finish_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Exchange, once an optimiser step, the gradients that the backward of a sharded model leaves to each rank.

    Args:
        model: Sharded by :func:`shard_model`.
        mesh: As there.
    """
    average_replicated_gradients(replicated_parameters(model), mesh["data_parallel"])
    if mesh["tensor_parallel"].size() > 1:
        sum_shared_gradients(shared_parameters(model), mesh["tensor_parallel"])


def _apart_by_dtype(unit: nn.Module, options: dict[str, Any]) -> None:
    """Make units of their own of the modules whose dtype is not that of most of the unit.

    What trains together in a unit must be of one dtype. Norms in float32 beside an embedding in bfloat16 are the case.
    """
    sizes: Counter[torch.dtype] = Counter()
    owners: list[tuple[nn.Module, torch.dtype]] = []
    for module in unit.modules():
        for parameter in module.parameters(recurse=False):
            if (
                parameter.requires_grad
                and parameter not in options["ignored_params"]
                and not isinstance(parameter, DTensor)
            ):
                sizes[parameter.dtype] += parameter.numel()
                owners.append((module, parameter.dtype))
    others = [module for module, dtype in owners if dtype != sizes.most_common(1)[0][0]]
    # A weight and its bias have one owner.
    for module in dict.fromkeys(others):
        fully_shard(module, **options)


def average_replicated_gradients(parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average over the ranks, in one exchange, the gradients that sharding leaves to each of them.

    Args:
        parameters: Those without a gradient are passed over.
        mesh: One dimension, over which batches are split.
    """
    held = [p.grad for p in parameters if p.grad is not None]
    gradients = [g.to_local() if isinstance(g, DTensor) else g for g in held]
    if not gradients or mesh.size() == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat, group=mesh.get_group())
    flat /= mesh.size()
    for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))
