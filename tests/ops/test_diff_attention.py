import logging

import pytest
import torch

from difftune.ops import diff_attention, softmax_attention
from difftune.ops.diff_attention import _log_choice
from difftune.ops.reference import reference_maps
from difftune.verification.equation import make_inputs, softmax_deviations
from tests.ops.equation import assert_equals_the_equation
from tests.tolerances import assert_within_budget

# (B, T, S, H, G, D): T = S, T < S, one token, GQA ratios 1, 2 and all heads in one group, head dims not powers of two.
SHAPES = [
    pytest.param((2, 63, 63, 4, 4, 16), id="mha"),
    pytest.param((1, 130, 130, 4, 2, 32), id="gqa"),
    pytest.param((3, 1, 1, 2, 1, 20), id="one-token"),
    pytest.param((2, 1, 63, 4, 1, 32), id="decode-mqa"),
    pytest.param((1, 63, 130, 4, 2, 60), id="bottom-right"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAMBDAS = ["layer", "head", "token"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sdpa_equals_the_equation(shape, kind, lam, dtype):
    assert_equals_the_equation(make_inputs(shape, kind, lam, dtype), "sdpa")


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_equal_the_equation(kind, causal):
    inputs = make_inputs((2, 70, 70, 4, 2, 16), kind, "token", torch.float32)
    cu_seqlens = torch.tensor([0, 1, 30, 64, 70, 71, 135, 140])
    assert_equals_the_equation(inputs, "sdpa", cu_seqlens=cu_seqlens, causal=causal)


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("queries", [1, 7, 20])
def test_key_padding_equals_the_equation(kind, side, queries):
    inputs = make_inputs((3, queries, 20, 4, 2, 16), kind, "head", torch.float32)
    mask = torch.arange(20) < torch.tensor([20, 13, 1])[:, None]
    assert_equals_the_equation(inputs, "sdpa", key_padding_mask=mask.flip(1) if side == "left" else mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["sdpa"])
def test_the_sublayer_norm_equals_the_equation(backend, dtype):
    assert_equals_the_equation(make_inputs((1, 63, 63, 4, 2, 32), "v1", "layer", dtype, norm=True), backend)


def test_a_norm_weight_of_another_width_is_refused():
    q, k, v, lam, weight = make_inputs((1, 3, 3, 2, 1, 8), "v1", "layer", torch.float32, norm=True)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(16,\), got \(15,\)"):
        diff_attention(q, k, v, lam, norm_weight=weight[:15])


def test_a_planted_error_of_one_percent_is_caught():
    inputs = make_inputs((1, 63, 63, 4, 2, 32), "v1", "layer", torch.float32)
    truth = diff_attention(*[x.double() for x in inputs], backend="reference")
    plain = diff_attention(*inputs, backend="reference")
    wrong = diff_attention(*inputs, backend="sdpa", scale=1.01 * 32**-0.5)
    with pytest.raises(AssertionError, match="over budget"):
        assert_within_budget("out", wrong, plain, truth)


def test_a_query_that_sees_no_key_returns_zero():
    inputs = make_inputs((2, 5, 5, 2, 1, 8), "v1", "layer", torch.float32)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    for backend in ("reference", "sdpa"):
        out = diff_attention(*inputs, key_padding_mask=mask, backend=backend)
        assert (out[0, :2] == 0).all() and (out[0, 2:] != 0).all()


def test_lambda_zero_is_plain_attention_of_the_positive_map():
    q, k, v, _ = make_inputs((1, 9, 9, 4, 2, 8), "v1", "layer", torch.float32)
    out = diff_attention(q, k, v, torch.tensor(0.0))
    torch.testing.assert_close(out, softmax_attention(q[..., 0, :], k[..., 0, :], v))


def test_negative_weights_are_kept():
    q, k, v, _ = make_inputs((1, 9, 9, 2, 1, 8), "v1", "layer", torch.float32)
    positive, negative = reference_maps(q, k)
    assert ((positive - 0.9 * negative) < 0).any()
    v = torch.ones_like(v)
    torch.testing.assert_close(
        diff_attention(q, k, v, torch.tensor(0.9)), torch.full((1, 9, 2, 16), 0.1), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_attention_equals_the_equation(shape):
    B, T, S, H, G, D = shape
    inputs = [torch.randn(B, T, H, D), torch.randn(B, S, G, D), torch.randn(B, S, G, D)]
    found = softmax_deviations(inputs, "sdpa")
    assert [deviation.name for deviation in found] == ["out", "dq", "dk", "dv"]
    assert all(deviation.holds for deviation in found), "; ".join(map(str, found))


def test_gradcheck_of_the_packed_path():
    inputs = make_inputs((1, 6, 6, 2, 1, 4), "v1", "token", torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    cu_seqlens = torch.tensor([0, 2, 5, 6])
    assert torch.autograd.gradcheck(
        lambda q, k, v, lam: diff_attention(q, k, v, lam, cu_seqlens=cu_seqlens, backend="sdpa"), inputs
    )


def test_auto_logs_its_choice_once(caplog):
    inputs = make_inputs((1, 3, 3, 2, 1, 8), "v1", "layer", torch.float32)
    _log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="difftune"):
        diff_attention(*inputs)
        diff_attention(*inputs)
    assert [record.getMessage() for record in caplog.records] == ["attention backend: sdpa (auto, cpu, float32)"]


def test_unknown_backend_is_refused_with_the_list():
    inputs = make_inputs((1, 3, 3, 2, 1, 8), "v1", "layer", torch.float32)
    with pytest.raises(ValueError, match="unknown attention backend 'fast', choose one of auto, reference"):
        diff_attention(*inputs, backend="fast")
