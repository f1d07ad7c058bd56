import pytest
import torch

from difftune.ops import diff_attention
from difftune.verification.equation import make_inputs

pytestmark = pytest.mark.usefixtures("guards")


def test_a_query_that_sees_no_key_has_gradient_zero(device):
    q, k, v, lam = (x.to(device) for x in make_inputs((1, 20, 20, 2, 1, 32), "v2", "layer", torch.float32))
    q.requires_grad_()
    mask = torch.arange(20, device=device)[None] >= 5
    out = diff_attention(q, k, v, lam, backend="triton", key_padding_mask=mask)
    (gradient,) = torch.autograd.grad(out.sum(), [q])
    assert (gradient[:, :5] == 0).all() and torch.isfinite(gradient).all() and (gradient[:, 6:] != 0).any()


def test_lambda_zero_leaves_the_negative_queries_without_gradient(device):
    q, k, v, _ = (x.to(device) for x in make_inputs((1, 20, 20, 2, 1, 32), "v1", "layer", torch.float32))
    q.requires_grad_()
    out = diff_attention(q, k, v, torch.zeros((), device=device), backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), [q])
    assert (gradient[..., 1, :] == 0).all() and (gradient[:, 1:, :, 0] != 0).any()
