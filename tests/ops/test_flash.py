"""Flash-attn runs on a GPU only; what surrounds its calls is tested with a stand-in of the same interface."""

import sys
from types import SimpleNamespace

import pytest
import torch

from difftune.ops import Documents, diff_attention, flash
from difftune.ops.reference import reference_diff_attention, reference_softmax_attention


def stand_in(returns_tuple):
    def flash_attn_func(q, k, v, causal, softmax_scale):
        assert q.shape[-1] == v.shape[-1], "flash-attn 2 wants equal widths"
        out = reference_softmax_attention(q.float(), k.float(), v.float(), causal=causal, scale=softmax_scale)
        return (out.to(q.dtype), None) if returns_tuple else out.to(q.dtype)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale):
        assert cu_seqlens_q.dtype == torch.int32 and q.ndim == 3
        parts = []
        for i in range(len(cu_seqlens_q) - 1):
            a, b, c, d = *cu_seqlens_q[i : i + 2].tolist(), *cu_seqlens_k[i : i + 2].tolist()
            assert b - a <= max_seqlen_q and d - c <= max_seqlen_k
            out = flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], causal, softmax_scale)
            parts.append((out[0] if returns_tuple else out)[0])
        return (torch.cat(parts), None) if returns_tuple else torch.cat(parts)

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.fixture(params=[False, True], ids=["returns-out", "returns-out-and-lse"])
def installed(monkeypatch, request):
    flash.load_flash.cache_clear()
    monkeypatch.setattr(flash, "MODULES", ("stand_in_for_flash",))
    monkeypatch.setitem(sys.modules, "stand_in_for_flash", stand_in(request.param))
    yield
    flash.load_flash.cache_clear()


def make_inputs(kind, T=12, S=12):
    pair, E = (2, 16) if kind == "v1" else (1, 8)
    shapes = [(2, T, 4, 2, 8), (2, S, 2, pair, 8), (2, S, 2, E)]
    return [torch.randn(shape).half() for shape in shapes] + [torch.rand(4)]


def masks_of(name, T, S):
    if name == "documents":
        return {"cu_seqlens": torch.tensor([0, 5, 12, 20, 24])}
    if name == "left-padded":
        return {"key_padding_mask": torch.arange(S) >= torch.tensor([0, S - T + 1 if T > 1 else 4])[:, None]}
    return {}


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize(
    ("mask", "T", "S"),
    [
        ("none", 12, 12),
        ("none", 1, 12),
        ("documents", 12, 12),
        ("left-padded", 12, 12),
        ("left-padded", 1, 12),
    ],
)
def test_composition_equals_the_reference(installed, kind, mask, T, S):
    q, k, v, lam = make_inputs(kind, T, S)
    masks = masks_of(mask, T, S)
    out = diff_attention(q, k, v, lam, backend="flash", **masks)
    documents = Documents(masks.pop("cu_seqlens")) if "cu_seqlens" in masks else None
    truth = reference_diff_attention(q.double(), k.double(), v.double(), lam.double(), documents=documents, **masks)
    torch.testing.assert_close(out.double(), truth, atol=4e-3, rtol=0)


def test_absent_flash_attn_is_an_import_error_with_the_install_line(monkeypatch):
    flash.load_flash.cache_clear()
    monkeypatch.setattr(flash, "MODULES", ("no_such_flash",))
    with pytest.raises(ImportError, match=r"pip install 'difftune\[flash\]'.*or choose backend='sdpa'"):
        diff_attention(*make_inputs("v1"), backend="flash")
    assert not flash.is_available()
    flash.load_flash.cache_clear()


def test_a_broken_flash_attn_shows_its_own_error(monkeypatch, tmp_path):
    (tmp_path / "broken_flash.py").write_text("import a_library_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    flash.load_flash.cache_clear()
    monkeypatch.setattr(flash, "MODULES", ("broken_flash",))
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        flash.load_flash()
    flash.load_flash.cache_clear()


def test_float32_is_refused_not_cast(installed):
    q, k, v, lam = (x.float() for x in make_inputs("v1"))
    with pytest.raises(ValueError, match=r"takes float16 or bfloat16, got torch\.float32"):
        diff_attention(q, k, v, lam, backend="flash")


def test_widths_that_flash_cannot_cut_are_refused(installed):
    q, k, v, lam = make_inputs("v1")
    with pytest.raises(ValueError, match="E a multiple of D, got D=8, E=15"):
        diff_attention(q, k, v[..., :15], lam, backend="flash")


@pytest.mark.gpu
def test_real_flash_attn_equals_the_reference():
    pytest.importorskip("flash_attn")
    q, k, v, lam = (x.cuda() for x in make_inputs("v1"))
    out = diff_attention(q, k, v, lam, backend="flash")
    truth = reference_diff_attention(q.double(), k.double(), v.double(), lam.double())
    torch.testing.assert_close(out.double(), truth, atol=4e-3, rtol=0)
