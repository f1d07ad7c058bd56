import pytest

from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.verification.small import small_like


@pytest.mark.parametrize(("attention", "kv_heads", "ratio"), [("diff_v1", 8, 4), ("diff_v2", 4, 8), ("softmax", 16, 2)])
def test_the_attention_is_that_of_the_large_one_and_the_rest_is_small(attention, kv_heads, ratio):
    large = DiffTransformerConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=kv_heads,
        head_dim=96,
        attention=attention,
        qk_norm=True,
        subln="plain",
    )
    small = small_like(large)
    for name in ("attention", "head_dim", "qk_norm", "subln"):
        assert getattr(small, name) == getattr(large, name)
    assert small.num_attention_heads / small.num_key_value_heads == ratio
    assert small.num_diff_heads / small.num_kv_groups == large.num_diff_heads / large.num_kv_groups
    assert small.num_kv_groups >= 2
    assert DiffTransformerForCausalLM(small).num_parameters() < 3e6
