import torch
import torch.nn.functional as F

from difftune.ops import Documents
from difftune.ops.sdpa import sdpa_attention


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
