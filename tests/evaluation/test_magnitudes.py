import pytest
import torch

from difftune.evaluation.magnitudes import Magnitudes


def measured(*chunks: torch.Tensor) -> Magnitudes:
    found = Magnitudes()
    for chunk in chunks:
        found.add(chunk)
    found.end_first_pass()
    for chunk in reversed(chunks):
        found.add_again(chunk)
    return found


def test_known_numbers_have_their_known_top_and_median():
    numbers = torch.arange(-1000, 1001, dtype=torch.float32)[torch.randperm(2001)]
    figures = measured(*numbers.split(17)).figures()
    assert figures == {
        "top_1": 1000, "top_2": 1000, "top_3": 999, "top_10": 996, "top_100": 951, "median": 500,
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 100, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_in_pieces_equals_a_sort_of_the_whole(size, dtype):
    numbers = (torch.randn(size) * torch.randn(size).exp() ** 4).to(dtype)
    found = measured(*numbers.split(13))
    in_order = numbers.float().abs().sort(descending=True).values
    assert torch.equal(found.top, in_order[:100])
    assert found.median() == numbers.float().abs().median().item()


def test_equal_numbers_zeros_and_denormals_are_counted():
    assert measured(torch.full((1000,), -2.5)).median() == 2.5
    assert measured(torch.zeros(7), torch.ones(3)).median() == 0
    tiny = torch.tensor([1e-42, 2e-42, 3e-42])
    assert measured(tiny).median() == tiny[1].item()


def test_a_second_pass_with_other_numbers_is_refused():
    found = Magnitudes()
    found.add(torch.ones(5))
    found.end_first_pass()
    found.add_again(torch.full((5,), 7.0))
    with pytest.raises(RuntimeError, match="not deterministic"):
        found.median()
