import pytest
import torch

from difftune.training.gradients import rescale_and_clip_


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e9])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_it_equals_scaling_and_then_torchs_clipping(scale, max_norm):
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4), torch.randn(5), torch.randn(())]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * scale
    expected = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
    norm = rescale_and_clip_(gradients, torch.tensor(scale, dtype=torch.float64), max_norm)
    torch.testing.assert_close(norm, expected)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_factor_is_not_rounded_to_bfloat16():
    gradient = torch.full((4,), 256.0, dtype=torch.bfloat16)
    # 1/259 in bfloat16 is 0.39% off; the result then rounds to another bfloat16 number.
    rescale_and_clip_([gradient, torch.zeros(2)], torch.tensor(1 / 259, dtype=torch.float64))
    assert torch.equal(gradient, torch.full((4,), 256 / 259).bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows_in_the_norm(value):
    gradients = [torch.ones(3), torch.tensor([1.0, value])]
    assert not rescale_and_clip_(gradients, torch.tensor(0.5), 1.0).isfinite()
