"""Second kernel of the backward: gradients of keys and values. A program holds keys and walks over queries."""

from __future__ import annotations

import triton
import triton.language as tl

from difftune.ops.triton.primitives import LN2, dot, load_rows, locate, narrow, store_rows


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
    q_desc,
    grad_desc,
    lse_desc,
    delta_desc,
    row,
    head,
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
        q1 = load_rows(q_ptr, m, nq, stride_qt, ROWS, D, True, q_desc, row, head, 0)
        q2 = load_rows(q_ptr + stride_qp, m, nq, stride_qt, ROWS, D, True, q_desc, row, head, 1)
        grad = load_rows(grad_ptr, m, nq, stride_o, ROWS, E, True, grad_desc, row, head, 0)
        if q_desc is None:
            # exp2(s - inf) = 0: queries beyond the last one have no weight.
            lse1 = tl.load(lse1_ptr + queries, mask=real, other=float("inf"))
            lse2 = tl.load(lse2_ptr + queries, mask=real, other=float("inf"))
            delta1 = tl.load(delta1_ptr + queries, mask=real, other=0.0)
            delta2 = tl.load(delta2_ptr + queries, mask=real, other=0.0)
        else:
            # Beyond the last query all is 0: a map of ones, of which nothing comes, since dO and the deltas are 0 too.
            lse1 = lse_desc.load([0, row, head, m]).reshape(ROWS)
            lse2 = lse_desc.load([1, row, head, m]).reshape(ROWS)
            delta1 = delta_desc.load([0, row, head, m]).reshape(ROWS)
            delta2 = delta_desc.load([1, row, head, m]).reshape(ROWS)
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
    q_desc,
    grad_desc,
    lse_desc,
    delta_desc,
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
    k2 = k1 if SHARED else load_rows(k_ptr + stride_kp, first_key, nk, stride_kt, COLUMNS, D, True)
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
                    delta2_ptr + stats, lam_head, q_desc, grad_desc, lse_desc, delta_desc, row.to(tl.int32),
                    head.to(tl.int32), some if MASKED else every, every if MASKED else nq, first_key, nq, nk, stride_qt,
                    stride_qp, stride_o, stride_lt, scale, D, E, ROWS, COLUMNS, STAGES, SHARED, LAM_TOKEN, MASKED,
                    INTERPRET,
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
