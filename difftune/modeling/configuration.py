"""The architecture of a model. Saved with the weights, and the one config object that modules read."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from difftune.modeling.rope_settings import check_rope

ATTENTION_KINDS = ("diff_v1", "diff_v2", "softmax")
MAX_LAYERS = 10_000
"""More would be built for minutes before anything could refuse them."""
SUBLN_KINDS = ("affine", "plain", "none")


@strict
class DiffTransformerConfig(PreTrainedConfig):
    """Architecture of a Differential Transformer, or of the softmax baseline in the same backbone.

    Heads are counted as Hugging Face counts them: ``num_attention_heads`` is the number of softmax maps, so a
    differential model has half as many differential heads (:attr:`num_diff_heads`, the paper's h), and at equal
    numbers ``diff_v1`` and ``softmax`` have the same parameters but for lambda and the sublayer norm.

    ==========  ================  ==========================  =====================  ==================
    attention   queries           keys                        values                 output projection
    ==========  ================  ==========================  =====================  ==================
    diff_v1     H x 2 x D         G x 2 x D, 2G = kv heads    G x 2D                 H x 2D
    diff_v2     H x 2 x D         G x D, G = kv heads         G x D                  H x D
    softmax     2H x D            kv heads x D                kv heads x D           2H x D
    ==========  ================  ==========================  =====================  ==================

    Args:
        vocab_size: Tokens, padding of the vocabulary included.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the SwiGLU.
        num_hidden_layers: Layers.
        num_attention_heads: Softmax maps a layer; even unless ``attention="softmax"``.
        num_key_value_heads: Key heads a layer as Hugging Face counts them; even for ``diff_v1``. Default: as many
            as ``num_attention_heads``, half as many for ``diff_v2``.
        head_dim: Width of a query head. Default: ``hidden_size // num_attention_heads``.
        attention: ``diff_v1`` (ICLR 2025), ``diff_v2`` (2026) or ``softmax``.
        subln: Norm of each head's output in ``diff_v1``: ``affine`` (a weight, as Microsoft's code), ``plain``
            (no weight, as transformers' DiffLlama), or ``none``, which also leaves out ``1 - lambda_init``.
        subln_eps: Epsilon of that norm.
        lambda_init: Constant for all layers. Default None: ``0.8 - 0.6 exp(-0.3 l)``, l from 0.
        lambda_std_dev: Standard deviation of the lambda vectors at the start.
        lambda_warmup_steps: Optimiser steps over which lambda of ``diff_v1`` rises from almost 0; how many were taken
            is saved with the weights. 0 is none.
        attention_bias: Bias of the query, key and value projections (Qwen2).
        attention_out_bias: Bias of the output projection (Llama's ``attention_bias`` has both).
        qk_norm: RMSNorm of each query and key head before the rotation (Qwen3).
        hidden_act: Activation of the gated unit.
        rms_norm_eps: Epsilon of the other norms.
        rope_parameters: ``{"rope_type": ..., "rope_theta": ...}`` as in transformers.
        max_position_embeddings: Longest sequence, in tokens.
        tie_word_embeddings: Whether the head uses the embedding's weight.
        initializer_range: Standard deviation of weights at the start.
        use_cache: Whether a forward without labels returns the cache by default.
        attention_backend: ``auto``, ``reference``, ``sdpa``, ``flash`` or ``triton``; see
            `difftune.ops.diff_attention`.

    Raises:
        ValueError: If head counts do not divide as the kind of attention needs, or a name is unknown.
    """

    model_type = "difftune"
    # What the evaluation of transformers' Trainer leaves out of its predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "cache",
        "loss_sum",
        "num_label_tokens",
        "last_hidden_state",
    ]
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention: str = "diff_v1"
    subln: str = "affine"
    subln_eps: float = 1e-5
    lambda_init: float | None = None
    lambda_std_dev: float = 0.1
    lambda_warmup_steps: int = 0
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    attention_backend: str = "auto"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill the defaults that depend on other fields, then check what must fit together."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_key_value_heads is None:
            halved = self.attention == "diff_v2"
            self.num_key_value_heads = self.num_attention_heads // 2 if halved else self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                    f"({self.num_attention_heads}), or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check()

    @property
    def num_diff_heads(self) -> int:
        """Differential heads a layer, the paper's h: pairs of softmax maps."""
        return self.num_attention_heads // 2

    @property
    def num_kv_groups(self) -> int:
        """Value heads a layer, G: each serves ``num_diff_heads / G`` differential heads."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads // 2 if self.attention == "diff_v1" else self.num_key_value_heads

    @property
    def value_head_dim(self) -> int:
        """Width of a value head, E."""
        assert self.head_dim is not None
        return 2 * self.head_dim if self.attention == "diff_v1" else self.head_dim

    def _check_numbers(self) -> None:
        for name in ("subln_eps", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        if not (math.isfinite(self.lambda_std_dev) and self.lambda_std_dev >= 0):
            raise ValueError(f"lambda_std_dev must be a finite number, 0 or above, got {self.lambda_std_dev!r}")
        # Below 0 the second map is added: a control, not a model of the paper.
        if self.lambda_init is not None and not math.isfinite(self.lambda_init):
            raise ValueError(f"lambda_init must be a finite number, got {self.lambda_init!r}")
        if self.max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings must be at least 1, got {self.max_position_embeddings}")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers must be at most {MAX_LAYERS}, got {self.num_hidden_layers}")

    def _check(self) -> None:
        _one_of("attention", self.attention, ATTENTION_KINDS)
        _one_of("subln", self.subln, SUBLN_KINDS)
        _one_of("hidden_act", self.hidden_act, tuple(ACT2FN))
        if self.lambda_warmup_steps < 0 or (self.lambda_warmup_steps and self.attention != "diff_v1"):
            raise ValueError(
                f"lambda_warmup_steps={self.lambda_warmup_steps} with attention={self.attention!r}: must be 0, or a "
                "number of optimiser steps with attention='diff_v1', whose lambda it warms up"
            )
        check_rope(self.rope_parameters)
        self._check_numbers()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        assert kv_heads is not None and self.head_dim is not None
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embeddings turn pairs of dimensions")
        if self.attention != "softmax" and heads % 2:
            raise ValueError(f"num_attention_heads ({heads}) must be even: differential attention pairs softmax maps")
        if self.attention == "diff_v1" and (kv_heads < 2 or kv_heads % 2):
            raise ValueError(
                f"num_key_value_heads ({kv_heads}) must be even: attention='diff_v1' pairs the keys; "
                "attention='diff_v2' shares them and takes any number"
            )
        groups = self.num_kv_groups
        query_heads = heads if self.attention == "softmax" else self.num_diff_heads
        if groups < 1 or query_heads % groups:
            what = "num_attention_heads" if self.attention == "softmax" else "differential heads"
            reason = "; the two maps of a pair must share one key/value group" if self.attention == "diff_v2" else ""
            raise ValueError(
                f"{what} ({query_heads}) must be a multiple of the key/value groups ({groups}); "
                f"num_attention_heads={heads}, num_key_value_heads={kv_heads}{reason}"
            )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown, choose one of {', '.join(choices)}")
