import pytest
import torch

from difftune.modeling import DiffTransformerConfig
from difftune.ops import flash
from difftune.verification.precision import describe, try_precision, verify_precisions

NAMES = [f"a step and a padded generated batch in {name}" for name in ("32-true", "bf16-mixed", "16-mixed")]


def states(config):
    return {claim.what: claim.state for claim in verify_precisions(config, accelerator="cpu")}


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
def test_each_precision_is_tried_for_each_kind(attention):
    assert states(DiffTransformerConfig(attention=attention)) == dict.fromkeys(NAMES, "holds")


@pytest.mark.usefixtures("padding_fails_in_half")
def test_a_padded_batch_that_fails_under_autocast_is_found():
    found = list(verify_precisions(DiffTransformerConfig(), accelerator="cpu"))
    assert [claim.state for claim in found] == ["holds", "fails", "fails"]
    assert "generated texts in bf16-mixed fails: value cannot be converted without overflow" in found[1].found


def test_weights_of_16_bits_are_tried_and_the_random_state_is_kept():
    state = torch.get_rng_state()
    trial = try_precision(DiffTransformerConfig(), "32-true", "cpu", dtype=torch.bfloat16)
    assert "4 tokens for each of two prompts" in describe(trial)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(flash.is_available(), reason="flash-attn is installed")
def test_the_backend_is_the_one_that_was_named():
    with pytest.raises(ImportError, match="backend='flash' needs flash-attn"):
        try_precision(DiffTransformerConfig(), "32-true", "cpu", attention_backend="flash")
