"""First kernel of the backward: through the norm, and the two sums of each row that the others need."""

from __future__ import annotations

import triton
import triton.language as tl

from difftune.ops.triton.primitives import load_lambda, load_rows, narrow, store_rows


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
