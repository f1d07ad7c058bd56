import pytest
import torch

from difftune.ops import ContextShard, Documents, diff_attention, softmax_attention

B, T, H, G, D = 2, 48, 4, 2, 4
DOCUMENTS = {
    "whole rows": None,
    "inside and across chunks": [5, 19, 24, 1, 11, 8, 28],
    "at the edges of chunks": [12, 12, 24, 24, 24],
    "single tokens": [1] * 48 + [47, 1],
}


def inputs(kind):
    pair, E = (2, 2 * D) if kind == "v1" else (1, D)
    q, k, v = torch.randn(B, T, H, 2, D), torch.randn(B, T, G, pair, D), torch.randn(B, T, G, E)
    return [x.double() for x in (q, k, v, torch.rand(() if kind == "v1" else (B, T, H)))]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_every_share_is_its_part_of_the_whole(kind, lengths, size):
    documents = None if lengths is None else Documents(torch.tensor([0, *lengths]).cumsum(0))
    q, k, v, lam = inputs(kind)
    whole = diff_attention(q, k, v, lam, cu_seqlens=documents)
    seen = []
    for rank in range(size):
        shard = ContextShard(rank, size, rows=B, length=T, documents=documents)
        weights = shard.split(lam) if lam.ndim == 3 else lam
        out = shard.attend(diff_attention, shard.split(q), k, v, weights)
        torch.testing.assert_close(out, shard.split(whole))
        seen += shard.tokens.tolist()
    assert sorted(seen) == list(range(T)), "every token belongs to one process"


def test_softmax_attention_is_shared_alike():
    q, k, v = torch.randn(B, T, H, D), torch.randn(B, T, G, D), torch.randn(B, T, G, D)
    whole = softmax_attention(q, k, v)
    for rank in (0, 1):
        shard = ContextShard(rank, 2, rows=B, length=T)
        torch.testing.assert_close(shard.attend(softmax_attention, shard.split(q), k, v), shard.split(whole))


@pytest.mark.parametrize("size", [2, 4])
def test_every_process_attends_to_equally_many_keys(size):
    """Head and tail together: without it the last of 4 would have 7 times the work of the first."""
    work = []
    for rank in range(size):
        shard = ContextShard(rank, size, rows=1, length=960)
        work.append(int((shard.tokens + 1).sum()))
    assert len(set(work)) == 1


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(
        ValueError, match="rows of 50 tokens cannot be shared by 2 processes: give rows of a multiple of 4"
    ):
        ContextShard(0, 2, rows=1, length=50)
    with pytest.raises(ValueError, match="cu_seqlens ends at 40"):
        ContextShard(0, 2, rows=1, length=48, documents=Documents(torch.tensor([0, 40])))
