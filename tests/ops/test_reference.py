import torch

from difftune.ops.documents import Documents
from difftune.ops.reference import reference_diff_attention, reference_maps


def equation_by_loops(q, k, v, lam, visible):
    """Eq. (1) a second time, one query at a time, nothing vectorised."""
    B, T, H, _, D = q.shape
    S, G = k.shape[1:3]
    out = torch.zeros(B, T, H, v.shape[-1], dtype=q.dtype)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h // (H // G)
                keys = [s for s in range(S) if visible(b, t, s)]
                for p, weight in ((0, 1.0), (1, -float(lam[b, t, h]))):
                    logits = torch.stack([q[b, t, h, p] @ k[b, s, g, p % k.shape[3]] / D**0.5 for s in keys])
                    weights = logits.exp() / logits.exp().sum()
                    out[b, t, h] += weight * sum(w * v[b, s, g] for w, s in zip(weights, keys, strict=True))
    return out


def test_reference_equals_a_second_formula():
    q, k, v = torch.randn(2, 3, 4, 2, 4), torch.randn(2, 5, 2, 2, 4), torch.randn(2, 5, 2, 8)
    q, k, v, lam = q.double(), k.double(), v.double(), torch.rand(2, 3, 4).double()
    expected = equation_by_loops(q, k, v, lam, lambda b, t, s: s <= t + 2)
    torch.testing.assert_close(reference_diff_attention(q, k, v, lam), expected)


def test_reference_of_shared_keys_and_documents_equals_a_second_formula():
    q, k, v = torch.randn(1, 6, 2, 2, 4), torch.randn(1, 6, 1, 1, 4), torch.randn(1, 6, 1, 4)
    q, k, v, lam = q.double(), k.double(), v.double(), torch.rand(1, 6, 2).double()
    document = [0, 0, 1, 1, 1, 2]
    expected = equation_by_loops(q, k, v, lam, lambda b, t, s: s <= t and document[s] == document[t])
    documents = Documents(torch.tensor([0, 2, 5, 6]))
    torch.testing.assert_close(reference_diff_attention(q, k, v, lam, documents=documents), expected)


def test_rows_of_the_maps_sum_to_one_and_respect_the_causal_mask():
    maps = reference_maps(torch.randn(1, 4, 2, 2, 8), torch.randn(1, 6, 1, 2, 8))
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 4))
        assert (weights.triu(3) == 0).all() and (weights.tril(2).sum(-1) > 0.99).all()
