import pytest
import torch

from difftune.evaluation.sampling import OwnDraws, row_seed


def frequencies(scores: list[float], temperature: float, top_p: float, rows: int = 20_000) -> torch.Tensor:
    """How often each token is drawn by rows of different seeds."""
    draws = OwnDraws([row_seed(0, number) for number in range(rows)], 3, 1, temperature, top_p)
    drawn = draws(torch.zeros(rows, 3, dtype=torch.long), torch.tensor([scores]).repeat(rows, 1))
    assert ((drawn == 0).sum(-1) == 1).all()
    return drawn.exp().mean(0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_is_their_probability(temperature: float) -> None:
    scores = [0.3, -1.0, 2.0, 0.0, -50.0]
    expected = (torch.tensor(scores) / temperature).softmax(-1)
    # Five standard deviations of a share of 20,000.
    assert (frequencies(scores, temperature, 1.0) - expected).abs().max() < 5 * 0.5 / 20_000**0.5


def test_only_the_most_likely_tokens_are_drawn_under_top_p() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.05, 0.35])
    found = frequencies(probabilities.log().tolist(), 1.0, 0.8)
    assert found[0] == found[2] == 0
    assert found[1] == pytest.approx(0.5 / 0.85, abs=5 * 0.5 / 20_000**0.5)
    assert frequencies(probabilities.log().tolist(), 1.0, 1e-6)[1] == 1


def test_a_row_draws_the_same_in_any_company() -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    seeds = [row_seed(7, number) for number in range(4)]

    def draw(rows: list[int], step: int) -> torch.Tensor:
        draws = OwnDraws([seeds[row] for row in rows], 5, 9, 1.0, 0.9)
        return draws(torch.zeros(len(rows), 5 + step, dtype=torch.long), scores[rows])

    for step in (0, 8):
        assert torch.equal(draw([0, 1, 2, 3], step)[[3, 1]], draw([3, 1], step))
    assert not torch.equal(draw([0, 1, 2, 3], 0), draw([0, 1, 2, 3], 8))


def test_a_token_without_probability_is_never_drawn() -> None:
    draws = OwnDraws([1], 0, 1, 1.0, 1.0)
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    for number in (0.0, 1.0 - 2**-24):
        draws._uniform = torch.tensor([[number]])
        assert draws(torch.zeros(1, 0, dtype=torch.long), scores).argmax() == 1
