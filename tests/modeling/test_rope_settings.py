"""Settings of a rotary embedding: what can be computed with, and what cannot."""

import pytest
import torch

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.rope_settings import ROPE_TYPES, check_rope

FINE = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}


def config(rope: dict) -> DiffTransformerConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return DiffTransformerConfig(vocab_size=16, **sizes, max_position_embeddings=64, rope_parameters=rope)


@pytest.mark.parametrize("rope_type", FINE)
def test_with_all_that_a_type_needs_a_model_is_built_and_without_any_of_it_none_is(rope_type: str) -> None:
    assert set(FINE) <= set(ROPE_TYPES)
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **FINE[rope_type]}
    whole = {**rope, "original_max_position_embeddings": 32} if rope_type in ("yarn", "llama3", "longrope") else rope
    model = DiffTransformerForCausalLM(config(whole))
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    for name in FINE[rope_type]:
        with pytest.raises(ValueError, match=f"{rope_type}.* needs {name}"):
            config({key: value for key, value in whole.items() if key != name})


@pytest.mark.parametrize("value", ["abc", 0, -1.0, float("nan"), float("inf"), [1], {}, True])
@pytest.mark.parametrize("name", ["rope_theta", "factor", "short_factor"])
def test_a_value_that_is_no_number_above_0_is_named(name: str, value: object) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, name: value}
    if name == "short_factor" and value == [1]:
        check_rope(rope)
        return
    with pytest.raises(ValueError, match=f"{name} must be a .*finite number"):
        check_rope(rope)


@pytest.mark.parametrize("rope_type", ["x", 4, ["yarn"], {}, None])
def test_an_unknown_type_is_refused(rope_type: object) -> None:
    with pytest.raises(ValueError, match=r"rope_type=.* is unknown, choose one of default, "):
        check_rope({"rope_type": rope_type})
