from typing import Any

import pytest

from difftune.checkpoints.unilm_config import _FIELDS, REQUIRED_FIELDS, config_from_unilm, config_to_unilm
from difftune.modeling import DiffTransformerConfig

FIELDS: dict[str, Any] = {
    "model_type": "unilm_diff",
    "vocab_size": 61,
    "embed_dim": 48,
    "ffn_dim": 80,
    "num_layers": 3,
    "num_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "max_position_embeddings": 64,
}


def test_heads_are_counted_in_pairs_there_and_in_maps_here() -> None:
    config = config_from_unilm(FIELDS | {"num_kv_heads": 2})
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 6)
    assert (config.num_diff_heads, config.num_kv_groups) == (4, 2)
    assert config_from_unilm(FIELDS).num_key_value_heads == 8


def test_what_microsoft_fixes_is_fixed() -> None:
    config = config_from_unilm(FIELDS)
    assert (config.attention, config.subln, config.subln_eps) == ("diff_v1", "affine", 1e-5)
    assert config.lambda_init is None and config.rms_norm_eps == 1e-6
    assert not (config.attention_bias or config.attention_out_bias or config.qk_norm or config.tie_word_embeddings)


def test_every_field_comes_back() -> None:
    fields = FIELDS | {
        "num_kv_heads": 2,
        "tie_word_embeddings": True,
        "lambda_std_dev": 0.2,
        "initializer_range": 0.01,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }
    assert set(fields) - {"model_type"} == set(_FIELDS)
    assert config_to_unilm(config_from_unilm(fields)) == fields


def test_scaled_rotary_embeddings_come_back() -> None:
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    config = config_from_unilm(FIELDS | {"rope_parameters": rope})
    assert config_to_unilm(config)["rope_parameters"] == rope


@pytest.mark.parametrize("name", REQUIRED_FIELDS)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"here/config\.json: lacks {name}; its fields are vocab_size, embed_dim"):
        config_from_unilm({k: v for k, v in FIELDS.items() if k != name}, where="here/config.json")


def test_unknown_fields_are_named_and_what_transformers_adds_is_not() -> None:
    with pytest.raises(ValueError, match=r"does not know rope_theta, hidden_size; its fields"):
        config_from_unilm(FIELDS | {"rope_theta": 10000.0, "hidden_size": 48})
    config_from_unilm(FIELDS | {"architectures": ["Diff"], "dtype": "float32", "transformers_version": "5"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "diffllama"}, "model_type is 'diffllama', must be 'unilm_diff'"),
        ({"num_heads": 5}, r"embed_dim \(48\) must be a multiple of 2 x num_heads \(5\): num_heads counts pairs"),
        ({"num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\): both count pairs"),
        ({"num_heads": 0}, "num_heads is 0, must be a whole number of at least 1"),
        ({"num_kv_heads": "2"}, "num_kv_heads is '2', must be a whole number"),
        ({"num_heads": 8, "embed_dim": 48}, r"head_dim \(3\) must be even"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_layers": 0}, "num_hidden_layers must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)config\.json: .*{message}"):
        config_from_unilm(FIELDS | changes)


def ours(**changes: Any) -> DiffTransformerConfig:
    return DiffTransformerConfig(**{"hidden_size": 48, "num_attention_heads": 8, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "diff_v2"}, "attention='diff_v2': this is the layout of diff_v1 only; write it as difftune"),
        ({"attention": "softmax"}, "attention='softmax': .*; convert it to diff_v1 first"),
        ({"subln": "none"}, "subln='none': Microsoft always normalises each head; train with subln='affine'"),
        ({"subln_eps": 1e-6}, "subln_eps=1e-06: Microsoft fixes 1e-05; train with that"),
        ({"lambda_init": 0.8}, r"lambda_init=0\.8: Microsoft computes it from the depth; train with"),
        ({"qk_norm": True}, "qk_norm=True: Microsoft has no norm on queries and keys; train with qk_norm=false"),
        ({"attention_bias": True}, "attention_bias=True: Microsoft's projections have no bias; train with"),
        ({"attention_out_bias": True}, "attention_out_bias=True: Microsoft's projections have no bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': the paper's SwiGLU has silu; train with"),
        ({"head_dim": 10}, "head_dim=10: Microsoft derives it, .* = 48 / 8; train with head_dim=null"),
    ],
)
def test_what_the_layout_cannot_express_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)cannot be written in Microsoft's layout.*{message}"):
        config_to_unilm(ours(**changes))


def test_every_reason_is_given_at_once() -> None:
    with pytest.raises(ValueError) as error:
        config_to_unilm(ours(subln="none", lambda_init=0.8, qk_norm=True, attention_bias=True))
    assert str(error.value).count("\n  - ") == 4
