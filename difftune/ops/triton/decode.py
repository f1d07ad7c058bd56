"""The decode kernels: a few queries against a long cache, which is read once for both maps.

The work is the reading of the cache: ``K_1``, ``K_2`` and ``V``, 8 bytes a key, head and dim in 16 bits. There are few
rows, so the keys of each are cut into splits, a program each, which leave the output of each map over their keys and
its log-sum-exp, in float32. A second kernel adds the splits, subtracts and norms. The query heads of a group are the
rows of one tile, so that the cache is not read again for each of them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from difftune.ops.triton.launch import architecture, is_interpreted, rows_in_memory
from difftune.ops.triton.primitives import dot, narrow

# At D = 128 what a split leaves behind is then below 1 % of the keys and values that it reads, a query head.
MIN_SPLIT = 256
MAX_SPLITS = 128
# Finite, so that a row that sees no key has differences of 0 and not NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _weights(q, k, highest, total, seen, scale, INTERPRET: tl.constexpr):
    """A step of the online softmax: weights of these keys, factor of the sums so far, new maximum and total."""
    s = tl.where(seen, dot(q, tl.trans(k), None, INTERPRET) * scale, float("-inf"))
    higher = tl.maximum(highest, tl.max(s, 1))
    p = tl.math.exp2(s - higher[:, None])
    factor = tl.math.exp2(highest - higher)
    return p, factor[:, None], higher, total * factor + tl.sum(p, 1)


@triton.jit
def _store_map(out_ptr, lse_ptr, row, real, left, right, highest, total, D: tl.constexpr, HALVES: tl.constexpr):
    total = tl.where(total > 0, total, 1.0)
    out_ptr += row[:, None] * (HALVES * D) + tl.arange(0, D)[None, :]
    tl.store(out_ptr, left / total[:, None], mask=real[:, None])
    if HALVES == 2:
        tl.store(out_ptr + D, right / total[:, None], mask=real[:, None])
    tl.store(lse_ptr + row, highest + tl.math.log2(total), mask=real)


@triton.jit(do_not_specialize=["B", "T", "S", "stride_mb", "stride_tb"])
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    lengths_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_qp,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_kp,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_vp,
    stride_mb,
    stride_tb,
    B,
    T,
    S,
    groups,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HALVES: tl.constexpr,
    SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAGE: tl.constexpr,
    PADDED: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Both maps of the query heads of one group, over one split of the keys of one row."""
    b = (tl.program_id(0) // groups).to(tl.int64)
    group = (tl.program_id(0) % groups).to(tl.int64)
    split = tl.program_id(1)
    length = tl.minimum(tl.load(lengths_ptr + b), S) if RAGGED else S
    width = tl.cdiv(tl.cdiv(length, tl.num_programs(1)), COLUMNS) * COLUMNS
    start = split * width
    end = tl.minimum(start + width, length)

    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = rows < T * GROUP
    t = rows // GROUP
    head = group * GROUP + rows % GROUP
    dims = tl.arange(0, D)
    q_ptr += b * stride_qb + (t * stride_qt + head * stride_qh)[:, None] + dims[None, :]
    q1 = tl.load(q_ptr, mask=real[:, None], other=0.0)
    q2 = tl.load(q_ptr + stride_qp, mask=real[:, None], other=0.0)
    # The queries are the last tokens of their row.
    last_seen = t + length - T

    highest1 = tl.full([ROWS], LOWEST, tl.float32)
    highest2 = tl.full([ROWS], LOWEST, tl.float32)
    total1 = tl.zeros([ROWS], tl.float32)
    total2 = tl.zeros([ROWS], tl.float32)
    # Values in one piece of D (V2) or in halves of D (V1), which need not lie side by side.
    left1 = tl.zeros([ROWS, D], tl.float32)
    left2 = tl.zeros([ROWS, D], tl.float32)
    right1 = tl.zeros([ROWS, D], tl.float32)
    right2 = tl.zeros([ROWS, D], tl.float32)
    k_ptr += group * stride_kg
    v_ptr += group * stride_vg
    if PAGE == 0:
        k_ptr += b * stride_kb
        v_ptr += b * stride_vb
    for first in tl.range(start, end, COLUMNS, num_stages=STAGES):
        keys = first + tl.arange(0, COLUMNS)
        inside = keys < end
        if PAGE == 0:
            k_offsets = keys.to(tl.int64) * stride_ks
            v_offsets = keys.to(tl.int64) * stride_vs
        else:
            page = tl.load(table_ptr + b * stride_tb + keys // PAGE, mask=inside, other=0).to(tl.int64)
            k_offsets = page * stride_kb + keys % PAGE * stride_ks
            v_offsets = page * stride_vb + keys % PAGE * stride_vs
        seen = inside[None, :]
        if PADDED:
            seen = seen & (tl.load(mask_ptr + b * stride_mb + keys, mask=inside, other=0) != 0)[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= last_seen[:, None])
        k_tile = k_ptr + k_offsets[:, None] + dims[None, :]
        v_tile = v_ptr + v_offsets[:, None] + dims[None, :]
        k1 = tl.load(k_tile, mask=inside[:, None], other=0.0)
        k2 = k1 if SHARED else tl.load(k_tile + stride_kp, mask=inside[:, None], other=0.0)
        v = tl.load(v_tile, mask=inside[:, None], other=0.0)
        p1, factor1, highest1, total1 = _weights(q1, k1, highest1, total1, seen, scale, INTERPRET)
        p2, factor2, highest2, total2 = _weights(q2, k2, highest2, total2, seen, scale, INTERPRET)
        p1 = narrow(p1, v.dtype, INTERPRET)
        p2 = narrow(p2, v.dtype, INTERPRET)
        left1 = dot(p1, v, left1 * factor1, INTERPRET)
        left2 = dot(p2, v, left2 * factor2, INTERPRET)
        if HALVES == 2:
            v = tl.load(v_tile + stride_vp, mask=inside[:, None], other=0.0)
            right1 = dot(p1, v, right1 * factor1, INTERPRET)
            right2 = dot(p2, v, right2 * factor2, INTERPRET)

    row = (((split * B + b) * T + t) * (groups * GROUP) + head) * 2
    _store_map(out_ptr, lse_ptr, row, real, left1, right1, highest1, total1, D, HALVES)
    _store_map(out_ptr, lse_ptr, row + 1, real, left2, right2, highest2, total2, D, HALVES)


@triton.jit(do_not_specialize=["T", "splits"])
def combine_kernel(
    part_ptr,
    lse_ptr,
    lam_ptr,
    weight_ptr,
    out_ptr,
    stride_lb,
    stride_lt,
    stride_lh,
    T,
    H,
    splits,
    eps,
    E: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One query of one head: the splits of each map added up, the difference of the maps, the sublayer norm."""
    query = tl.program_id(0).to(tl.int64)
    queries = tl.num_programs(0).to(tl.int64)
    index = tl.arange(0, SPLITS)
    dims = tl.arange(0, E)
    real = index < splits
    lse1 = tl.load(lse_ptr + (index * queries + query) * 2, mask=real, other=LOWEST)
    lse2 = tl.load(lse_ptr + (index * queries + query) * 2 + 1, mask=real, other=LOWEST)
    highest1 = tl.max(lse1, 0)
    highest2 = tl.max(lse2, 0)
    total1 = tl.sum(tl.where(real, tl.math.exp2(lse1 - highest1), 0.0), 0)
    total2 = tl.sum(tl.where(real, tl.math.exp2(lse2 - highest2), 0.0), 0)
    out1 = tl.zeros([E], tl.float32)
    out2 = tl.zeros([E], tl.float32)
    for split in range(splits):
        row = (split * queries + query) * 2
        out1 += tl.math.exp2(tl.load(lse_ptr + row) - highest1) * tl.load(part_ptr + row * E + dims)
        out2 += tl.math.exp2(tl.load(lse_ptr + row + 1) - highest2) * tl.load(part_ptr + (row + 1) * E + dims)
    lam_ptr += query // H // T * stride_lb + query // H % T * stride_lt + query % H * stride_lh
    out = out1 / total1 - tl.load(lam_ptr).to(tl.float32) * (out2 / total2)
    if NORM:
        weight = tl.load(weight_ptr + dims).to(tl.float32)
        out = out / tl.sqrt(tl.sum(out * out, 0) / E + eps) * weight
    tl.store(out_ptr + query * E + dims, narrow(out, out_ptr.dtype.element_ty, INTERPRET))


class DecodeTile(NamedTuple):
    """What a program of the split kernel holds: ``rows`` queries x ``columns`` keys, by ``warps`` warps."""

    rows: int
    columns: int
    warps: int
    stages: int


def tile_of(head_dim: int, rows: int, halves: int, itemsize: int, arch: int, paged: bool) -> DecodeTile:
    """Tile for groups of ``rows`` queries.

    A tile of keys and values has about 32 KiB, and ``stages - 1`` of them are held: two programs find room in the 163
    KiB (sm_80) or 227 KiB (sm_90) of shared memory of a multiprocessor. None of these tiles spills a register.
    """
    # Triton's interpreter stands below all compute capabilities: short inputs should have several tiles.
    if arch < 80:
        return DecodeTile(16, 32, 4, 1)
    tall = rows > 16
    # V1 has two keys and two halves of values, V2 one of each.
    bytes_a_key = 2 * halves * head_dim * itemsize
    columns = min(max(16, triton.next_power_of_2(32 * 1024 // bytes_a_key)), 64 if tall else 128)
    # Keys behind a table wait for its entry first, which takes one of the stages.
    stages = (3 if arch >= 90 else 2) + paged
    return DecodeTile(32 if tall else 16, columns, 8 if tall else 4, stages)


def choose_splits(programs: int, num_keys: int, slots: int) -> int:
    """Fewest splits with which ``programs`` programs a split fill ``slots`` places nearly as well as they can.

    Programs run in waves of ``slots``, and a last wave with few of them leaves the rest of the device idle.
    """
    most = min(max(1, num_keys // MIN_SPLIT), MAX_SPLITS)
    filled = [programs * n / (triton.cdiv(programs * n, slots) * slots) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(filled, 1) if share >= 0.9 * max(filled))


@cache
def _slots(device: torch.device) -> int:
    """Programs that run at once: two a multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    norm_weight: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    causal: bool,
    scale: float,
    norm_eps: float,
    num_splits: int,
) -> torch.Tensor:
    """Launch both kernels; arguments as of `difftune.ops.triton.cached_attention`, values in halves of D."""
    q, k, v = (rows_in_memory(x) for x in (q, k, v))
    B, T, H, _, D = q.shape
    G, halves = k.shape[2], v.shape[3]
    page = 0 if block_table is None else k.shape[1]
    S = k.shape[1] if block_table is None else page * block_table.shape[1]
    out = torch.empty(B, T, H, halves * D, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    arch = architecture(q.device.type, q.device.index)
    tile = tile_of(D, T * (H // G), halves, q.element_size(), arch, page > 0)
    blocks = triton.cdiv(T * (H // G), tile.rows)
    splits = num_splits or choose_splits(B * G * blocks, S, _slots(q.device))
    parts = torch.empty(splits, B, T, H, 2, halves * D, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, B, T, H, 2, dtype=torch.float32, device=q.device)
    # Triton reads whole bytes, and a bool is one.
    mask = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.int8)
    split_kernel[(B * G, splits, blocks)](
        q, k, v, mask, lengths, block_table, parts, lse, *q.stride()[:4], *k.stride()[:4], *v.stride()[:4],
        S, 0 if block_table is None else block_table.stride(0), B, T, S, G,
        # exp2 is what the hardware has.
        scale * math.log2(math.e),
        GROUP=H // G, D=D, HALVES=halves, SHARED=k.shape[3] == 1, CAUSAL=causal, PAGE=page, PADDED=mask is not None,
        RAGGED=lengths is not None, ROWS=tile.rows, COLUMNS=tile.columns, STAGES=tile.stages,
        INTERPRET=is_interpreted(), num_warps=tile.warps,
    )  # fmt: skip
    lam = lam.expand(B, T, H)
    combine_kernel[(B * T * H,)](
        parts, lse, lam, norm_weight, out, *lam.stride(), T, H, splits, norm_eps,
        E=halves * D, SPLITS=triton.next_power_of_2(splits), NORM=norm_weight is not None, INTERPRET=is_interpreted(),
        num_warps=2,
    )  # fmt: skip
    return out
