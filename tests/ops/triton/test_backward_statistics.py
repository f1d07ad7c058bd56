import torch

from difftune.ops import rms_norm
from difftune.ops.triton.backward_statistics import statistics_kernel
from difftune.ops.triton.launch import is_interpreted


def launch(grad, raw, negative, lam, weight, device):
    B, T, H, E = grad.shape
    rows = 32
    blocks = -(-T // rows)
    delta = torch.full((2, B, H, T), torch.nan, device=device)
    grad_raw = torch.full_like(grad, torch.nan)
    partial = torch.full((blocks * B * H, E), torch.nan, device=device)
    statistics_kernel[(blocks * B * H,)](
        grad, raw, negative, lam, weight, grad_raw, delta[0], delta[1], partial, 0, 0, 1, H, T, blocks, 1e-5,
        E=E, ROWS=rows, LAM_TOKEN=False, NORM=weight is not None, INTERPRET=is_interpreted(),
    )  # fmt: skip
    return grad_raw, delta, partial.sum(0)


def test_the_norm_s_backward_is_autograd_s(device):
    grad, raw, negative = torch.randn(3, 2, 37, 3, 64, device=device)
    lam, weight = torch.rand(3, device=device), torch.randn(64, device=device)
    grad_raw, delta, dweight = launch(grad, raw, negative, lam, weight, device)
    leaves = [raw.double().requires_grad_(), weight.double().requires_grad_()]
    expected = torch.autograd.grad(rms_norm(*leaves, 1e-5), leaves, grad.double())
    torch.testing.assert_close(grad_raw.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight.double(), expected[1], rtol=1e-5, atol=1e-4)
    positive = raw + lam[:, None] * negative
    for i, out in enumerate((positive, negative)):
        rows = (grad_raw * out).sum(-1).transpose(1, 2)
        torch.testing.assert_close(delta[i], rows, rtol=1e-5, atol=1e-4)


def test_without_a_norm_the_gradient_is_read_as_it_is(device):
    grad, raw, negative = torch.randn(3, 1, 5, 3, 32, device=device)
    grad_raw, delta, _ = launch(grad, raw, negative, torch.zeros(3, device=device), None, device)
    assert grad_raw.isnan().all(), "nothing is written"
    torch.testing.assert_close(delta[0], (grad * raw).sum(-1).transpose(1, 2))
