"""Attention of a block: projections, rotation, pair, lambda, sublayer norm, cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from difftune.modeling.configuration import DiffTransformerConfig
from difftune.modeling.lambdas import LambdaV1, LambdaV2, lambda_init_at
from difftune.modeling.layers import RMSNorm, SubLayerNorm
from difftune.ops import ContextShard, Documents, diff_attention, rotate, softmax_attention
from difftune.ops.reference import reference_maps, reference_softmax_maps


class AttentionContext(NamedTuple):
    """What every layer of one forward shares: positions, who may see whom, the cache."""

    rotary: tuple[torch.Tensor, torch.Tensor]
    key_padding_mask: torch.Tensor | None = None
    documents: Documents | None = None
    cache: Cache | None = None
    shard: ContextShard | None = None
    maps: list[torch.Tensor] | None = None
    """Where each layer puts its softmax maps; None: nobody asked for them."""


class Attention(nn.Module):
    """What the three kinds share: value and output projections, optional q/k norm, the cache.

    Heads are counted in what the projections return: under tensor parallelism these are the heads of this rank.

    Args:
        config: The architecture.
        layer_idx: Layer, counted from 0.
    """

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.num_kv_groups, self.value_head_dim = (
            config.head_dim,
            config.num_kv_groups,
            config.value_head_dim,
        )
        self.num_heads = config.num_attention_heads if config.attention == "softmax" else config.num_diff_heads
        self.v_proj = self._input_projection(self.num_kv_groups * self.value_head_dim)
        self.o_proj = nn.Linear(
            self.num_heads * self.value_head_dim, config.hidden_size, bias=config.attention_out_bias
        )
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def _input_projection(self, size: int) -> nn.Linear:
        return nn.Linear(self.config.hidden_size, size, bias=self.config.attention_bias)

    def _cached(self, k: torch.Tensor, v: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys ``(B, T, G, width)`` and values to the cache; all keys and values so far, same layout."""
        if cache is None:
            return k, v
        seen = int(cache.get_seq_length(self.layer_idx)) + k.shape[1]
        if seen > k.shape[1]:
            _regroup(cache, self.layer_idx, k.shape[2])
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        # A static cache returns all of its slots, also those not yet written.
        return k[:, :, :seen].transpose(1, 2), v[:, :, :seen].transpose(1, 2)

    def _attend(
        self,
        attention: Callable[..., torch.Tensor],
        context: AttentionContext,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *lam: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """``attention`` over what each query may see, also where other processes hold a part of it."""
        options["backend"] = self.config.attention_backend
        if context.maps is not None:
            context.maps.append(_softmax_maps(q, k, context))
        if context.shard is not None:
            return context.shard.attend(attention, q, *context.shard.gather(k, v), *lam, **options)
        return attention(
            q, k, v, *lam, key_padding_mask=context.key_padding_mask, cu_seqlens=context.documents, **options
        )


def _regroup(cache: Cache, layer_idx: int, groups: int) -> None:
    """Lay out keys and values of a cache by the groups of the model, in place.

    PEFT's prefix tuning makes them by ``num_key_value_heads`` and ``head_dim`` of the config. A group of V1 holds two
    such heads side by side, and what a prefix holds is learned, so any order that stays the same will do.
    """
    layer: Any = cache.layers[layer_idx] if layer_idx < len(getattr(cache, "layers", ())) else None
    if layer is not None and layer.keys.shape[1] != groups:
        for name in ("keys", "values"):
            heads = getattr(layer, name).unflatten(1, (groups, -1))
            setattr(layer, name, heads.transpose(2, 3).flatten(3))


def _softmax_maps(q: torch.Tensor, k: torch.Tensor, context: AttentionContext) -> torch.Tensor:
    """All softmax maps of a layer, ``(B, N, T, S)``, from the equation; those of a pair stand side by side.

    Raises:
        ValueError: If rows are shared by several processes.
    """
    if context.shard is not None:
        raise ValueError("output_attentions needs whole rows: it is not there where devices share them")
    options: dict[str, Any] = {"key_padding_mask": context.key_padding_mask, "documents": context.documents}
    if q.ndim == 4:
        return reference_softmax_maps(q, k, **options)
    return torch.stack(reference_maps(q, k, **options), dim=2).flatten(1, 2)


class DiffAttentionV1(Attention):
    """Differential attention of ICLR 2025: paired keys, values twice as wide, one lambda a layer, sublayer norm."""

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q1_proj = self._input_projection(self.num_heads * self.head_dim)
        self.q2_proj = self._input_projection(self.num_heads * self.head_dim)
        self.k1_proj = self._input_projection(self.num_kv_groups * self.head_dim)
        self.k2_proj = self._input_projection(self.num_kv_groups * self.head_dim)
        lambda_init = lambda_init_at(layer_idx) if config.lambda_init is None else config.lambda_init
        self.lambda_full = LambdaV1(self.head_dim, lambda_init, config.lambda_warmup_steps)
        self.subln = (
            None
            if config.subln == "none"
            else SubLayerNorm(self.value_head_dim, config.subln_eps, 1 - lambda_init, config.subln == "affine")
        )

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Hidden states ``(B, T, C)`` to ``(B, T, C)``."""
        q_BTHPD = self._pair(self.q1_proj(x), self.q2_proj(x))
        k_BTGPD = self._pair(self.k1_proj(x), self.k2_proj(x))
        v_BTGE = self.v_proj(x).unflatten(-1, (-1, self.value_head_dim))
        q_BTHPD = rotate(self.q_norm(q_BTHPD), *context.rotary)
        k_BTGPD = rotate(self.k_norm(k_BTGPD), *context.rotary)
        # The cache holds K1 and K2 of a group side by side: as wide as V, so that every kind of cache takes both.
        k_BSGC, v_BSGE = self._cached(k_BTGPD.flatten(3), v_BTGE, context.cache)
        out_BTHE = self._attend(
            diff_attention,
            context,
            q_BTHPD,
            k_BSGC.unflatten(-1, (2, self.head_dim)),
            v_BSGE,
            self.lambda_full(x),
            norm_weight=None if self.subln is None else self.subln.scaled_weight(x),
            norm_eps=self.config.subln_eps,
        )
        return self.o_proj(out_BTHE.flatten(2))

    def _pair(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.unflatten(-1, (-1, self.head_dim)) for part in (positive, negative)], dim=3)


class DiffAttentionV2(Attention):
    """Differential attention of 2026: the pair shares keys and values, one lambda a token and head, no norm."""

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q1_proj = self._input_projection(self.num_heads * self.head_dim)
        self.q2_proj = self._input_projection(self.num_heads * self.head_dim)
        self.k_proj = self._input_projection(self.num_kv_groups * self.head_dim)
        self.lambda_full = LambdaV2(config.hidden_size, self.num_heads)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Hidden states ``(B, T, C)`` to ``(B, T, C)``."""
        q_BTHPD = torch.stack([p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q1_proj, self.q2_proj)], dim=3)
        k_BTGD = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v_BTGE = self.v_proj(x).unflatten(-1, (-1, self.value_head_dim))
        q_BTHPD = rotate(self.q_norm(q_BTHPD), *context.rotary)
        k_BSGD, v_BSGE = self._cached(rotate(self.k_norm(k_BTGD), *context.rotary), v_BTGE, context.cache)
        out_BTHE = self._attend(diff_attention, context, q_BTHPD, k_BSGD.unsqueeze(3), v_BSGE, self.lambda_full(x))
        return self.o_proj(out_BTHE.flatten(2))


class SoftmaxAttention(Attention):
    """Plain attention as in Llama: the baseline."""

    def __init__(self, config: DiffTransformerConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_proj = self._input_projection(self.num_heads * self.head_dim)
        self.k_proj = self._input_projection(self.num_kv_groups * self.head_dim)

    def forward(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Hidden states ``(B, T, C)`` to ``(B, T, C)``."""
        q_BTND = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k_BTMD = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v_BTMD = self.v_proj(x).unflatten(-1, (-1, self.value_head_dim))
        k_BSMD, v_BSMD = self._cached(rotate(k_BTMD, *context.rotary), v_BTMD, context.cache)
        out_BTND = self._attend(softmax_attention, context, rotate(q_BTND, *context.rotary), k_BSMD, v_BSMD)
        return self.o_proj(out_BTND.flatten(2))


KINDS: dict[str, type[Attention]] = {
    "diff_v1": DiffAttentionV1,
    "diff_v2": DiffAttentionV2,
    "softmax": SoftmaxAttention,
}


def build_attention(config: DiffTransformerConfig, layer_idx: int) -> Attention:
    """The attention of one layer, of the kind that ``config.attention`` names."""
    return KINDS[config.attention](config, layer_idx)
