"""The backward kernels: row statistics, then gradients of keys and values, then of queries. No atomics: deterministic.

With ``dO`` the gradient of the output before the norm, ``P_1, P_2`` the maps and ``dP = dO V^T``, which both share::

    dV = (P_1 - lam P_2)^T dO          delta_i = rowsum(dO * O_i)
    dS_1 = P_1 (dP - delta_1)          dS_2 = -lam P_2 (dP - delta_2)
    dQ_i = scale dS_i K_i              dK_i = scale dS_i^T Q_i         dlam = -sum(delta_2)
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from difftune.ops.triton.backward_keys import keys_kernel
from difftune.ops.triton.backward_queries import queries_kernel
from difftune.ops.triton.backward_statistics import statistics_kernel
from difftune.ops.triton.descriptors import describe, describe_heads, is_aligned
from difftune.ops.triton.launch import Problem

STATISTICS_ROWS = 32


def _descriptors(grad: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, problem: Problem) -> dict[str, Any]:
    """What the kernel for keys and values walks over, where the table asks for TMA and the memory allows it."""
    rows, q = problem.tiles.keys.rows, problem.q
    # Documents end before the tensor does, and begin where a tile of the statistics must not.
    usable = problem.tiles.descriptors and problem.cu_seqlens is None
    if not usable or not all(map(is_aligned, (q, grad, lse, delta))):
        return dict.fromkeys(("q_desc", "grad_desc", "lse_desc", "delta_desc"))
    return {
        "q_desc": describe_heads(q, rows),
        "grad_desc": describe_heads(grad, rows),
        "lse_desc": describe(lse, (1, 1, 1, rows)),
        "delta_desc": describe(delta, (1, 1, 1, rows)),
    }


def backward(
    grad: torch.Tensor, raw: torch.Tensor, negative: torch.Tensor, lse: torch.Tensor, problem: Problem
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the three kernels; the first four arguments are the output's gradient and what the forward returned.

    Returns:
        Gradients of q, k, v, lam and the norm's weight (empty without a norm), in their shapes, dense.
    """
    q, k, v, lam, weight = problem.q, problem.k, problem.v, problem.lam, problem.norm_weight
    B, T, H, E = problem.out_shape
    arguments = problem.arguments
    grad = grad.contiguous()
    delta = torch.empty_like(lse)
    grad_raw = grad if weight is None else torch.empty_like(grad)
    blocks = triton.cdiv(T, STATISTICS_ROWS)
    partial = torch.empty(0 if weight is None else blocks * H * B, E, dtype=torch.float32, device=q.device)
    names = ("lam_ptr", "stride_lb", "stride_lt", "stride_lh", "H", "T", "E", "LAM_TOKEN", "INTERPRET")
    statistics_kernel[(blocks * H * B,)](
        grad_ptr=grad,
        raw_ptr=raw,
        negative_ptr=negative,
        weight_ptr=weight,
        grad_raw_ptr=grad_raw,
        delta1_ptr=delta[0],
        delta2_ptr=delta[1],
        grad_weight_ptr=partial,
        blocks=blocks,
        eps=problem.norm_eps,
        ROWS=STATISTICS_ROWS,
        NORM=weight is not None,
        num_warps=8,
        **{name: arguments[name] for name in names},
    )
    arguments = {
        **arguments,
        "grad_ptr": grad_raw,
        "lse1_ptr": lse[0],
        "lse2_ptr": lse[1],
        "delta1_ptr": delta[0],
        "delta2_ptr": delta[1],
    }
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tile = problem.tiles.keys
    blocks = triton.cdiv(problem.max_keys, tile.columns)
    keys_kernel[(blocks * v.shape[2] * problem.sequences,)](
        dk_ptr=dk,
        dv_ptr=dv,
        blocks=blocks,
        **arguments,
        **_descriptors(grad_raw, lse, delta, problem),
        **tile.options,
    )
    tile = problem.tiles.queries
    blocks = triton.cdiv(problem.max_queries, tile.rows)
    queries_kernel[(blocks * H * problem.sequences,)](dq_ptr=dq, blocks=blocks, **arguments, **tile.options)
    dlam_BHT = -delta[1]
    dlam = {0: lambda: dlam_BHT.sum(), 1: lambda: dlam_BHT.sum((0, 2)), 3: lambda: dlam_BHT.transpose(1, 2)}[lam.ndim]()
    dweight = q.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)
    return dq, dk, dv, dlam.to(lam.dtype).contiguous(), dweight
