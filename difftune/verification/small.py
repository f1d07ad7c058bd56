"""A small model with the attention of a large one: what is promised of files and trainings is tried on it."""

from __future__ import annotations

from difftune.modeling import DiffTransformerConfig


def small_like(config: DiffTransformerConfig, vocab_size: int = 128) -> DiffTransformerConfig:
    """Two narrow layers with the kind of attention, head dim, ratio of queries to keys and norms of a model.

    Args:
        config: Of that model.
        vocab_size: Of the small one.

    Example:
        >>> small_like(DiffTransformerConfig(head_dim=128)).head_dim
        128
    """
    assert config.num_key_value_heads is not None
    ratio = config.num_attention_heads // config.num_key_value_heads
    # Two groups of differential heads: fewer could not be told from one another.
    keys = 2 if config.attention == "diff_v2" else 4
    return DiffTransformerConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=keys * ratio,
        num_key_value_heads=keys,
        head_dim=config.head_dim,
        attention=config.attention,
        subln=config.subln,
        qk_norm=config.qk_norm,
        attention_bias=config.attention_bias,
        attention_out_bias=config.attention_out_bias,
        max_position_embeddings=128,
    )
