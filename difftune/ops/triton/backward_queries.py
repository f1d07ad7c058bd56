"""Third kernel of the backward: gradients of queries. A program holds queries and walks over keys."""

from __future__ import annotations

import triton
import triton.language as tl

from difftune.ops.triton.primitives import (
    LN2,
    dot,
    load_lambda,
    load_rows,
    locate,
    logits,
    narrow,
    store_rows,
    visible_keys,
)


@triton.jit
def _walk_keys(
    dq1,
    dq2,
    q1,
    q2,
    grad,
    lse1,
    lse2,
    delta1,
    delta2,
    lam,
    k_ptr,
    v_ptr,
    mask_ptr,
    start,
    end,
    first_query,
    nq,
    nk,
    stride_kt,
    stride_kp,
    stride_vt,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradients of a tile of queries from the keys ``start <= s < end``, without the scale."""
    for n in tl.range(start, end, COLUMNS, num_stages=STAGES):
        k1 = load_rows(k_ptr, n, nk, stride_kt, COLUMNS, D, MASKED)
        v = load_rows(v_ptr, n, nk, stride_vt, COLUMNS, E, MASKED)
        s1 = logits(q1, k1, mask_ptr, first_query, n, nq, nk, ROWS, COLUMNS, CAUSAL, PADDED, MASKED, INTERPRET)
        p1 = tl.math.exp2(s1 * scale - lse1[:, None])
        dp = dot(grad, tl.trans(v), None, INTERPRET)
        ds1 = p1 * (dp - delta1[:, None])
        dq1 = dot(narrow(ds1, k1.dtype, INTERPRET), k1, dq1, INTERPRET)
        k2 = k1 if SHARED else load_rows(k_ptr + stride_kp, n, nk, stride_kt, COLUMNS, D, MASKED)
        s2 = logits(q2, k2, mask_ptr, first_query, n, nq, nk, ROWS, COLUMNS, CAUSAL, PADDED, MASKED, INTERPRET)
        p2 = tl.math.exp2(s2 * scale - lse2[:, None])
        ds2 = p2 * (lam[:, None] * (delta2[:, None] - dp))
        dq2 = dot(narrow(ds2, k2.dtype, INTERPRET), k2, dq2, INTERPRET)
    return dq1, dq2


@triton.jit(do_not_specialize=["T", "S", "blocks"])
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lam_ptr,
    cu_ptr,
    mask_ptr,
    grad_ptr,
    lse1_ptr,
    lse2_ptr,
    delta1_ptr,
    delta2_ptr,
    dq_ptr,
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
    INTERPRET: tl.constexpr,
):
    """Gradients of a block of queries of one head, over all keys that they see."""
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
    q1 = load_rows(q_ptr, first_query, nq, stride_qt, ROWS, D, True)
    q2 = load_rows(q_ptr + stride_qp, first_query, nq, stride_qt, ROWS, D, True)
    grad = load_rows(grad_ptr + (row * T + first) * (H * E) + head * E, first_query, nq, H * E, ROWS, E, True)
    real = first_query + tl.arange(0, ROWS) < nq
    stats = (row * H + head) * T + first + first_query + tl.arange(0, ROWS)
    lse1 = tl.load(lse1_ptr + stats, mask=real, other=float("inf"))
    lse2 = tl.load(lse2_ptr + stats, mask=real, other=float("inf"))
    delta1 = tl.load(delta1_ptr + stats, mask=real, other=0.0)
    delta2 = tl.load(delta2_ptr + stats, mask=real, other=0.0)
    lam = load_lambda(lam_ptr, row, first, head, first_query, nq, stride_lb, stride_lt, stride_lh, ROWS, LAM_TOKEN)
    every, some = visible_keys(block, nq, nk, ROWS, COLUMNS, CAUSAL, PADDED)
    dq1 = tl.zeros([ROWS, D], tl.float32)
    dq2 = tl.zeros([ROWS, D], tl.float32)
    for MASKED in tl.static_range(2):
        dq1, dq2 = _walk_keys(
            dq1, dq2, q1, q2, grad, lse1, lse2, delta1, delta2, lam, k_ptr, v_ptr, mask_ptr, every if MASKED else 0,
            some if MASKED else every, first_query, nq, nk, stride_kt, stride_kp, stride_vt, scale, D, E, ROWS, COLUMNS,
            STAGES, CAUSAL, PADDED, SHARED, MASKED, INTERPRET,
        )  # fmt: skip
    dq_ptr += (row * T + first) * (H * 2 * D) + head * (2 * D)
    store_rows(dq_ptr, dq1 * (scale * LN2), first_query, nq, H * 2 * D, ROWS, D, INTERPRET)
    store_rows(dq_ptr + D, dq2 * (scale * LN2), first_query, nq, H * 2 * D, ROWS, D, INTERPRET)
