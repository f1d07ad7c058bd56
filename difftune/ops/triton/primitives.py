"""What the kernels share: products, rounding, tiles of rows, where a sequence lies."""

from __future__ import annotations

import math

import triton
import triton.language as tl

# The kernels hold scale * log2(e), because exp2 is what the hardware has; gradients need the scale itself.
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """``a @ b + acc``, accumulated in float32; ``acc`` may be None."""
    if INTERPRET:
        # Triton's interpreter keeps bfloat16 as bits and would multiply the bits.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Float32 to ``dtype``, rounded to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        # Triton's interpreter cuts the low bits off: round before, so that nothing is left to cut.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_rows(
    ptr,
    first,
    count,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    desc=None,
    row=0,
    head=0,
    member=0,
):
    """Rows ``first, ..., first + ROWS - 1`` of a matrix with ``count`` rows; zero beyond when MASKED.

    With a descriptor of the whole tensor (`difftune.ops.triton.descriptors`) they come by TMA and not by pointers, from
    ``tensor[row, head, member]``, and are zero beyond its rows in any case.
    """
    if desc is not None:
        return desc.load([row, head, member, first, 0]).reshape(ROWS, COLUMNS)
    rows = first + tl.arange(0, ROWS)
    # Int64 for each row, as a tensor: the offset may pass 2^31 elements, and a wide scalar offset for the whole tile
    # makes ptxas put waits between the products of the loop (warning C7515).
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    if MASKED:
        return tl.load(ptrs, mask=rows[:, None] < count, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_rows(ptr, x, first, count, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRET: tl.constexpr):
    """Inverse of :func:`load_rows`: rows beyond ``count`` are dropped."""
    rows = first + tl.arange(0, ROWS)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    tl.store(ptrs, narrow(x, ptr.dtype.element_ty, INTERPRET), mask=rows[:, None] < count)


@triton.jit
def locate(cu_ptr, index, T, S, VARLEN: tl.constexpr):
    """Row, first position, number of queries and of keys of sequence ``index``: a row, or a packed document."""
    if VARLEN:
        start = tl.load(cu_ptr + index)
        length = tl.load(cu_ptr + index + 1) - start
        # A document lies within one row, so that rows need not follow one another in memory.
        return (start // T).to(tl.int64), (start % T).to(tl.int64), length, length
    else:
        return index.to(tl.int64), (index * 0).to(tl.int64), T, S


@triton.jit
def visible_keys(block, nq, nk, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr):
    """Of a block of queries: keys before the first are seen by all of them, keys from the second on by none."""
    if CAUSAL:
        # Aligned bottom right: query t sees keys s <= t + nk - nq. Clamped before the division, which truncates.
        some = tl.minimum(nk, tl.maximum((block + 1) * ROWS + nk - nq, 0))
        every = tl.minimum(nk, tl.maximum(block * ROWS + nk - nq + 1, 0)) // COLUMNS * COLUMNS
    else:
        some = nk
        every = nk // COLUMNS * COLUMNS
    if PADDED:
        every = every * 0
    return every, some


@triton.jit
def logits(
    q,
    k,
    mask_ptr,
    first_query,
    first_key,
    nq,
    nk,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``q k^T`` without the scale, -inf where a query must not see a key (looked at only when MASKED)."""
    s = dot(q, tl.trans(k), None, INTERPRET)
    if MASKED:
        keys = first_key + tl.arange(0, COLUMNS)
        seen = keys < nk
        if PADDED:
            seen = seen & (tl.load(mask_ptr + keys, mask=seen, other=0) != 0)
        seen = seen[None, :]
        if CAUSAL:
            queries = first_query + tl.arange(0, ROWS)
            seen = seen & (queries[:, None] + nk - nq >= keys[None, :])
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def load_lambda(
    lam_ptr, row, first, head, first_query, nq, stride_b, stride_t, stride_h, ROWS: tl.constexpr, TOKEN: tl.constexpr
):
    """Lambda of a block of queries, float32: one number a row, or one for all."""
    ptr = lam_ptr + row * stride_b + first * stride_t + head.to(tl.int64) * stride_h
    if TOKEN:
        queries = first_query + tl.arange(0, ROWS)
        return tl.load(ptr + queries * stride_t, mask=queries < nq, other=0.0).to(tl.float32)
    else:
        return tl.zeros([ROWS], tl.float32) + tl.load(ptr).to(tl.float32)
