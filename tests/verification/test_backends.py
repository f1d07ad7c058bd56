import sys

import pytest
import torch

from difftune.modeling import DiffTransformerConfig
from difftune.verification.backends import verify_backends

CPU = torch.device("cpu")
# The package gives this name to the function.
MODULE = sys.modules["difftune.ops.diff_attention"]


def config_of(attention, **changes):
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    return DiffTransformerConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, attention=attention, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_a_cpu_tries_sdpa_and_says_why_not_the_others(attention, dtype):
    claims = {claim.what: claim for claim in verify_backends(config_of(attention), CPU, dtype)}
    assert claims["sdpa = the equation"].state == "holds"
    assert claims["sdpa = the equation"].on.startswith(f"attention with {attention}, D=8, ")
    flash, triton = (claims[f"{name} = the equation"] for name in ("flash", "triton"))
    assert flash.state == "not tried" and "CUDA" in flash.found
    # With Triton's interpreter it is the head dim that the kernels do not cover.
    reasons = ("softmax attention",) if attention == "softmax" else ("device cpu", "D=8")
    assert triton.state == "not tried" and any(reason in triton.found for reason in reasons)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_a_backend_that_forgets_the_documents_fails(attention, monkeypatch):
    right = MODULE.sdpa_attention
    monkeypatch.setattr(MODULE, "sdpa_attention", lambda *x, documents, **rest: right(*x, documents=None, **rest))
    claim = next(verify_backends(config_of(attention), CPU, torch.float32))
    assert claim.state == "fails" and "(packed)" in claim.found


def test_a_backend_that_breaks_fails_and_the_next_one_is_tried(monkeypatch):
    right = MODULE.softmax_attention
    monkeypatch.setattr(
        "difftune.verification.equation.softmax_attention",
        lambda *x, backend, **rest: right(*x, backend=backend, **rest)[:, :, : 4 if backend == "reference" else 3],
    )
    claim, *others = verify_backends(config_of("softmax"), CPU, torch.float32)
    assert len(others) == 2
    assert claim.state == "fails" and claim.found.startswith("RuntimeError: Mismatch in shape")


def test_the_random_numbers_of_the_caller_go_on():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    list(verify_backends(config_of("diff_v1"), CPU, torch.float32))
    assert torch.equal(torch.rand(3), expected)
