import sys

import pytest
import torch

from difftune.verification.equation import diff_deviations, make_inputs, outputs_and_gradients, softmax_deviations

SHAPE = (1, 20, 20, 4, 2, 8)
# The package gives this name to the function.
MODULE = sys.modules["difftune.ops.diff_attention"]


def names(found):
    return [deviation.name for deviation in found]


def test_output_and_the_gradient_of_every_input_are_compared():
    assert names(diff_deviations(make_inputs(SHAPE, "v2", "token", torch.float32), "sdpa")) == [
        "out",
        "dq",
        "dk",
        "dv",
        "dlam",
    ]
    found = diff_deviations(make_inputs(SHAPE, "v1", "layer", torch.float32, norm=True), "sdpa")
    assert names(found)[-1] == "dweight" and all(deviation.holds for deviation in found)


def test_gradients_are_those_of_autograd():
    x = torch.tensor([1.0, 2.0])
    out, dx = outputs_and_gradients(lambda x: x**2, [x], torch.tensor([1.0, 10.0]))
    assert out.tolist() == [1, 4] and dx.tolist() == [2, 40] and x.grad is None


@pytest.mark.parametrize("kind", ["diff", "softmax"])
def test_an_error_of_one_percent_in_the_logits_is_found_everywhere(kind, monkeypatch):
    right = MODULE.sdpa_attention
    monkeypatch.setattr(MODULE, "sdpa_attention", lambda *x, scale, **rest: right(*x, scale=1.01 * scale, **rest))
    if kind == "diff":
        found = diff_deviations(make_inputs(SHAPE, "v1", "layer", torch.float32), "sdpa")
    else:
        found = softmax_deviations([torch.randn(1, 20, heads, 8) for heads in (4, 2, 2)], "sdpa")
    assert not any(deviation.holds for deviation in found), "; ".join(map(str, found))
