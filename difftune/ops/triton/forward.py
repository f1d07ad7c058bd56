"""The forward kernel: both maps, their difference, the sublayer norm, in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from difftune.ops.triton.launch import Problem
from difftune.ops.triton.primitives import dot, load_lambda, load_rows, locate, logits, narrow, store_rows, visible_keys

# Below every logit, and finite: a row that sees no key keeps it as its maximum, and exp2(-inf - it) is 0, not NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _accumulate(acc, highest, total, s, v, scale, INTERPRET: tl.constexpr):
    """One step of the online softmax of one map; ``scale`` holds log2(e)."""
    higher = tl.maximum(highest, tl.max(s, 1))
    p = tl.math.exp2(s * scale - (higher * scale)[:, None])
    decay = tl.math.exp2((highest - higher) * scale)
    total = total * decay + tl.sum(p, 1)
    acc = dot(narrow(p, v.dtype, INTERPRET), v, acc * decay[:, None], INTERPRET)
    return acc, higher, total


@triton.jit
def _one_map(
    acc,
    highest,
    total,
    q,
    k_ptr,
    v_ptr,
    mask_ptr,
    start,
    end,
    first_query,
    nq,
    nk,
    stride_k,
    stride_v,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One map over the keys ``start <= s < end``."""
    for n in tl.range(start, end, COLUMNS, num_stages=STAGES):
        k = load_rows(k_ptr, n, nk, stride_k, COLUMNS, D, MASKED)
        s = logits(q, k, mask_ptr, first_query, n, nq, nk, ROWS, COLUMNS, CAUSAL, PADDED, MASKED, INTERPRET)
        v = load_rows(v_ptr, n, nk, stride_v, COLUMNS, E, MASKED)
        acc, highest, total = _accumulate(acc, highest, total, s, v, scale, INTERPRET)
    return acc, highest, total


@triton.jit
def _both_maps(
    acc1,
    acc2,
    highest1,
    highest2,
    total1,
    total2,
    q1,
    q2,
    k_ptr,
    v_ptr,
    mask_ptr,
    start,
    end,
    first_query,
    nq,
    nk,
    stride_k,
    stride_kp,
    stride_v,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Both maps over the keys ``start <= s < end``; keys (when SHARED) and values are read once."""
    for n in tl.range(start, end, COLUMNS, num_stages=STAGES):
        k1 = load_rows(k_ptr, n, nk, stride_k, COLUMNS, D, MASKED)
        s1 = logits(q1, k1, mask_ptr, first_query, n, nq, nk, ROWS, COLUMNS, CAUSAL, PADDED, MASKED, INTERPRET)
        k2 = k1 if SHARED else load_rows(k_ptr + stride_kp, n, nk, stride_k, COLUMNS, D, MASKED)
        s2 = logits(q2, k2, mask_ptr, first_query, n, nq, nk, ROWS, COLUMNS, CAUSAL, PADDED, MASKED, INTERPRET)
        v = load_rows(v_ptr, n, nk, stride_v, COLUMNS, E, MASKED)
        acc1, highest1, total1 = _accumulate(acc1, highest1, total1, s1, v, scale, INTERPRET)
        acc2, highest2, total2 = _accumulate(acc2, highest2, total2, s2, v, scale, INTERPRET)
    return acc1, acc2, highest1, highest2, total1, total2


@triton.jit
def _normalised(acc, highest, total, scale):
    """Output of a map and its log2-sum-exp2; a row that sees no key gets 0 and +inf, of which exp2(s - inf) is 0."""
    seen = total > 0
    out = acc * tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]
    lse = tl.where(seen, highest * scale + tl.math.log2(tl.where(seen, total, 1.0)), float("inf"))
    return out, lse


@triton.jit(do_not_specialize=["T", "S", "blocks"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lam_ptr,
    weight_ptr,
    cu_ptr,
    mask_ptr,
    out_ptr,
    raw_ptr,
    negative_ptr,
    lse1_ptr,
    lse2_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_qp,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_kp,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_lb,
    stride_lt,
    stride_lh,
    H,
    T,
    S,
    blocks,
    scale,
    eps,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
    PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    LAM_TOKEN: tl.constexpr,
    NORM: tl.constexpr,
    SEQUENTIAL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A block of queries of one head. Outputs are ``(B, T, H, E)`` in memory, statistics ``(B, H, T)``."""
    # Blocks of one head follow one another, so that its keys stay in the L2 cache; the longest begin first.
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % H
    row, first, nq, nk = locate(cu_ptr, tl.program_id(0) // blocks // H, T, S, VARLEN)
    first_query = block * ROWS
    if first_query >= nq:
        return
    group = (head // GROUP).to(tl.int64)
    q_ptr += row * stride_qb + first * stride_qt + head.to(tl.int64) * stride_qh
    k_ptr += row * stride_kb + first * stride_kt + group * stride_kh
    v_ptr += row * stride_vb + first * stride_vt + group * stride_vh
    if PADDED:
        mask_ptr += row * S
    stride_o = H * E
    offset = (row * T + first) * stride_o + head * E
    stats = (row * H + head) * T + first + first_query + tl.arange(0, ROWS)
    real = first_query + tl.arange(0, ROWS) < nq
    every, some = visible_keys(block, nq, nk, ROWS, COLUMNS, CAUSAL, PADDED)
    lam = load_lambda(lam_ptr, row, first, head, first_query, nq, stride_lb, stride_lt, stride_lh, ROWS, LAM_TOKEN)

    highest2 = tl.full([ROWS], LOWEST, tl.float32)
    total2 = tl.zeros([ROWS], tl.float32)
    acc2 = tl.zeros([ROWS, E], tl.float32)
    q2 = load_rows(q_ptr + stride_qp, first_query, nq, stride_qt, ROWS, D, True)
    if SEQUENTIAL:
        # One accumulator at a time: two do not fit the registers at E = 256.
        k2_ptr = k_ptr if SHARED else k_ptr + stride_kp
        for MASKED in tl.static_range(2):
            acc2, highest2, total2 = _one_map(
                acc2, highest2, total2, q2, k2_ptr, v_ptr, mask_ptr, every if MASKED else 0, some if MASKED else every,
                first_query, nq, nk, stride_kt, stride_vt, scale, D, E, ROWS, COLUMNS, STAGES, CAUSAL, PADDED,
                MASKED, INTERPRET,
            )  # fmt: skip
        negative, lse2 = _normalised(acc2, highest2, total2, scale)
        store_rows(negative_ptr + offset, negative, first_query, nq, stride_o, ROWS, E, INTERPRET)
        # What is read back below was written by other threads of the block.
        tl.debug_barrier()
    highest1 = tl.full([ROWS], LOWEST, tl.float32)
    total1 = tl.zeros([ROWS], tl.float32)
    acc1 = tl.zeros([ROWS, E], tl.float32)
    q1 = load_rows(q_ptr, first_query, nq, stride_qt, ROWS, D, True)
    if SEQUENTIAL:
        for MASKED in tl.static_range(2):
            acc1, highest1, total1 = _one_map(
                acc1, highest1, total1, q1, k_ptr, v_ptr, mask_ptr, every if MASKED else 0, some if MASKED else every,
                first_query, nq, nk, stride_kt, stride_vt, scale, D, E, ROWS, COLUMNS, STAGES, CAUSAL, PADDED,
                MASKED, INTERPRET,
            )  # fmt: skip
        negative = load_rows(negative_ptr + offset, first_query, nq, stride_o, ROWS, E, True).to(tl.float32)
    else:
        for MASKED in tl.static_range(2):
            acc1, acc2, highest1, highest2, total1, total2 = _both_maps(
                acc1, acc2, highest1, highest2, total1, total2, q1, q2, k_ptr, v_ptr, mask_ptr,
                every if MASKED else 0, some if MASKED else every, first_query, nq, nk, stride_kt, stride_kp, stride_vt,
                scale, D, E, ROWS, COLUMNS, STAGES, CAUSAL, SHARED, PADDED, MASKED, INTERPRET,
            )  # fmt: skip
        negative, lse2 = _normalised(acc2, highest2, total2, scale)
        store_rows(negative_ptr + offset, negative, first_query, nq, stride_o, ROWS, E, INTERPRET)
    out, lse1 = _normalised(acc1, highest1, total1, scale)
    tl.store(lse1_ptr + stats, lse1, mask=real)
    tl.store(lse2_ptr + stats, lse2, mask=real)

    out -= lam[:, None] * negative
    if NORM:
        store_rows(raw_ptr + offset, out, first_query, nq, stride_o, ROWS, E, INTERPRET)
        rstd = 1.0 / tl.sqrt(tl.sum(out * out, 1) / E + eps)
        weight = tl.load(weight_ptr + tl.arange(0, E)).to(tl.float32)
        out = out * rstd[:, None] * weight[None, :]
    store_rows(out_ptr + offset, out, first_query, nq, stride_o, ROWS, E, INTERPRET)


def forward(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernel.

    Returns:
        The output ``(B, T, H, E)``; the output before the norm, likewise, empty without a norm; the output of the
        negative map, likewise; the log2-sum-exp2 of both maps ``(2, B, H, T)``, float32.
    """
    q, tile = problem.q, problem.tiles.forward
    B, T, H, _ = problem.out_shape
    out, negative = (torch.empty(problem.out_shape, dtype=q.dtype, device=q.device) for _ in range(2))
    raw = torch.empty_like(out) if problem.norm_weight is not None else out.new_empty(0)
    lse = torch.empty(2, B, H, T, dtype=torch.float32, device=q.device)
    blocks = triton.cdiv(problem.max_queries, tile.rows)
    arguments: dict[str, Any] = {
        "weight_ptr": problem.norm_weight,
        "out_ptr": out,
        "raw_ptr": raw,
        "negative_ptr": negative,
        "lse1_ptr": lse[0],
        "lse2_ptr": lse[1],
        "blocks": blocks,
        "eps": problem.norm_eps,
        "NORM": problem.norm_weight is not None,
        "SEQUENTIAL": problem.tiles.sequential,
        **problem.arguments,
        **tile.options,
    }
    forward_kernel[(blocks * H * problem.sequences,)](**arguments)
    return out, raw, negative, lse
