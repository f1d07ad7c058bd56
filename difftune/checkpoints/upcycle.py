"""From softmax attention to differential attention and back, on the tensors of our own layout, a layer at a time."""

import copy
from collections.abc import Iterable
from typing import Any

import torch

from difftune.checkpoints.layouts import pair_columns, split_interleaved_pair
from difftune.checkpoints.streams import TensorStream, by_unit
from difftune.modeling import DiffTransformerConfig
from difftune.modeling.lambdas import WARMUP_STEP, lambda_init_at, warmup_factor

_Q, _O = ".self_attn.q_proj.", ".self_attn.o_proj.weight"


def config_to_v2(config: DiffTransformerConfig) -> DiffTransformerConfig:
    """The ``diff_v2`` config that :func:`to_diff_v2` fills: twice the softmax maps, all else as it was.

    Args:
        config: Of a ``softmax`` model.

    Returns:
        Of the converted model.

    Raises:
        ValueError: If the source is not a ``softmax`` model.

    Example:
        >>> smol = DiffTransformerConfig(attention="softmax", num_attention_heads=9, hidden_size=576)
        >>> config_to_v2(smol).num_diff_heads
        9
    """
    _require_softmax(config, "diff_v2")
    return _changed(config, attention="diff_v2", num_attention_heads=2 * config.num_attention_heads)


def to_diff_v2(config: DiffTransformerConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> TensorStream:
    """Convert a ``softmax`` model to ``diff_v2``: the same function, and every new weight learns.

    Query head j becomes both members of differential head j, so they share its group's keys and values:
    ``W_q1 = W_q2 = W_q``. Lambda is ``sigmoid(0 x) = 1/2``, and ``2 (a - a/2) = a``, so ``W_o`` is doubled. Powers of
    two are exact in every floating-point format. The two copies get gradients of ratio 2 to -1, so they part at once.

    Args:
        config: Of the source.
        tensors: Its tensors.

    Yields:
        Tensors of the model with :func:`config_to_v2`.

    Source:
        "Differential Transformer V2", Microsoft, January 2026, for the attention; the conversion is this package's.

    Example:
        >>> dict(to_diff_v2(config, model.state_dict().items()))  # doctest: +SKIP
    """
    for name, tensor in tensors:
        layer, found, kind = name.partition(_Q)
        if found:
            yield f"{layer}.self_attn.q1_proj.{kind}", tensor
            yield f"{layer}.self_attn.q2_proj.{kind}", tensor.clone()
            if kind == "weight":
                lambda_proj = torch.zeros(config.num_attention_heads, config.hidden_size)
                yield f"{layer}.self_attn.lambda_full.lambda_proj.weight", lambda_proj
        elif name.endswith(_O):
            yield name, tensor * 2
        else:
            yield name, tensor


def config_to_v1(
    config: DiffTransformerConfig, *, subln: str, lambda_init: float | None, lambda_warmup_steps: int = 0
) -> DiffTransformerConfig:
    """The ``diff_v1`` config that :func:`to_diff_v1` fills: as many softmax maps as before, in pairs.

    Args:
        config: Of a ``softmax`` model.
        subln: ``none``, ``plain`` or ``affine``.
        lambda_init: Constant of all layers; None is the paper's schedule by depth.
        lambda_warmup_steps: Optimiser steps over which lambda rises from almost 0; 0 is none.

    Returns:
        Of the converted model.

    Raises:
        ValueError: If the source is not a ``softmax`` model or has an odd number of heads, or lambda is 1 or more.

    Example:
        >>> smol = DiffTransformerConfig(attention="softmax", num_attention_heads=9, num_key_value_heads=3, hidden_size=576)
        >>> config_to_v1(smol, subln="none", lambda_init=0.1)
        Traceback (most recent call last):
            ...
        ValueError: num_attention_heads=9, num_key_value_heads=3: diff_v1 pairs heads, so both must be even; diff_v2 takes any number, and loses nothing: --to diff_v2
    """  # noqa: E501 - a doctest compares messages by line
    _require_softmax(config, "diff_v1")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert kv_heads is not None
    if heads % 2 or kv_heads % 2:
        raise ValueError(
            f"num_attention_heads={heads}, num_key_value_heads={kv_heads}: diff_v1 pairs heads, so both must be even; "
            "diff_v2 takes any number, and loses nothing: --to diff_v2"
        )
    if lambda_init is not None and not lambda_init < 1:
        raise ValueError(
            f"lambda_init={lambda_init}: must be below 1, since the maps' difference sums to 1 - lambda and that is "
            "divided out; 0.05 loses least"
        )
    return _changed(
        config,
        attention="diff_v1",
        subln=subln,
        lambda_init=lambda_init,
        lambda_warmup_steps=lambda_warmup_steps,
        subln_eps=config.rms_norm_eps,
    )


def to_diff_v1(
    config: DiffTransformerConfig, target: DiffTransformerConfig, tensors: Iterable[tuple[str, torch.Tensor]]
) -> TensorStream:
    """Convert a ``softmax`` model to ``diff_v1`` by pairing heads. This changes the function; training has to mend it.

    Heads of neighbouring key/value heads become a pair: ``(A_a - lambda A_b)[V_a, V_b]`` stands where the source had
    ``A_a V_a`` and ``A_b V_b``. What each choice loses is measured in docs/how-to/convert.md.

    Lambda starts at ``lambda_init``: its two products are equal and random, so they cancel but have gradients. The
    rows of the difference of maps sum to ``1 - lambda``, which is divided out of ``W_o``; in a warm-up that is lambda
    as it starts. A sublayer norm's output has root mean square ``1 - lambda_init``, so that is divided out, and ``W_o``
    multiplied by what a head's output has, estimated as half of the values' own: attention averages them.

    Args:
        config: Of the source.
        target: From :func:`config_to_v1`.
        tensors: Tensors of the source, a layer's together.

    Yields:
        Tensors of the target.

    Source:
        Ye et al., "Differential Transformer", arXiv:2410.05258, Eq. (1) to (3).

    Example:
        >>> dict(to_diff_v1(config, target, model.state_dict().items()))  # doctest: +SKIP
    """
    assert config.num_key_value_heads is not None and target.head_dim is not None
    groups, members = target.num_kv_groups, config.num_attention_heads // config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    for unit, items in by_unit(tensors):
        layer = unit.removesuffix(".")
        if target.subln != "none" and layer != unit:
            norm, values = items[f"{layer}.input_layernorm.weight"], items[f"{layer}.self_attn.v_proj.weight"]
            # Over inputs of unit variance; one number for the two value heads of a group.
            head_scale = 0.5 * (values.float() * norm.float()).unflatten(0, (groups, -1)).square().sum(2).mean(1).sqrt()
        else:
            head_scale = torch.ones(groups)
        for name in list(items):
            tensor = items.pop(name)
            module, _, kind = name.removeprefix(f"{layer}.self_attn.").partition(".")
            if module in ("q_proj", "k_proj"):
                first, second = split_interleaved_pair(tensor, groups)
                yield f"{layer}.self_attn.{module[0]}1_proj.{kind}", first
                yield f"{layer}.self_attn.{module[0]}2_proj.{kind}", second
            elif name.endswith(_O):
                lambda_init = target.lambda_init
                if lambda_init is None:
                    lambda_init = lambda_init_at(int(layer.rsplit(".", 1)[1]))
                if target.lambda_warmup_steps and target.subln == "none":
                    lambda_init *= warmup_factor(torch.zeros(()), target.lambda_warmup_steps).item()
                columns = pair_columns(tensor, groups, members).unflatten(1, (groups, -1))
                scaled = columns * head_scale[:, None] / (1 - lambda_init)
                yield name, scaled.flatten(1).to(tensor.dtype)
                pair = {n: torch.randn(target.head_dim, generator=generator) * target.lambda_std_dev for n in "qk"}
                for n in ("q1", "k1", "q2", "k2"):
                    yield f"{layer}.self_attn.lambda_full.lambda_{n}", pair[n[0]].clone()
                if target.lambda_warmup_steps:
                    yield f"{layer}.self_attn.lambda_full.{WARMUP_STEP}", torch.zeros(())
                if target.subln == "affine":
                    yield f"{layer}.self_attn.subln.weight", tensor.new_ones(target.value_head_dim)
            else:
                yield name, tensor


def config_to_softmax(config: DiffTransformerConfig) -> DiffTransformerConfig:
    """The ``softmax`` config that :func:`to_softmax` fills.

    Args:
        config: Of a ``diff_v2`` model, or of a ``softmax`` model, which comes back as it is.

    Returns:
        Of the converted model.

    Raises:
        ValueError: For ``diff_v1``, which has no softmax model of the same function.
    """
    if config.attention == "diff_v1":
        raise ValueError(
            "attention='diff_v1': its values are twice as wide and shared by a pair, no Llama computes that; "
            "--to diffllama is what plain transformers loads"
        )
    if config.attention == "softmax":
        return config
    return _changed(config, attention="softmax", num_attention_heads=config.num_attention_heads // 2)


def to_softmax(config: DiffTransformerConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> TensorStream:
    """Undo :func:`to_diff_v2` where that is exact: the two maps of every pair are still equal, lambda still 1/2.

    Args:
        config: Of a ``diff_v2`` or ``softmax`` model.
        tensors: Its tensors, a layer's together.

    Yields:
        Tensors of the model with :func:`config_to_softmax`.

    Raises:
        ValueError: If a layer has learned to be differential.
    """
    if config.attention == "softmax":
        yield from tensors
        return
    for unit, items in by_unit(tensors):
        for name, tensor in items.items():
            layer, _, leaf = name.partition(".self_attn.")
            module, _, kind = leaf.rpartition(".")
            if module == "q1_proj":
                if not torch.equal(tensor, items[f"{layer}.self_attn.q2_proj.{kind}"]):
                    raise ValueError(
                        f"{unit}self_attn: q1_proj and q2_proj differ, so this model is differential by now and no "
                        "Llama computes the same; keep it as difftune"
                    )
                yield f"{layer}{_Q}{kind}", tensor
            elif module == "lambda_full.lambda_proj":
                if tensor.count_nonzero():
                    raise ValueError(
                        f"{unit}self_attn: lambda_proj is not zero, so the scale of its heads depends on the token and "
                        "no Llama computes the same; keep it as difftune"
                    )
            elif module != "q2_proj":
                yield name, tensor / 2 if name.endswith(_O) else tensor


def _changed(config: DiffTransformerConfig, **changes: Any) -> DiffTransformerConfig:
    return DiffTransformerConfig.from_dict({**copy.deepcopy(config.to_dict()), **changes})


def _require_softmax(config: DiffTransformerConfig, kind: str) -> None:
    if config.attention != "softmax":
        raise ValueError(
            f"a {config.attention} model is not converted to {kind}: the two compute different functions; "
            "start from the softmax model"
        )
