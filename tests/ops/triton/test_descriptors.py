"""The kernel for keys and values by tensor descriptors: against the equation, and against itself by pointers."""

import pytest
import torch

from difftune.ops.triton import backward as module
from difftune.ops.triton.backward import backward
from difftune.ops.triton.descriptors import describe_heads, is_aligned
from difftune.ops.triton.forward import forward
from difftune.ops.triton.launch import Problem, architecture
from difftune.ops.triton.tiles import SMALL, TILES
from difftune.verification.equation import make_inputs
from tests.ops.equation import assert_equals_the_equation
from tests.ops.triton.conftest import among_nans

DOCUMENTS = torch.tensor([0, 1, 24, 40])


@pytest.fixture
def use_descriptors(device, monkeypatch, guards):
    """A switch for the tiles in use, and the list of shapes described since."""
    arch = architecture(device, 0)
    if arch not in (SMALL, 90):
        pytest.skip("TMA came with compute capability 9.0")
    described = []

    def switch():
        for dims, tiles in list(TILES[arch].items()):
            monkeypatch.setitem(TILES[arch], dims, tiles._replace(descriptors=True))

    def noted(function):
        return lambda x, *block: described.append(tuple(x.shape)) or function(x, *block)

    for name in ("describe", "describe_heads"):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    switch.described = described
    return switch


def dtype_of(device):
    """Float32 is never read by descriptors where kernels are compiled: its tiles are others."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def gradients(tensors, causal=True):
    q, k, v, lam, *weight = tensors
    problem = Problem(q, k, v, lam, weight[0] if weight else None, None, None, 0, causal, 0.2, 1e-5)
    out, raw, negative, lse = forward(problem)
    cotangent = torch.linspace(-1, 1, out.numel(), device=q.device).view_as(out).to(q.dtype)
    return backward(cotangent, raw if weight else out, negative, lse, problem)


# (B, T, S, H, G, D), and how many tensors have descriptors: 21 statistics in a row lie as TMA does not allow, documents
# begin anywhere.
CASES = {
    "dense": ((2, 20, 20, 2, 2, 32), "v1", "layer", {}, 4),
    "rows of 21": ((1, 21, 37, 2, 1, 32), "v1", "head", {}, 0),
    "bottom-right, grouped": ((1, 20, 45, 4, 2, 32), "v1", "head", {}, 4),
    "everything seen": ((1, 20, 45, 2, 1, 32), "v1", "token", {"causal": False}, 4),
    "shared keys": ((1, 40, 40, 2, 1, 32), "v2", "token", {}, 4),
    "documents": ((1, 40, 40, 2, 1, 32), "v1", "layer", {"cu_seqlens": DOCUMENTS}, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_descriptors_equal_the_equation(name, device, use_descriptors):
    shape, kind, lam, masks, number = CASES[name]
    use_descriptors()
    inputs = make_inputs(shape, kind, lam, dtype_of(device), norm=kind == "v1")
    assert_equals_the_equation(inputs, "triton", device, **masks)
    assert len(use_descriptors.described) == number


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[-1]])
def test_descriptors_and_pointers_give_the_same_gradients_bit_by_bit(name, device, use_descriptors):
    if device == "cuda":
        pytest.skip("two compiled kernels may round differently")
    (_, T, S, *heads), kind, lam, masks, number = CASES[name]
    # Two passes through the interpreter: one row, and fewer tokens.
    inputs = make_inputs((1, 20, 20 + S - T, *heads), kind, lam, torch.bfloat16, norm=kind == "v1")
    by_pointers = gradients(inputs, **masks)
    assert not use_descriptors.described
    use_descriptors()
    by_descriptors = gradients(inputs, **masks)
    assert len(use_descriptors.described) == number
    assert all(torch.equal(a, b) for a, b in zip(by_descriptors, by_pointers, strict=True))


def test_aligned_views_are_read_where_they_lie_and_nothing_beside_them(device, use_descriptors):
    use_descriptors()
    q, k, v, lam = (x.to(device) for x in make_inputs((2, 20, 20, 2, 1, 32), "v1", "layer", dtype_of(device)))
    dense = gradients([q, k, v, lam])
    strided = gradients([*(among_nans(x) for x in (q, k, v)), lam])
    assert len(use_descriptors.described) == 8, "a view was not read by descriptors"
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_what_tma_cannot_read_is_read_by_pointers(device, use_descriptors):
    use_descriptors()
    q, k, v, lam = (x.to(device) for x in make_inputs((1, 20, 20, 2, 1, 32), "v1", "layer", dtype_of(device)))
    dense = gradients([q, k, v, lam])
    use_descriptors.described.clear()
    unaligned = [torch.cat([x, x[..., :1]], dim=-1)[..., :-1] for x in (q, k)]
    found = gradients([*unaligned, v, lam])
    assert not use_descriptors.described
    for a, b in zip(found, dense, strict=True):
        if device == "cpu":
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert torch.isfinite(a).all()


@pytest.mark.parametrize(
    ("view", "aligned"),
    [
        (lambda x: x, True),
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x[:, :, 8:], True),
        (lambda x: x[:, :, 1:], False),
        (lambda x: x[:, :, ::2], False),
        (lambda x: x[:, :1].expand(3, 4, 32), False),
        (lambda x: x[:0], False),
        (lambda x: x.flatten()[:33].view(1, 1, 33), True),
        (lambda x: x.flatten()[:66].view(1, 2, 33), False),
    ],
    ids=["dense", "heads first", "8 columns on", "1 column on", "columns apart", "repeated", "empty", "one row", "odd"],
)
def test_tma_asks_for_multiples_of_16_bytes_and_dense_rows(view, aligned):
    assert is_aligned(view(torch.zeros(3, 4, 32, dtype=torch.bfloat16))) == aligned


def test_a_descriptor_has_tokens_before_dims_whatever_the_memory():
    x = torch.zeros(1, 5, 3, 2, 32, dtype=torch.bfloat16)
    described = describe_heads(x, 16)
    assert described.shape == [1, 3, 2, 5, 32] and described.block_shape == [1, 1, 1, 16, 32]
    assert described.strides[1:] == [64, 32, 192, 1]
    assert describe_heads(x[:, :, :, 0], 16).shape == [1, 3, 1, 5, 32]
