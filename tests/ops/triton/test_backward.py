import dataclasses

import pytest
import torch

from difftune.ops.triton import backward as module
from difftune.ops.triton.backward import backward
from difftune.ops.triton.forward import forward
from difftune.ops.triton.launch import Problem
from difftune.verification.equation import make_inputs
from tests.ops.equation import assert_equals_the_equation

pytestmark = pytest.mark.usefixtures("guards")


def problem_of(device, kind="v1", lam="layer", norm=True, dtype=torch.float32, shape=(1, 33, 33, 2, 1, 32)):
    q, k, v, lam, *weight = (x.to(device) for x in make_inputs(shape, kind, lam, dtype, norm))
    return Problem(q, k, v, lam, weight[0] if norm else None, None, None, 0, True, 32**-0.5, 1e-5)


def gradients(problem, cotangent):
    out, raw, negative, lse = forward(problem)
    return backward(cotangent, out if problem.norm_weight is None else raw, negative, lse, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_the_same_every_time_bit_by_bit(dtype, device):
    problem = problem_of(device, lam="head", dtype=dtype, shape=(1, 20, 20, 2, 1, 32))
    cotangent = torch.randn(problem.out_shape).to(device, dtype)
    first, second = gradients(problem, cotangent), gradients(problem, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("lam", ["layer", "head", "token"])
def test_gradients_have_shapes_and_dtypes_of_what_they_belong_to(lam, device):
    problem = problem_of(device, lam=lam, dtype=torch.bfloat16)
    found = gradients(problem, torch.randn(problem.out_shape).to(device, torch.bfloat16))
    for gradient, x in zip(found, (problem.q, problem.k, problem.v, problem.lam, problem.norm_weight), strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype) and gradient.is_contiguous()
    assert torch.isfinite(found[0]).all()


def test_a_cotangent_that_is_no_dense_tensor_is_taken(device):
    problem = problem_of(device, norm=False)
    expanded = torch.ones((), device=device).expand(problem.out_shape)
    for a, b in zip(gradients(problem, expanded), gradients(problem, expanded.contiguous()), strict=True):
        assert torch.equal(a, b)


def test_a_planted_error_of_one_percent_in_the_backward_is_caught(device, monkeypatch):
    def planted(grad, raw, negative, lse, problem):
        return backward(grad, raw, negative, lse, dataclasses.replace(problem, scale=1.01 * problem.scale))

    monkeypatch.setattr(module, "backward", planted)
    with pytest.raises(AssertionError, match=r"over budget: .*dq: error"):
        assert_equals_the_equation(make_inputs((1, 33, 33, 2, 1, 32), "v1", "layer", torch.float32), "triton", device)
