import pytest
import torch
import torch.nn.functional as F

from difftune.ops import Documents, diff_attention
from difftune.ops.sdpa import sdpa_attention
from difftune.verification.equation import make_inputs, scales_of
from tests.tolerances import assert_within_budget


def calls_of(monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        calls.append((tuple(q.shape), tuple(v.shape), options["attn_mask"] is not None, options["is_causal"]))
        return original(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def attend(T=8, S=8, E=8, **masks):
    options = {"causal": True, "key_padding_mask": None, "documents": None, "scale": 0.3, **masks}
    return sdpa_attention(torch.randn(2, T, 4, 4), torch.randn(2, S, 2, 4), torch.randn(2, S, 2, E), **options)


def test_causal_attention_needs_no_dense_mask(monkeypatch):
    calls = calls_of(monkeypatch)
    attend()
    assert calls == [((2, 4, 8, 8), (2, 2, 8, 8), False, True)], "one call, keys padded to the width of the values"


def test_decoding_one_token_needs_no_mask(monkeypatch):
    calls = calls_of(monkeypatch)
    attend(T=1, E=4)
    assert calls == [((2, 4, 1, 4), (2, 2, 8, 4), False, False)]


def test_documents_are_attended_in_buckets_without_a_mask(monkeypatch):
    calls = calls_of(monkeypatch)
    attend(E=4, documents=Documents(torch.tensor([0, 5, 8, 13, 16])))
    assert [(q, mask) for q, _, mask, _ in calls] == [((2, 4, 5, 4), False), ((2, 4, 3, 4), False)]


def test_rows_of_one_document_each_are_attended_as_they_stand(monkeypatch):
    calls = calls_of(monkeypatch)
    attend(E=4, documents=Documents(torch.tensor([0, 8, 16])))
    assert [q for q, *_ in calls] == [(2, 4, 8, 4)]


def test_documents_never_see_one_another():
    documents = Documents(torch.tensor([0, 5, 8, 16]))
    q, k, v = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 2, 4), torch.randn(1, 16, 2, 4)
    options = {"causal": True, "key_padding_mask": None, "documents": documents, "scale": 0.5}
    before = sdpa_attention(q, k, v, **options)
    k[:, :5], v[:, :5] = 7.0, -3.0
    after = sdpa_attention(q, k, v, **options)
    assert (before[:, :5] != after[:, :5]).any() and torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("lam", ["layer", "head", "token"])
@pytest.mark.parametrize(("T", "padding"), [(1, "left"), (1, None), (3, "right"), (8, "left")])
@pytest.mark.parametrize("G", [4, 2, 1])
def test_decoding_subtracts_the_maps_and_equals_the_equation(monkeypatch, kind, lam, T, padding, G):
    calls = calls_of(monkeypatch)
    inputs = make_inputs((2, T, 40, 4, G, 8), kind, lam, torch.float32)
    masks = {}
    if padding is not None:
        # The first row has keys that only some queries see; the last of its left-padded keys hides every earlier one.
        masks["key_padding_mask"] = torch.ones(2, 40, dtype=torch.bool)
        masks["key_padding_mask"][0, slice(37) if padding == "left" else slice(30, None)] = False
    precise = [x.double() for x in inputs]
    truth, plain = (diff_attention(*x, backend="reference", **masks) for x in (precise, inputs))
    ours = diff_attention(*inputs, backend="sdpa", **masks)
    assert calls == [] and ours.dtype == torch.float32
    scale = scales_of(precise, torch.zeros_like(truth), masks)["out"]
    assert_within_budget("out", ours, plain, truth, scale)


def test_what_learns_or_is_long_takes_the_fused_path(monkeypatch):
    calls = calls_of(monkeypatch)
    for T, dtype, learns in ((9, torch.float32, False), (1, torch.float32, True), (1, torch.bfloat16, False)):
        q, k, v, lam = make_inputs((1, T, 20, 2, 2, 8), "v1", "layer", dtype)
        diff_attention(q.requires_grad_(learns), k, v, lam, backend="sdpa")
        assert len(calls) == 2
        calls.clear()


def test_many_queries_at_the_end_of_more_keys_make_no_mask(monkeypatch):
    """As in a shared row, and in the evaluation of a long one with the cache."""
    calls = calls_of(monkeypatch)
    monkeypatch.setattr("difftune.ops.sdpa._MASK_ELEMENTS", 640)
    attend(T=40, S=64)
    assert calls == []
    attend(T=10, S=64)
    assert len(calls) == 1, "few are attended in one call, with a mask"
