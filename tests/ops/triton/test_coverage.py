import logging
import re

import pytest
import torch

from difftune.ops import diff_attention, softmax_attention
from difftune.ops.diff_attention import _log_choice, choose_backend
from difftune.ops.triton import coverage
from difftune.ops.triton.coverage import why_not
from difftune.verification.equation import make_inputs


def inputs(kind="v1", D=32, dtype=torch.bfloat16):
    return make_inputs((1, 3, 3, 2, 1, D), kind, "layer", dtype)


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(coverage, "architecture", lambda device, index: 90)


@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_both_kinds_of_all_head_dims_are_covered(kind, D, on_h100):
    q, k, v, _ = inputs(kind, D)
    assert why_not(q, k, v, 0.1, auto=True) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda q, k, v: (q[..., :24], k[..., :24], v[..., :48], 1.0),
            "D=24, E=48, 2 keys a pair: .* D of 32, 64, 128",
        ),
        (lambda q, k, v: (q, k, v[..., :32], 1.0), "D=32, E=32, 2 keys a pair: .*E=2D for 2 keys"),
        (lambda q, k, v: (q.double(), k.double(), v.double(), 1.0), "float64: q, k and v must be all bfloat16"),
        (lambda q, k, v: (q.float(), k, v, 1.0), "bfloat16, torch.float32: q, k and v must be all"),
        (lambda q, k, v: (q, k, v, -1.0), r"scale=-1\.0: the kernels need a positive one"),
    ],
)
def test_what_is_not_covered_is_named(change, reason, on_h100):
    q, k, v, _ = inputs()
    *tensors, scale = change(q, k, v)
    assert re.search(reason, why_not(*tensors, scale, auto=False))


def test_float32_is_computed_when_named_and_not_chosen(on_h100):
    q, k, v, _ = inputs(dtype=torch.float32)
    assert why_not(q, k, v, 1.0, auto=False) is None
    assert why_not(q, k, v, 1.0, auto=True) == "float32 is computed without tensor cores"


@pytest.mark.parametrize(
    ("arch", "words"), [(-1, "device cpu"), (75, "compute capability 7.5"), (120, "capability 12")]
)
def test_other_devices_are_named_with_those_that_are_covered(arch, words, monkeypatch):
    monkeypatch.setattr(coverage, "architecture", lambda device, index: arch)
    q, k, v, lam = inputs()
    with pytest.raises(ValueError, match=rf"does not cover .*{words}.* 8\.0, 9\.0; choose backend='sdpa'"):
        diff_attention(q, k, v, lam, backend="triton")


def test_autocast_counts(on_h100):
    q, k, v, _ = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert why_not(q, k, v, 1.0, auto=True) is None


def test_without_triton_a_named_backend_is_an_import_error_with_the_install_line(monkeypatch):
    monkeypatch.setattr(coverage, "INSTALLED", False)
    with pytest.raises(ImportError, match=r"pip install triton .*or choose backend='sdpa'"):
        diff_attention(*inputs(), backend="triton")


def test_softmax_attention_is_refused():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="does not cover softmax attention"):
        softmax_attention(q[..., 0, :], k[..., 0, :], v, backend="triton")


class OnCuda:
    """What choosing a backend asks of queries."""

    is_cuda, dtype, shape, device = True, torch.bfloat16, (1, 3, 2, 2, 32), torch.device("cuda")


def test_auto_chooses_the_kernels_on_cuda_and_says_why_not_once(caplog, monkeypatch):
    monkeypatch.setattr("difftune.ops.flash.is_available", lambda: False)
    _log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="difftune"):
        assert choose_backend("auto", OnCuda(), lambda: None) == "triton"
        assert [choose_backend("auto", OnCuda(), lambda: "D=80") for _ in range(2)] == ["sdpa", "sdpa"]
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend: triton (auto, cuda, bfloat16)",
        "attention backend: sdpa (auto, cuda, bfloat16; not triton: D=80)",
    ]


def test_auto_does_not_choose_the_interpreter():
    assert choose_backend("auto", inputs()[0], lambda: None) == "sdpa"
