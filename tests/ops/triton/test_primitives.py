import pytest
import torch
import triton
import triton.language as tl

from difftune.ops.triton.launch import is_interpreted
from difftune.ops.triton.primitives import load_rows, locate, narrow, store_rows, visible_keys


@triton.jit
def _copy(x_ptr, y_ptr, first, count, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRET: tl.constexpr):
    x = load_rows(x_ptr, first, count, stride, ROWS, COLUMNS, True).to(tl.float32)
    store_rows(y_ptr, x, first, count, COLUMNS, ROWS, COLUMNS, INTERPRET)


def test_rows_beyond_the_count_are_neither_read_nor_written(device):
    x = torch.full((40, 24), torch.nan, device=device)
    x[:21, :16] = torch.randn(21, 16)
    y = torch.full((40, 16), -1.0, device=device)
    _copy[(1,)](x, y, 16, 21, 24, ROWS=16, COLUMNS=16, INTERPRET=is_interpreted())
    assert torch.equal(y[16:21], x[16:21, :16]) and (y[21:] == -1).all() and (y[:16] == -1).all()


@triton.jit
def _round(x_ptr, y_ptr, SIZE: tl.constexpr, INTERPRET: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, narrow(tl.load(x_ptr + offsets), y_ptr.dtype.element_ty, INTERPRET))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_numbers_are_rounded_as_torch_rounds_them(dtype, device):
    # Ties too, to even: 1 + 2^-8 lies halfway between two bfloat16 numbers.
    x = torch.cat([torch.randn(125) * 100, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0])]).to(device)
    y = torch.empty(128, dtype=dtype, device=device)
    _round[(1,)](x, y, SIZE=128, INTERPRET=is_interpreted())
    assert torch.equal(y, x.to(dtype))


@triton.jit
def _bounds(y_ptr, nq, nk, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr):
    every, some = visible_keys(tl.program_id(0), nq, nk, ROWS, COLUMNS, CAUSAL, PADDED)
    tl.store(y_ptr + 2 * tl.program_id(0), every)
    tl.store(y_ptr + 2 * tl.program_id(0) + 1, some)


@pytest.mark.parametrize(("nq", "nk"), [(40, 40), (21, 53), (53, 21), (1, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_bounds_of_a_block_are_those_of_the_mask(nq, nk, causal, device):
    rows, columns = 16, 8
    blocks = -(-nq // rows)
    found = torch.zeros(blocks, 2, dtype=torch.int32, device=device)
    _bounds[(blocks,)](found, nq, nk, ROWS=rows, COLUMNS=columns, CAUSAL=causal, PADDED=False)
    mask = torch.ones(nq, nk, dtype=torch.bool)
    if causal:
        mask = mask.tril(nk - nq)
    for block, (every, some) in enumerate(found.tolist()):
        seen = mask[block * rows : (block + 1) * rows]
        assert every % columns == 0 and seen[:, :every].all() and not seen[:, some:].any()
        assert some == 0 or seen[:, some - 1].any()


@triton.jit
def _place(cu_ptr, y_ptr, T, S, VARLEN: tl.constexpr):
    row, first, nq, nk = locate(cu_ptr, tl.program_id(0), T, S, VARLEN)
    y_ptr += 4 * tl.program_id(0)
    tl.store(y_ptr, row)
    tl.store(y_ptr + 1, first)
    tl.store(y_ptr + 2, nq)
    tl.store(y_ptr + 3, nk)


def test_a_sequence_is_a_row_or_a_document_within_one(device):
    found = torch.zeros(3, 4, dtype=torch.int64, device=device)
    _place[(3,)](torch.tensor([0, 4, 10, 20], dtype=torch.int32, device=device), found, 10, 10, VARLEN=True)
    assert found.tolist() == [[0, 0, 4, 4], [0, 4, 6, 6], [1, 0, 10, 10]]
    _place[(2,)](None, found, 7, 9, VARLEN=False)
    assert found[:2].tolist() == [[0, 0, 7, 9], [1, 0, 7, 9]]
