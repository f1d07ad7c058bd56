"""The decode kernels against the equation in float64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from difftune.ops.reference import reference_diff_attention, reference_maps
from difftune.ops.triton.cached_attention import diff_attention_decode
from tests.tolerances import assert_within_budget

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 4096
# (B, T, S, H, G, D): one key; GQA with a group of 3, which is no power of two; a chunk of queries; more query rows
# than one tile has; no length is a multiple of a tile.
SHAPES = [
    pytest.param((2, 1, 1, 2, 2, 16), id="one-key"),
    pytest.param((1, 1, 63, 6, 2, 32), id="gqa"),
    pytest.param((1, 3, 130, 2, 1, 16), id="chunk"),
    pytest.param((1, 7, 70, 3, 1, 16), id="two-tiles-of-queries"),
    pytest.param((1, 1, 63, 1, 1, 128), id="wide"),
]


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """Every buffer that a kernel may write is NaN at first, between two bands that must be NaN in the end too."""
    buffers = []

    def empty(*shape, dtype=torch.float32, device=None):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield buffers
    assert all(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all() for buffer in buffers)


def make_inputs(shape, kind, dtype, lam="token"):
    B, T, S, H, G, D = shape
    pair, E = (2, 2 * D) if kind == "v1" else (1, D)
    lam_shape = {"layer": (), "head": (H,), "token": (B, T, H)}[lam]
    shapes = [(B, T, H, 2, D), (B, S, G, pair, D), (B, S, G, E)]
    return [amid_nan(torch.randn(shape).to(DEVICE, dtype)) for shape in shapes] + [torch.rand(lam_shape).to(DEVICE)]


def amid_nan(x):
    """``x`` with NaN before and behind every row of the batch: what is read beside it shows."""
    room = x.new_full((x.shape[0], x.shape[1] + 8, *x.shape[2:]), float("nan"))
    room[:, 4:-4] = x
    return room[:, 4:-4]


def assert_equals_the_equation(actual, inputs, lengths=None, norm=None, **masks):
    """Row by row, so that rows of unequal length need no mask."""
    q, k, v, lam = inputs
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    lam = lam if lam.ndim == 3 else lam.expand(B, T, q.shape[2])
    for b, n in enumerate([S] * B if lengths is None else lengths):
        row = [x[b : b + 1] for x in (q, k[:, :n], v[:, :n])]
        options = {name: m[b : b + 1, :n] if isinstance(m, torch.Tensor) else m for name, m in masks.items()}
        exact = [x.double() for x in row]
        truth = reference_diff_attention(*exact, lam[b : b + 1].double(), **options)
        plain = reference_diff_attention(*row, lam[b : b + 1].to(q.dtype), **options)
        positive, negative = reference_maps(exact[0], exact[1], **options)
        both = positive + lam.max().item() * negative
        v_heads = exact[2].abs().repeat_interleave(q.shape[2] // v.shape[2], 2)
        scale = torch.einsum("bhts,bshe->bthe", both, v_heads).max().item()
        if norm is not None:
            truth, plain = (torch.nn.functional.rms_norm(x, norm.shape, norm.to(x.dtype), 1e-5) for x in (truth, plain))
            scale = None
        assert_within_budget(f"row {b}", actual[b : b + 1], plain, truth, scale)


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_the_equation(shape, kind):
    inputs = make_inputs(shape, kind, torch.float32)
    assert_equals_the_equation(diff_attention_decode(*inputs, num_splits=2), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_decoding_in_half_the_bits_equals_the_equation(kind, dtype):
    inputs = make_inputs((1, 2, 63, 2, 1, 32), kind, dtype)
    assert_equals_the_equation(diff_attention_decode(*inputs, num_splits=2), inputs)


@pytest.mark.parametrize("lam", ["layer", "head"])
@pytest.mark.parametrize("splits", [1, 3])
def test_any_number_of_splits_gives_the_same(lam, splits):
    inputs = make_inputs((1, 2, 70, 2, 1, 16), "v1", torch.float32, lam)
    assert_equals_the_equation(diff_attention_decode(*inputs, num_splits=splits), inputs)


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("queries", [1, 3])
def test_rows_of_unequal_length_in_a_cache_of_fixed_size(kind, queries):
    inputs = make_inputs((3, queries, 40, 2, 1, 16), kind, torch.float32)
    lengths = [40, 33, queries]
    for x in inputs[1:3]:
        for b, n in enumerate(lengths):
            x[b, n:] = float("nan")
    out = diff_attention_decode(*inputs, lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE), num_splits=2)
    assert_equals_the_equation(out, inputs, lengths)


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("page", [8, 64])
def test_pages_in_any_order(kind, page):
    inputs = make_inputs((2, 2, 100, 2, 1, 16), kind, torch.float32)
    lengths = [100, 35]
    pages = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(pages) + 1).tolist()
    # Behind the pages of the shorter row the table points nowhere: it must not be read.
    table = torch.full((2, max(pages)), 2**30, dtype=torch.int32)
    caches = [x.new_full((sum(pages) + 1, page, *x.shape[2:]), float("nan")) for x in inputs[1:3]]
    for b, n in enumerate(lengths):
        for i in range(pages[b]):
            table[b, i] = order.pop()
            for cache, x in zip(caches, inputs[1:3], strict=True):
                piece = x[b, i * page : min(n, (i + 1) * page)]
                cache[table[b, i], : len(piece)] = piece
    out = diff_attention_decode(
        inputs[0],
        *caches,
        inputs[3],
        lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        block_table=table.to(DEVICE),
        num_splits=2,
    )
    assert_equals_the_equation(out, inputs, lengths)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_padding_on_either_side(kind, side):
    inputs = make_inputs((3, 2, 40, 2, 1, 16), kind, torch.float32)
    mask = torch.arange(40, device=DEVICE) < torch.tensor([40, 23, 2], device=DEVICE)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    out = diff_attention_decode(*inputs, key_padding_mask=mask, num_splits=2)
    assert_equals_the_equation(out, inputs, key_padding_mask=mask)


def test_a_query_that_sees_no_key_returns_zero():
    inputs = make_inputs((2, 2, 20, 2, 1, 16), "v1", torch.float32)
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    out = diff_attention_decode(*inputs, key_padding_mask=mask, num_splits=2)
    assert (out[1] == 0).all() and (out[0] != 0).all()
    norm_weight = torch.ones(32, device=DEVICE)
    assert (diff_attention_decode(*inputs, key_padding_mask=mask, norm_weight=norm_weight)[1] == 0).all()


def test_the_sublayer_norm_is_part_of_the_last_kernel():
    inputs = make_inputs((1, 2, 40, 2, 1, 16), "v1", torch.float32)
    weight = torch.rand(32, device=DEVICE)
    out = diff_attention_decode(*inputs, norm_weight=weight, norm_eps=1e-5)
    assert_equals_the_equation(out, inputs, norm=weight)


def test_queries_may_see_one_another_without_the_causal_mask():
    inputs = make_inputs((1, 3, 40, 2, 1, 16), "v1", torch.float32)
    assert_equals_the_equation(diff_attention_decode(*inputs, causal=False), inputs, causal=False)


def test_caches_are_read_where_they_lie():
    """Heads before tokens, as transformers' caches; and values in two halves, as DiffLlama's."""
    q, k, v, lam = make_inputs((1, 1, 40, 4, 2, 16), "v1", torch.float32)
    expected = diff_attention_decode(q, k, v, lam)
    k_cache = k.flatten(3).transpose(1, 2).contiguous()
    v_halves = v.unflatten(-1, (2, 16)).permute(0, 3, 2, 1, 4).contiguous()
    out = diff_attention_decode(q, k_cache.transpose(1, 2).unflatten(-1, (2, 16)), v_halves.permute(0, 3, 2, 1, 4), lam)
    assert torch.equal(out, expected)


def test_a_planted_error_of_one_percent_is_caught():
    inputs = make_inputs((1, 1, 63, 2, 2, 16), "v1", torch.float32)
    wrong = diff_attention_decode(*inputs, scale=1.01 * 16**-0.5)
    with pytest.raises(AssertionError, match="over budget"):
        assert_equals_the_equation(wrong, inputs)


def test_every_program_of_a_wave_has_work():
    from difftune.ops.triton.decode import MAX_SPLITS, choose_splits

    assert choose_splits(programs=264, num_keys=8192, slots=264) == 1
    assert choose_splits(programs=8, num_keys=100, slots=264) == 1
    assert 0.9 * MAX_SPLITS < choose_splits(programs=1, num_keys=10**6, slots=264) <= MAX_SPLITS
    splits = choose_splits(programs=96, num_keys=8192, slots=264)
    assert 96 * splits / (-(-96 * splits // 264) * 264) > 0.9


def test_the_tile_is_small_enough_for_two_programs_a_multiprocessor():
    from difftune.ops.triton.decode import tile_of

    for arch, stages in ((80, 2), (90, 3)):
        for head_dim in (32, 64, 128):
            for halves in (1, 2):
                tile = tile_of(head_dim, 8, halves, 2, arch, paged=False)
                assert tile.stages == stages and tile.columns * 2 * halves * head_dim * 2 <= 32 * 1024
