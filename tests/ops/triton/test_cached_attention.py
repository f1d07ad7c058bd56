import re

import pytest
import torch

from difftune.ops.triton.cached_attention import MAX_QUERIES, diff_attention_decode, is_decoding

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(B=1, T=1, S=5, H=2, G=1, D=16, pair=2):
    shapes = [(B, T, H, 2, D), (B, S, G, pair, D), (B, S, G, pair * D), (H,)]
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("decoding takes D of 16, 32, 64, 128, .* got q torch.float32 of shape (1, 1, 2, 2, 24)", {"D": 24}),
        ("lengths must be int32 of shape (1,), got torch.int64", {"lengths": torch.tensor([3])}),
        ("lengths must be int32 of shape (1,), got torch.int32 of shape (2,)", {"lengths": ints(1, 2)}),
        ("block_table needs lengths", {"block_table": ints(0)[None]}),
        ("block_table must be int32 of shape (1, pages a row)", {"block_table": ints(0), "lengths": ints(1)}),
        ("the page size must be a power of two, got 5", {"block_table": ints(0)[None], "lengths": ints(1)}),
        ("key_padding_mask must be bool of shape (1, 5), got torch.int32", {"key_padding_mask": ints(1)[None]}),
        ("norm_weight must have shape (32,), got (16,)", {"norm_weight": torch.ones(16)}),
        ("num_splits must be at least 1, got 0", {"num_splits": 0}),
    ],
)
def test_what_does_not_fit_is_refused_with_the_constraint(message, change):
    sizes = {name: change.pop(name) for name in ("D",) if name in change}
    try:
        with pytest.raises(ValueError) as error:
            diff_attention_decode(*make_inputs(**sizes), **change)
    finally:
        change.update(sizes)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), str(error.value))


def test_values_and_keys_of_one_dtype():
    q, k, v, lam = make_inputs()
    with pytest.raises(ValueError, match="one dtype"):
        diff_attention_decode(q, k.half(), v, lam)


def test_without_a_gpu_another_backend_is_named(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("a GPU is there")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or more.*backend='sdpa'"):
        diff_attention_decode(*make_inputs())


def test_gradients_are_refused_not_lost():
    inputs = [x.requires_grad_() for x in make_inputs()]
    with pytest.raises(RuntimeError, match=r"autograd|backward"):
        diff_attention_decode(*inputs).sum().backward()


def test_the_operator_is_whole_to_torch_compile():
    inputs = make_inputs(S=9)
    torch.library.opcheck(
        torch.ops.difftune.diff_attention_decode,
        (inputs[0], inputs[1], inputs[2].unflatten(-1, (2, 16)), inputs[3], *[None] * 4, True, 0.25, 1e-5, 1),
        test_utils=("test_schema", "test_faketensor"),
    )

    def attend(q, k, v, lam):
        return 2 * diff_attention_decode(q, k, v, lam)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), attend(*inputs))


def test_few_queries_without_gradient_are_decoding():
    q, k, v, lam = make_inputs(T=MAX_QUERIES, S=20)
    assert is_decoding(q, k, v, lam, None, None)
    assert not is_decoding(make_inputs(T=MAX_QUERIES + 1, S=20)[0], k, v, lam, None, None)
    lam.requires_grad_()
    assert not is_decoding(q, k, v, lam, None, None)
    with torch.no_grad():
        assert is_decoding(q, k, v, lam, None, None)
