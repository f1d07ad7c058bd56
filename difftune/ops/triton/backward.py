"""The backward kernels: row statistics, then gradients of keys and values, then of queries. No atomics: deterministic.

With ``dO`` the gradient of the output before the norm, ``P_1, P_2`` the maps and ``dP = dO V^T``, which both share::

    dV = (P_1 - lam P_2)^T dO          delta_i = rowsum(dO * O_i)
    dS_1 = P_1 (dP - delta_1)          dS_2 = -lam P_2 (dP - delta_2)
    dQ_i = scale dS_i K_i              dK_i = scale dS_i^T Q_i         dlam = -sum(delta_2)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from difftune.ops.triton.launch import Problem
from difftune.ops.triton.primitives import dot, load_lambda, load_rows, locate, logits, narrow, store_rows, visible_keys

LN2 = tl.constexpr(0.6931471805599453)
STATISTICS_ROWS = 32


@triton.jit(do_not_specialize=["T", "blocks"])
def statistics_kernel(
    grad_ptr,
    raw_ptr,
    negative_ptr,
    lam_ptr,
    weight_ptr,
    grad_raw_ptr,
    delta1_ptr,
    delta2_ptr,
    grad_weight_ptr,
    stride_lb,
    stride_lt,
    stride_lh,
    H,
    T,
    blocks,
    eps,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    LAM_TOKEN: tl.constexpr,
    NORM: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Backward of the norm, and the deltas, of a block of tokens of one head; every token is in some sequence."""
    first = tl.program_id(0) % blocks * ROWS
    head = tl.program_id(0) // blocks % H
    row = (tl.program_id(0) // blocks // H).to(tl.int64)
    stride = H * E
    offset = row * T * stride + head * E
    stats = (row * H + head) * T + first + tl.arange(0, ROWS)
    real = first + tl.arange(0, ROWS) < T
    grad = load_rows(grad_ptr + offset, first, T, stride, ROWS, E, True).to(tl.float32)
    raw = load_rows(raw_ptr + offset, first, T, stride, ROWS, E, True).to(tl.float32)
    negative = load_rows(negative_ptr + offset, first, T, stride, ROWS, E, True).to(tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + tl.arange(0, E)).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(raw * raw, 1) / E + eps)
        unit = raw * rstd[:, None]
        # A row of partial sums for each program, added up outside: the same order every time.
        ptr = grad_weight_ptr + tl.program_id(0).to(tl.int64) * E
        tl.store(ptr + tl.arange(0, E), tl.sum(grad * unit, 0))
        grad = grad * weight[None, :]
        grad = (grad - unit * (tl.sum(grad * unit, 1) / E)[:, None]) * rstd[:, None]
        store_rows(grad_raw_ptr + offset, grad, first, T, stride, ROWS, E, INTERPRET)
        # What the other kernels will read, so that their rows of dS sum to zero.
        grad = narrow(grad, grad_raw_ptr.dtype.element_ty, INTERPRET).to(tl.float32)
    lam = load_lambda(lam_ptr, row, row * 0, head, first, T, stride_lb, stride_lt, stride_lh, ROWS, LAM_TOKEN)
    delta2 = tl.sum(grad * negative, 1)
    # O_1 = O + lam O_2: saving O_2 and not O_1 needs no division by a lambda that may be 0.
    delta1 = tl.sum(grad * raw, 1) + lam * delta2
    tl.store(delta1_ptr + stats, delta1, mask=real)
    tl.store(delta2_ptr + stats, delta2, mask=real)


@triton.jit
def _walk_queries(
    dk1,
    dk2,
    dv,
    k1,
    k2,
    v,
    q_ptr,
    grad_ptr,
    lse1_ptr,
    lse2_ptr,
    delta1_ptr,
    delta2_ptr,
    lam_ptr,
    start,
    end,
    first_key,
    nq,
    nk,
    stride_qt,
    stride_qp,
    stride_o,
    stride_lt,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    SHARED: tl.constexpr,
    LAM_TOKEN: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradients of a tile of keys from the queries ``start <= t < end``; maps are transposed, ``(keys, queries)``."""
    for m in tl.range(start, end, ROWS, num_stages=STAGES):
        queries = m + tl.arange(0, ROWS)
        real = queries < nq
        q1 = load_rows(q_ptr, m, nq, stride_qt, ROWS, D, True)
        q2 = load_rows(q_ptr + stride_qp, m, nq, stride_qt, ROWS, D, True)
        grad = load_rows(grad_ptr, m, nq, stride_o, ROWS, E, True)
        # exp2(s - inf) = 0: queries beyond the last one have no weight.
        lse1 = tl.load(lse1_ptr + queries, mask=real, other=float("inf"))
        lse2 = tl.load(lse2_ptr + queries, mask=real, other=float("inf"))
        delta1 = tl.load(delta1_ptr + queries, mask=real, other=0.0)
        delta2 = tl.load(delta2_ptr + queries, mask=real, other=0.0)
        p1 = tl.math.exp2(dot(k1, tl.trans(q1), None, INTERPRET) * scale - lse1[None, :])
        p2 = tl.math.exp2(dot(k2, tl.trans(q2), None, INTERPRET) * scale - lse2[None, :])
        if MASKED:
            keys = first_key + tl.arange(0, COLUMNS)
            seen = queries[None, :] + nk - nq >= keys[:, None]
            p1 = tl.where(seen, p1, 0.0)
            p2 = tl.where(seen, p2, 0.0)
        if LAM_TOKEN:
            lam = tl.load(lam_ptr + queries * stride_lt, mask=real, other=0.0).to(tl.float32)
            p2 = p2 * lam[None, :]
        else:
            p2 = p2 * tl.load(lam_ptr).to(tl.float32)
        dv = dot(narrow(p1 - p2, grad.dtype, INTERPRET), grad, dv, INTERPRET)
        dp = dot(v, tl.trans(grad), None, INTERPRET)
        ds1 = p1 * (dp - delta1[None, :])
        dk1 = dot(narrow(ds1, q1.dtype, INTERPRET), q1, dk1, INTERPRET)
        ds2 = p2 * (delta2[None, :] - dp)
        if SHARED:
            dk1 = dot(narrow(ds2, q2.dtype, INTERPRET), q2, dk1, INTERPRET)
        else:
            dk2 = dot(narrow(ds2, q2.dtype, INTERPRET), q2, dk2, INTERPRET)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=["T", "S", "blocks"])
def keys_kernel(
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
    dk_ptr,
    dv_ptr,
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
    """Gradients of a block of keys and values of one group, over all queries of its heads that see them."""
    # Under the causal mask the first keys are seen by most queries: the longest begin first.
    block = tl.program_id(0) % blocks
    groups = H // GROUP
    group = tl.program_id(0) // blocks % groups
    row, first, nq, nk = locate(cu_ptr, tl.program_id(0) // blocks // groups, T, S, VARLEN)
    first_key = block * COLUMNS
    if first_key >= nk:
        return
    k_ptr += row * stride_kb + first * stride_kt + group.to(tl.int64) * stride_kh
    v_ptr += row * stride_vb + first * stride_vt + group.to(tl.int64) * stride_vh
    stride_o = H * E
    k1 = load_rows(k_ptr, first_key, nk, stride_kt, COLUMNS, D, True)
    if SHARED:
        k2 = k1
    else:
        k2 = load_rows(k_ptr + stride_kp, first_key, nk, stride_kt, COLUMNS, D, True)
    v = load_rows(v_ptr, first_key, nk, stride_vt, COLUMNS, E, True)
    dk1 = tl.zeros([COLUMNS, D], tl.float32)
    dk2 = tl.zeros([COLUMNS, D], tl.float32)
    dv = tl.zeros([COLUMNS, E], tl.float32)
    # Queries before `some` see none of these keys, those from `every` on all of them.
    if CAUSAL:
        some = tl.maximum(first_key + nq - nk, 0) // ROWS * ROWS
        every = tl.minimum(tl.cdiv(tl.maximum(first_key + COLUMNS - 1 + nq - nk, 0), ROWS), tl.cdiv(nq, ROWS)) * ROWS
    else:
        some = nq * 0
        every = nq * 0
    for member in range(GROUP):
        head = (group * GROUP + member).to(tl.int64)
        q_head = q_ptr + row * stride_qb + first * stride_qt + head * stride_qh
        grad_head = grad_ptr + (row * T + first) * stride_o + head * E
        lam_head = lam_ptr + row * stride_lb + first * stride_lt + head * stride_lh
        stats = (row * H + head) * T + first
        for MASKED in tl.static_range(2):
            if CAUSAL or not MASKED:
                dk1, dk2, dv = _walk_queries(
                    dk1, dk2, dv, k1, k2, v, q_head, grad_head, lse1_ptr + stats, lse2_ptr + stats, delta1_ptr + stats,
                    delta2_ptr + stats, lam_head, some if MASKED else every, every if MASKED else nq, first_key, nq, nk,
                    stride_qt, stride_qp, stride_o, stride_lt, scale, D, E, ROWS, COLUMNS, STAGES, SHARED, LAM_TOKEN,
                    MASKED, INTERPRET,
                )  # fmt: skip
    if PADDED:
        # A row of these sums belongs to one key, so that a key that nobody sees is struck out once, at the end.
        keys = first_key + tl.arange(0, COLUMNS)
        seen = (tl.load(mask_ptr + row * S + keys, mask=keys < nk, other=0) != 0)[:, None]
        dk1 = tl.where(seen, dk1, 0.0)
        dk2 = tl.where(seen, dk2, 0.0)
        dv = tl.where(seen, dv, 0.0)
    pair: tl.constexpr = 1 if SHARED else 2
    stride_dk = groups * pair * D
    dk_ptr += (row * S + first) * stride_dk + group * pair * D
    store_rows(dk_ptr, dk1 * (scale * LN2), first_key, nk, stride_dk, COLUMNS, D, INTERPRET)
    if not SHARED:
        store_rows(dk_ptr + D, dk2 * (scale * LN2), first_key, nk, stride_dk, COLUMNS, D, INTERPRET)
    dv_ptr += (row * S + first) * (groups * E) + group * E
    store_rows(dv_ptr, dv, first_key, nk, groups * E, COLUMNS, E, INTERPRET)


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
        if SHARED:
            k2 = k1
        else:
            k2 = load_rows(k_ptr + stride_kp, n, nk, stride_kt, COLUMNS, D, MASKED)
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


def backward(
    grad: torch.Tensor, raw: torch.Tensor, negative: torch.Tensor, lse: torch.Tensor, problem: Problem
) -> tuple[torch.Tensor, ...]:
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
    partial = lse.new_empty(0 if weight is None else blocks * H * B, E)
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
    arguments |= {
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
        dk_ptr=dk, dv_ptr=dv, blocks=blocks, **arguments, **tile.options
    )
    tile = problem.tiles.queries
    blocks = triton.cdiv(problem.max_queries, tile.rows)
    queries_kernel[(blocks * H * problem.sequences,)](dq_ptr=dq, blocks=blocks, **arguments, **tile.options)
    dlam_BHT = -delta[1]
    dlam = {0: lambda: dlam_BHT.sum(), 1: lambda: dlam_BHT.sum((0, 2)), 3: lambda: dlam_BHT.transpose(1, 2)}[lam.ndim]()
    dweight = q.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)
    return dq, dk, dv, dlam.to(lam.dtype).contiguous(), dweight
