import pytest
import torch
import torch.nn.functional as F

from difftune.ops import rms_norm
from difftune.verification.equation import outputs_and_gradients
from tests.tolerances import assert_within_budget


def equation(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 1), (130, 63), (2, 3, 4, 7)], ids=str)
def test_output_and_gradients_equal_the_equation(shape, dtype):
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    cotangent = torch.randn(shape)
    truth = outputs_and_gradients(lambda x, w: equation(x, w, 1e-5), [x.double(), weight.double()], cotangent)
    plain = outputs_and_gradients(lambda x, w: equation(x, w, 1e-5), [x, weight], cotangent)
    actual = outputs_and_gradients(lambda x, w: rms_norm(x, w, 1e-5), [x, weight], cotangent)
    # The gradient of x is a difference of two terms, that of the weight a sum with signs.
    normed = equation(x.double(), 1.0, 1e-5).abs()
    size = (cotangent.double() * weight.double()).abs() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    scales = {
        "dx": 2 * (size.amax() * normed.amax() * max(1.0, normed.mean().item())).item(),
        "dweight": (cotangent.double().abs() * normed).flatten(0, -2).sum(0).max().item(),
    }
    for name, a, p, t in zip(["out", "dx", "dweight"], actual, plain, truth, strict=True):
        assert_within_budget(name, a, p, t, scales.get(name))


def test_gradcheck():
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


def test_it_is_torchs_own_norm():
    x, weight = torch.randn(4, 5, 32), torch.randn(32)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (32,), weight, 1e-6))


def test_zeros_stay_zeros_and_their_gradient_is_finite():
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), 1e-5)
    out.sum().backward()
    assert (out == 0).all() and x.grad.isfinite().all()


def test_a_weight_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\), got \(4,\)"):
        rms_norm(torch.zeros(2, 8), torch.ones(4), 1e-5)
