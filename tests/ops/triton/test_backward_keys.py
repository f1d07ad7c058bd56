import pytest
import torch

from difftune.ops import diff_attention
from difftune.verification.equation import make_inputs

pytestmark = pytest.mark.usefixtures("guards")


def gradients(q, k, v, lam, **masks):
    k, v = k.clone().requires_grad_(), v.clone().requires_grad_()
    out = diff_attention(q, k, v, lam, backend="triton", **masks)
    return torch.autograd.grad(out.sum(), [k, v])


def test_a_key_that_nobody_sees_has_gradient_zero_though_its_logits_are_huge(device):
    q, k, v, lam = (x.to(device) for x in make_inputs((1, 20, 20, 2, 1, 32), "v1", "layer", torch.float32))
    k[:, 3] *= 1e4
    mask = torch.ones(1, 20, dtype=torch.bool, device=device)
    mask[0, 3] = False
    for gradient in gradients(q, k, v, lam, key_padding_mask=mask):
        assert (gradient[:, 3] == 0).all() and torch.isfinite(gradient).all() and (gradient[:, 2] != 0).any()


def test_keys_of_a_group_gather_the_gradients_of_its_heads(device):
    q, k, v, lam = (x.to(device) for x in make_inputs((1, 20, 20, 4, 2, 32), "v1", "head", torch.float32))
    whole = gradients(q, k, v, lam)
    heads = [gradients(q[:, :, [i, i + 2]], k, v, lam[[i, i + 2]]) for i in (0, 1)]
    for found, first, second in zip(whole, *heads, strict=True):
        torch.testing.assert_close(found, first + second, rtol=1e-5, atol=1e-5)
