import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from difftune.modeling import DiffTransformerConfig

SMALL = {
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
}


@pytest.mark.parametrize(
    ("attention", "kv_heads", "groups", "value_dim"),
    [("diff_v1", 4, 2, 16), ("diff_v2", 4, 4, 8), ("softmax", 4, 4, 8)],
)
def test_heads_are_counted_as_softmax_maps(attention, kv_heads, groups, value_dim):
    config = DiffTransformerConfig(**SMALL, attention=attention, num_key_value_heads=kv_heads)
    assert (config.num_diff_heads, config.num_kv_groups, config.value_head_dim) == (4, groups, value_dim)


def test_default_key_value_heads_suit_each_kind():
    kv = {
        kind: DiffTransformerConfig(**SMALL, attention=kind).num_key_value_heads
        for kind in ("diff_v1", "diff_v2", "softmax")
    }
    assert kv == {"diff_v1": 8, "diff_v2": 4, "softmax": 8}


def test_saved_and_loaded_it_is_the_same(tmp_path):
    config = DiffTransformerConfig(**SMALL, subln="plain", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    config.save_pretrained(tmp_path)
    assert DiffTransformerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"num_attention_heads": 15, "head_dim": 4},
            r"num_attention_heads \(15\) must be even: differential attention pairs",
        ),
        (
            {"num_attention_heads": 7},
            r"hidden_size \(64\) must be a multiple of num_attention_heads \(7\), or set head_dim",
        ),
        (
            {"num_key_value_heads": 1},
            r"num_key_value_heads \(1\) must be even: attention='diff_v1' pairs the keys",
        ),
        (
            {"num_key_value_heads": 6},
            r"differential heads \(4\) must be a multiple of the key/value groups \(3\)",
        ),
        (
            {"attention": "diff_v2", "num_key_value_heads": 8},
            r"differential heads \(4\) must be a multiple .* must share one key/value group",
        ),
        ({"attention": "softmax", "num_key_value_heads": 3}, r"num_attention_heads \(8\) must be a multiple"),
        ({"attention": "diff"}, "attention='diff' is unknown, choose one of diff_v1, diff_v2, softmax"),
        ({"subln": "layer"}, "subln='layer' is unknown, choose one of affine, plain, none"),
        ({"hidden_act": "swish2"}, "hidden_act='swish2' is unknown, choose one of"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "rope_type='spiral' is unknown, choose one of",
        ),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        DiffTransformerConfig(**{**SMALL, **changed})


@pytest.mark.parametrize(("field", "value"), [("hidden_size", "wide"), ("rms_norm_eps", "small"), ("qk_norm", 3)])
def test_wrong_types_are_refused(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        DiffTransformerConfig(**{**SMALL, field: value})
