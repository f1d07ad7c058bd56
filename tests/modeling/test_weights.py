import torch

from difftune.modeling import cast_weights, count_parameters
from tests.modeling.test_attention import build


def test_all_weights_are_cast_but_lambda():
    model = cast_weights(build("diff_v1"), torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept and all("lambda_full" in name for name in kept)


def test_parameters_are_counted_once_and_lambda_apart():
    model = build("diff_v2")
    model.lm_head.requires_grad_(False)
    counts = count_parameters(model)
    assert counts["total"] - counts["trainable"] == model.lm_head.weight.numel()
    assert counts["lambda"] == 2 * 64 * 4
