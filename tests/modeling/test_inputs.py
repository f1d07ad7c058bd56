import pytest
import torch

from difftune.modeling.inputs import count_positions, documents_of_positions, find_documents, key_padding_mask
from difftune.ops import Documents

X = torch.zeros(2, 4, 8)


@pytest.mark.parametrize(
    ("positions", "ends"),
    [
        ([[0, 1, 2, 3], [0, 1, 2, 3]], None),
        ([[5, 6, 7, 8], [1, 2, 3, 4]], None),
        ([[0, 1, 0, 1], [0, 1, 2, 3]], [0, 2, 4, 8]),
        ([[3, 0, 1, 2], [0, 0, 0, 1]], [0, 1, 4, 5, 6, 8]),
        ([[0, 1, 5, 6], [0, 1, 2, 3]], [0, 2, 4, 8]),
    ],
)
def test_a_document_begins_where_positions_do_not_count_on(positions, ends):
    found = documents_of_positions(torch.tensor(positions))
    assert (None if found is None else found.cu_seqlens.tolist()) == ends


def test_boundaries_are_the_same_under_every_name_and_count_before_positions():
    ends = torch.tensor([0, 2, 4, 8])
    for given in (
        (ends, None, None, None),
        (None, ends, ends, None),
        (None, None, None, torch.tensor([[0, 0, 1, 1], [7] * 4])),
    ):
        assert find_documents(X, *given, torch.zeros(2, 4).long()).cu_seqlens.tolist() == [0, 2, 4, 8]
    assert find_documents(X, None, None, None, None, None) is None
    assert find_documents(X, None, None, None, torch.zeros(1, 4), None) is None
    made = Documents(ends)
    assert find_documents(X, made, None, None, None, None) is made


def test_boundaries_that_do_not_fill_the_rows_are_refused():
    with pytest.raises(ValueError, match="across a row boundary"):
        find_documents(X, torch.tensor([0, 5, 8]), None, None, None, None)
    with pytest.raises(ValueError, match="across a row boundary"):
        find_documents(X, None, torch.tensor([0, 8]), torch.tensor([0, 8]), None, None)


def test_positions_are_counted_from_the_cache_or_in_each_document():
    assert count_positions(X, 3, None).tolist() == [[3, 4, 5, 6]]
    documents = Documents(torch.tensor([0, 1, 4, 8]))
    assert count_positions(X, 0, documents).tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]


def test_padding_on_the_right_needs_no_mask():
    assert key_padding_mask(None, 2, 4, 0) is None
    assert key_padding_mask(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), 2, 4, 0) is None
    left = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(key_padding_mask(left, 2, 4, 0), left.bool())
    # With a cache the end of the mask is not the end of the row.
    assert key_padding_mask(torch.tensor([[1, 0], [1, 1]]), 2, 1, 1) is not None
