"""Every backend on the GPU: output and gradients against the equation, packed, padded, compiled; else skipped."""

import pytest
import torch

from difftune.ops import diff_attention, flash
from difftune.verification.equation import make_inputs
from tests.ops.equation import assert_equals_the_equation

pytestmark = pytest.mark.gpu

BACKENDS = ["sdpa", "flash", "triton"]
# (B, T, S, H, G, D): GQA and lengths that are no multiple of a tile; bottom-right; the widest head.
SHAPES = [(2, 130, 130, 4, 2, 64), (1, 63, 200, 2, 2, 64), (1, 130, 130, 2, 1, 128)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "flash" and not flash.is_available():
        pytest.skip("flash-attn is not installed")
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def skip_unless_taken(backend, dtype):
    if backend == "flash" and dtype == torch.float32:
        pytest.skip("flash-attn takes 16 bits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["v1", "v2"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_equal_the_equation(shape, kind, dtype, backend):
    skip_unless_taken(backend, dtype)
    lam = "layer" if kind == "v1" else "token"
    assert_equals_the_equation(make_inputs(shape, kind, lam, dtype, norm=kind == "v1"), backend, device="cuda")


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_packed_documents_equal_the_equation(kind, backend):
    inputs = make_inputs((2, 140, 140, 4, 2, 64), kind, "token", torch.bfloat16)
    cu_seqlens = torch.tensor([0, 1, 60, 140, 270, 280])
    assert_equals_the_equation(inputs, backend, device="cuda", cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_padding_equals_the_equation(kind, backend):
    if backend == "flash":
        pytest.skip("flash-attn returns 0 for queries that are padding, which no loss reads")
    inputs = make_inputs((3, 70, 70, 4, 2, 64), kind, "head", torch.bfloat16)
    mask = (torch.arange(70) < torch.tensor([70, 33, 2])[:, None]).flip(1)
    assert_equals_the_equation(inputs, backend, device="cuda", key_padding_mask=mask)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_compiled_equals_uncompiled(kind, backend):
    inputs = [x.cuda() for x in make_inputs((1, 130, 130, 4, 2, 64), kind, "head", torch.bfloat16, norm=True)]

    def attend(q, k, v, lam, norm_weight):
        return diff_attention(q, k, v, lam, norm_weight=norm_weight, backend=backend)

    def outputs(function):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    torch._dynamo.reset()
    for actual, expected in zip(outputs(torch.compile(attend)), outputs(attend), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps * scale)


def test_a_row_longer_than_two_to_the_31_elements_apart():
    """Offsets are 64 bits: the second row of the cache begins beyond what 32 bits reach."""
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    far = torch.zeros(2, 2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    k = far[:, : 64 * 2 * 32].view(2, 64, 1, 2, 32)
    k.copy_(torch.randn(2, 64, 1, 2, 32))
    q, v = torch.randn(2, 64, 1, 2, 32).to(k), torch.randn(2, 64, 1, 64).to(k)
    lam = torch.tensor(0.5, device="cuda")
    for queries in (q, q[:, -1:]):
        with torch.no_grad():
            far_away, near = (diff_attention(queries, x, v, lam, backend="triton") for x in (k, k.contiguous()))
        assert torch.equal(far_away, near)
