import pytest
import torch

from difftune.ops import diff_attention
from difftune.ops.triton import tiles
from difftune.ops.triton.forward import forward
from difftune.ops.triton.launch import Problem, architecture
from difftune.verification.equation import make_inputs
from tests.ops.equation import assert_equals_the_equation

pytestmark = pytest.mark.usefixtures("guards")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, T, S, H, G, D): a GQA group of 1 and 2, T = S, T < S, T > S, one query, lengths that no tile divides.
CASES = {
    "basic": ((1, 45, 45, 2, 2, 32), "v1", "layer", {"norm": True}, {}),
    "bottom-right, grouped": ((1, 21, 53, 4, 2, 32), "v1", "head", {}, {}),
    "shared keys": ((1, 40, 40, 2, 1, 32), "v2", "token", {}, {}),
    "one map after the other": ((1, 20, 37, 2, 2, 128), "v1", "layer", {"norm": True}, {}),
    "one query, odd batch": ((3, 1, 19, 2, 1, 32), "v1", "token", {"norm": True}, {}),
    "everything seen": ((1, 17, 40, 2, 1, 64), "v1", "head", {"norm": True}, {"causal": False}),
    "more queries than keys": ((1, 40, 17, 2, 1, 32), "v2", "head", {}, {"causal": False}),
}
DOCUMENTS = torch.tensor([0, 1, 40, 57, 80])


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_equation_in_float32(name, device):
    shape, kind, lam, norm, masks = CASES[name]
    assert_equals_the_equation(make_inputs(shape, kind, lam, torch.float32, **norm), "triton", device, **masks)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", [*CASES][:4])
def test_output_and_gradients_equal_the_equation_in_half_precision(name, dtype, device):
    shape, kind, lam, norm, masks = CASES[name]
    assert_equals_the_equation(make_inputs(shape, kind, lam, dtype, **norm), "triton", device, **masks)


@pytest.mark.parametrize(
    ("kind", "D", "causal", "norm"), [("v1", 32, True, True), ("v2", 32, False, False), ("v1", 128, True, False)]
)
def test_packed_documents_equal_the_equation(kind, D, causal, norm, device):
    inputs = make_inputs((2, 40, 40, 2, 1, D), kind, "token", torch.float32, norm)
    assert_equals_the_equation(inputs, "triton", device, cu_seqlens=DOCUMENTS, causal=causal)


@pytest.mark.parametrize(("kind", "causal", "D"), [("v1", True, 32), ("v2", False, 32), ("v1", True, 128)])
def test_key_padding_equals_the_equation(kind, causal, D, device):
    mask = torch.rand(2, 24) > 0.3
    mask[0, :12] = False  # the first queries see no key at all
    inputs = make_inputs((2, 20, 24, 2, 1, D), kind, "head", torch.float32, norm=kind == "v1")
    assert_equals_the_equation(inputs, "triton", device, key_padding_mask=mask, causal=causal)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("D", [32, 64, 128])
def test_tiles_of_the_gpus_equal_the_equation(arch, D, device, monkeypatch):
    if device == "cuda":
        if arch != architecture("cuda", 0):
            pytest.skip(f"not a GPU of compute capability {arch / 10}")
        inputs = make_inputs((2, 700, 700, 4, 2, D), "v1", "layer", torch.bfloat16, norm=True)
    else:
        monkeypatch.setitem(tiles.TILES, tiles.SMALL, tiles.TILES[arch])
        inputs = make_inputs((1, 131, 131, 1, 1, D), "v1", "layer", torch.float32)
    assert_equals_the_equation(inputs, "triton", device)


def test_a_query_that_sees_no_key_gives_zero_and_an_infinite_sum(device):
    q, k, v, lam = (x.to(device) for x in make_inputs((1, 5, 5, 2, 1, 32), "v1", "layer", torch.float32))
    mask = torch.tensor([[False, False, True, True, True]], device=device)
    problem = Problem(q, k, v, lam, None, None, mask, 0, True, 32**-0.5, 0.0)
    out, raw, negative, lse = forward(problem)
    assert (out[:, :2] == 0).all() and (negative[:, :2] == 0).all() and (out[:, 2:] != 0).all()
    assert torch.isposinf(lse[..., :2]).all() and torch.isfinite(lse[..., 2:]).all()
    assert raw.numel() == 0


def test_sums_of_the_maps_are_those_of_the_logits(device):
    q, k, v, lam = (x.to(device) for x in make_inputs((1, 9, 9, 2, 1, 32), "v1", "layer", torch.float32))
    lse = forward(Problem(q, k, v, lam, None, None, None, 0, False, 0.25, 0.0))[3]
    logits = torch.einsum("bthpd,bspd->pbhts", q.double(), k[:, :, 0].double()) * 0.25
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1) / torch.log(torch.tensor(2.0)))


def test_a_planted_error_of_one_percent_is_caught(device, monkeypatch):
    inputs = make_inputs((1, 33, 33, 2, 1, 32), "v1", "layer", torch.float32)
    wrong = diff_attention

    def planted(*args, backend, **options):
        extra = {"scale": 1.01 * 32**-0.5} if backend == "triton" else {}
        return wrong(*args, backend=backend, **options, **extra)

    monkeypatch.setattr("difftune.verification.equation.diff_attention", planted)
    with pytest.raises(AssertionError, match=r"over budget: out: error"):
        assert_equals_the_equation(inputs, "triton", device)
