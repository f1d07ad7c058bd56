"""Tensor parallelism: the heads and the gated unit of every layer divided over some ranks.

A rank has whole differential heads: both maps' queries, the keys of both maps, the values, and lambda where each head
has its own, so the difference of the two maps and the norm of a head never leave it. What is summed over the ranks is
the output of ``o_proj`` and of ``down_proj``. Embedding, head and the norms of the residual stream stay whole.

What the heads share (lambda of ``diff_v1``, the sublayer norm, the norms of queries and keys) each rank has whole, and
its gradient there is that of the rank's own heads: :func:`sum_shared_gradients` adds them up.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM

_BY_ROWS = ("q_proj", "q1_proj", "q2_proj", "k_proj", "k1_proj", "k2_proj", "v_proj")


def check_tensor_parallel(config: DiffTransformerConfig, size: int) -> None:
    """Raise unless every rank gets whole heads with their keys and values, and an equal part of the gated unit.

    Args:
        config: The architecture.
        size: Ranks that share a layer.

    Raises:
        ValueError: If something does not divide; it names all of it, and the sizes that do.
    """
    heads = config.num_attention_heads if config.attention == "softmax" else config.num_diff_heads
    counts = {
        "heads" if config.attention == "softmax" else "differential heads": heads,
        "groups of keys and values": config.num_kv_groups,
        "columns of the gated unit (intermediate_size)": config.intermediate_size,
    }
    if all(count % size == 0 for count in counts.values()):
        return
    good = [str(n) for n in range(1, config.num_kv_groups + 1) if all(count % n == 0 for count in counts.values())]
    have = ", ".join(f"{count} {what}" for what, count in counts.items())
    raise ValueError(
        f"tensor_parallel_size={size} does not divide the model, which has {have}: a head with its pair stays on one "
        f"rank; choose {' or '.join(good)}"
    )


def parallelize_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the layers of a model over a mesh, in place; every rank is to get the same batch.

    Args:
        model: One of ours, without adapters; its parameters may be on the meta device.
        mesh: One dimension.

    Raises:
        ValueError: If it is another model, or does not divide.
    """
    if not isinstance(model, DiffTransformerForCausalLM):
        raise ValueError(f"tensor_parallel_size divides difftune's own models, not {type(model).__name__}: set it to 1")
    check_tensor_parallel(model.config, mesh.size())
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("tensor_parallel_size divides whole projections, and LoRA lies beside them: set it to 1")
    for layer in model.model.layers:
        parallelize_module(layer, mesh, _plan(layer.self_attn))


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the heads of a layer share: each rank has it whole, and of its gradient the part of its own heads."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in (".lambda_full.lambda_q", ".lambda_full.lambda_k", ".subln.", "_norm."))
        and ".self_attn." in name
    ]


def sum_shared_gradients(parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
    """Add up over the ranks the gradients of what their heads share, in place.

    Args:
        parameters: What :func:`shared_parameters` returned; those without a gradient are passed over.
        mesh: As of :func:`parallelize_layers`.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            torch.distributed.all_reduce(local, group=mesh.get_group())


def _plan(attention: nn.Module) -> dict[str, ParallelStyle]:
    """What becomes of the modules of a layer, by name. Inputs become one DTensor, whose gradient is summed once."""
    whole = Replicate()
    plan: dict[str, ParallelStyle] = {
        "self_attn": PrepareModuleInput(
            input_layouts=(whole, None), desired_input_layouts=(whole, None), use_local_output=False
        ),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp": PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,), use_local_output=False),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    names = {name for name, _ in attention.named_modules()}
    plan |= {f"self_attn.{name}": ColwiseParallel() for name in _BY_ROWS if name in names}
    if "lambda_full.lambda_proj" in names:
        plan["self_attn.lambda_full.lambda_proj"] = ColwiseParallel()
    return plan
