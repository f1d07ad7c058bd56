import pytest
import torch

from difftune.ops import Documents


def documents_of(lengths):
    return Documents(torch.tensor([0, *lengths]).cumsum(0))


def test_grouping_and_ungrouping_is_the_identity_on_tokens():
    documents = documents_of([3, 1, 20, 17, 2, 5, 16])
    x = torch.randn(2, 32, 3, 4)
    torch.testing.assert_close(documents.ungroup(documents.group(x), rows=2), x, atol=0, rtol=0)


def test_gradients_of_grouping_skip_the_padding():
    documents = documents_of([3, 1, 4])
    x = torch.randn(1, 8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: documents.ungroup(documents.group(x).square(), rows=1), x)


def test_buckets_hold_every_document_and_pad_at_most_a_fifth():
    lengths = [100, 99, 81, 80, 79, 50, 41, 40, 10, 9, 8, 1]
    buckets = documents_of(lengths).buckets
    assert sorted((n for b in buckets for n in b.lengths), reverse=True) == lengths
    assert all(n >= 0.8 * b.width for b in buckets for n in b.lengths)
    assert [b.start for b in buckets[1:]] == [b.start + b.rows * b.width for b in buckets[:-1]]


def test_document_ids_count_the_documents():
    assert documents_of([2, 1, 3]).document_ids.tolist() == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([1, 3]), r"must begin with 0 and increase strictly, got \[1, 3\]"),
        (torch.tensor([0, 3, 3]), "must begin with 0 and increase strictly"),
        (torch.tensor([0.0, 3.0]), r"must be integers of shape \(documents \+ 1,\), got torch.float32"),
        (torch.tensor([[0, 3]]), r"of shape \(1, 2\)"),
    ],
)
def test_boundaries_that_make_no_documents_are_refused(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        Documents(cu_seqlens)
