"""transformers' DiffLlama: read a folder of it into our model, write our model as one.

The two models compute the same function in different layouts, so reading is exact, and so is writing a
model whose sublayer norm has no weight. A norm weight is folded into ``o_proj``. What DiffLlama
cannot express (other attention kinds, its fixed lambda schedule, ...) is refused, with the remedy.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from difftune.checkpoints.folders import (
    check_shapes,
    check_tensors,
    check_tied_head,
    read_config,
    read_generation_config,
    read_json,
    read_tensors,
    resolve_folder,
)
from difftune.checkpoints.layouts import (
    fold_norm_weight,
    groups_to_halves,
    halves_to_groups,
    join_pair,
    require_whole_lambda,
    split_pair,
)
from difftune.checkpoints.shards import LazyTensors, write_shards
from difftune.checkpoints.streams import HEAD, TensorStream, by_unit, in_order
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.lambdas import WARMUP_STEP

_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "lambda_std_dev",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_PAIRS = {"q_proj": ("q1_proj", "q2_proj"), "k_proj": ("k1_proj", "k2_proj")}
_ATTENTION_WEIGHTS = tuple(f".self_attn.{module}.weight" for module in ("q_proj", "k_proj", "v_proj", "o_proj"))
_LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def load_diffllama(
    path_or_hub_id: str | Path, *, dtype: torch.dtype | None = None, attention_backend: str = "auto"
) -> DiffTransformerForCausalLM:
    """Load a DiffLlama checkpoint as our model; logits equal ``DiffLlamaForCausalLM``'s.

    Args:
        path_or_hub_id: A folder written by ``save_pretrained`` (one safetensors file or shards), or a hub id.
        dtype: Of the weights; lambda stays float32. Default: as stored.
        attention_backend: Of ``difftune.ops.diff_attention``.

    Returns:
        The model in evaluation mode, on the CPU: ``diff_v1``, sublayer norm without weight.

    Raises:
        ValueError: If the folder holds no DiffLlama, tensors are missing, extra or misshapen (named), or the
            checkpoint uses what our model has not (dropout, quantised weights).

    Source:
        transformers ``models/diffllama/modeling_diffllama.py``.

    Example:
        >>> model = load_diffllama("kajuma/DiffLlama-0.3B-handcut")  # doctest: +SKIP
    """
    folder = resolve_folder(path_or_hub_id)
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "diffllama":
        raise ValueError(f"{folder} holds model_type {model_type!r}, not 'diffllama': load_model() finds the format")
    foreign = read_config(folder, DiffLlamaConfig)
    config = config_from_diffllama(foreign)
    config.attention_backend = attention_backend
    tensors = read_tensors(folder)
    check_tensors(tensors, DiffLlamaForCausalLM, foreign, source=str(folder))
    ours = weights_from_diffllama(tensors, num_groups=config.num_kv_groups)
    dtype = dtype or tensors["model.embed_tokens.weight"].dtype
    model = DiffTransformerForCausalLM.from_pretrained(None, config=config, state_dict=ours, dtype=dtype)
    model.generation_config = read_generation_config(folder) or model.generation_config
    model.config._name_or_path = str(path_or_hub_id)
    return model


def export_diffllama(model: DiffTransformerForCausalLM, folder: str | Path, *, max_shard_size: str = "5GB") -> None:
    """Write config, generation config and weights of our model as a DiffLlama folder.

    Lambda, and an ``o_proj`` with a folded norm, are written in float32 whatever the dtype of the rest; who loads in
    bfloat16 rounds them then. Nothing is verified here and the folder is
    not atomic: use :func:`difftune.checkpoints.export.export_model` unless you want just the files.

    Args:
        model: A ``diff_v1`` model with the sublayer norm ``plain`` or ``affine``.
        folder: Made if absent.
        max_shard_size: Largest weight file; above it the weights are sharded.

    Raises:
        ValueError: If DiffLlama cannot express the model: every reason, each with its remedy.

    Source:
        transformers ``models/diffllama/modeling_diffllama.py``.

    Example:
        >>> export_diffllama(model, "export")  # doctest: +SKIP
    """
    foreign = config_to_diffllama(model.config)
    foreign.dtype = model.model.embed_tokens.weight.dtype
    foreign.architectures = ["DiffLlamaForCausalLM"]
    weights = weights_to_diffllama(model.state_dict(), model.config)
    check_tensors(weights, DiffLlamaForCausalLM, foreign, source="the model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
    foreign.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def read_diffllama(folder: Path) -> tuple[DiffLlamaConfig, TensorStream]:
    """Open a DiffLlama folder without reading it: names and shapes are checked, tensors come when asked for.

    Args:
        folder: Written by ``save_pretrained``.

    Returns:
        transformers' config, and DiffLlama's tensors in order; a tied head is left out.

    Raises:
        ValueError: As :func:`load_diffllama`.

    Example:
        >>> config, tensors = read_diffllama(Path("export"))  # doctest: +SKIP
    """
    config = read_config(folder, DiffLlamaConfig)
    stored = LazyTensors(folder)
    shapes = stored.shapes()
    if config.tie_word_embeddings:
        check_tied_head(stored, source=str(folder))
        shapes.pop(HEAD, None)
    check_shapes(shapes, DiffLlamaForCausalLM, config, source=str(folder))
    return config, ((name, tensor) for name, tensor in in_order(stored) if name in shapes)


def stream_from_diffllama(foreign: DiffLlamaConfig, tensors: TensorStream) -> TensorStream:
    """Our tensors from DiffLlama's, a layer in memory at a time.

    Args:
        foreign: transformers' config.
        tensors: DiffLlama's tensors in order.

    Yields:
        Our name and tensor.
    """
    num_groups = config_from_diffllama(foreign).num_kv_groups
    for _, items in by_unit(tensors):
        yield from weights_from_diffllama(items, num_groups=num_groups).items()


def write_diffllama(
    config: DiffTransformerConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write a stream of our tensors as a DiffLlama folder, a layer in memory beside the shard.

    Args:
        config: Ours.
        tensors: Our name and tensor, a layer's together.
        folder: Made if absent. Not atomic.
        dtype: Of the weights, for config.json.
        max_shard_bytes: Largest weight file.

    Raises:
        ValueError: If DiffLlama cannot express the model: every reason, each with its remedy.

    Example:
        >>> write_diffllama(config, tensors, Path("out"), dtype=torch.float32, max_shard_bytes=2**31)  # doctest: +SKIP
    """
    foreign = config_to_diffllama(config)
    foreign.dtype = dtype
    foreign.architectures = ["DiffLlamaForCausalLM"]
    layers = (weights_to_diffllama(items, config).items() for _, items in by_unit(tensors))
    write_shards((item for layer in layers for item in layer), folder, max_shard_bytes=max_shard_bytes)
    foreign.save_pretrained(folder)


def config_from_diffllama(foreign: DiffLlamaConfig) -> DiffTransformerConfig:
    """Translate a DiffLlama config: the same fields, kind ``diff_v1``, sublayer norm ``plain``.

    Args:
        foreign: transformers' config.

    Returns:
        Ours.

    Raises:
        ValueError: If it uses dropout or quantised weights.

    Source:
        transformers ``models/diffllama/configuration_diffllama.py``.

    Example:
        >>> from transformers import DiffLlamaConfig
        >>> config_from_diffllama(DiffLlamaConfig(num_attention_heads=8, hidden_size=64)).num_diff_heads
        4
    """
    if foreign.attention_dropout:
        raise ValueError(
            f"attention_dropout={foreign.attention_dropout} is not supported: set it to 0 in config.json, "
            "as DiffLlama itself requires"
        )
    if getattr(foreign, "quantization_config", None):
        raise ValueError("quantised DiffLlama checkpoints are not read: save the model in bfloat16 or float32 first")
    shared = {name: copy.deepcopy(getattr(foreign, name)) for name in _SAME_FIELDS}
    return DiffTransformerConfig(
        **shared,
        attention="diff_v1",
        subln="plain",
        subln_eps=foreign.rms_norm_eps,
        attention_bias=foreign.attention_bias,
        attention_out_bias=foreign.attention_bias,
    )


def config_to_diffllama(config: DiffTransformerConfig) -> DiffLlamaConfig:
    """Translate our config to DiffLlama's, or say everything that DiffLlama cannot express.

    Args:
        config: Ours.

    Returns:
        transformers' config.

    Raises:
        ValueError: With one line for each reason and its remedy.

    Source:
        transformers ``models/diffllama/configuration_diffllama.py``.

    Example:
        >>> config_to_diffllama(model.config).model_type  # doctest: +SKIP
        'diffllama'
    """
    problems = []
    if config.attention != "diff_v1":
        problems.append(f"attention={config.attention!r}: DiffLlama knows diff_v1 only")
    else:
        if config.subln == "none":
            problems.append("subln='none': DiffLlama always normalises each head; train with subln='plain' or 'affine'")
        elif config.subln_eps != config.rms_norm_eps:
            problems.append(
                f"subln_eps={config.subln_eps} differs from rms_norm_eps={config.rms_norm_eps}: "
                "DiffLlama has one eps for both; train with equal values"
            )
        if config.lambda_init is not None:
            problems.append(
                f"lambda_init={config.lambda_init}: DiffLlama computes it from the depth; train with lambda_init=null"
            )
    if config.qk_norm:
        problems.append("qk_norm=True: DiffLlama has no norm on queries and keys; train with qk_norm=false")
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"this model cannot be written as DiffLlama; format='difftune' keeps everything:\n{lines}")
    shared = {name: copy.deepcopy(getattr(config, name)) for name in _SAME_FIELDS}
    return DiffLlamaConfig(**shared, attention_bias=config.attention_bias or config.attention_out_bias)


def weights_from_diffllama(foreign: Mapping[str, torch.Tensor], num_groups: int) -> dict[str, torch.Tensor]:
    """Translate the tensors of a DiffLlama to our names and layout. Exact: a permutation of rows.

    Args:
        foreign: Tensor by DiffLlama's name.
        num_groups: ``G``, half of ``num_key_value_heads``.

    Returns:
        Tensor by our name.

    Raises:
        ValueError: If the rows do not divide into groups.

    Source:
        transformers ``models/diffllama/modeling_diffllama.py``.

    Example:
        >>> rows = torch.arange(4.0)
        >>> sorted(weights_from_diffllama({"model.layers.0.self_attn.q_proj.bias": rows}, num_groups=1))
        ['model.layers.0.self_attn.q1_proj.bias', 'model.layers.0.self_attn.q2_proj.bias']
    """
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in foreign.items():
        layer, inside, leaf = name.partition(".self_attn.")
        module, _, kind = leaf.partition(".")
        stem = layer + inside
        if module in _PAIRS:
            for part, rows in zip(_PAIRS[module], split_pair(tensor), strict=True):
                ours[f"{stem}{part}.{kind}"] = rows.contiguous()
        elif module == "v_proj":
            ours[name] = halves_to_groups(tensor, num_groups)
        elif module in _LAMBDAS:
            ours[f"{stem}lambda_full.{module}"] = tensor
        else:
            ours[name] = tensor
    return ours


def weights_to_diffllama(ours: Mapping[str, torch.Tensor], config: DiffTransformerConfig) -> dict[str, torch.Tensor]:
    """Translate our tensors to DiffLlama's names and layout; a norm weight is folded into ``o_proj``.

    DiffLlama has a bias on all four projections or on none: those that the model lacks are written as zeros.

    Args:
        ours: Tensor by our name, as from ``model.state_dict()``.
        config: Of the model.

    Returns:
        Tensor by DiffLlama's name, on the CPU; a tied ``lm_head.weight`` is left out.

    Raises:
        ValueError: If the rows do not divide into groups, or lambda is in the middle of a warm-up.

    Source:
        transformers ``models/diffllama/modeling_diffllama.py``.

    Example:
        >>> weights_to_diffllama(model.state_dict(), model.config)  # doctest: +SKIP
    """
    first_of_pair = {first: (fused, second) for fused, (first, second) in _PAIRS.items()}
    seconds = {second for _, second in _PAIRS.values()}
    foreign: dict[str, torch.Tensor] = {}
    for name, given in ours.items():
        tensor = given.detach().cpu()
        layer, inside, leaf = name.partition(".self_attn.")
        module, _, kind = leaf.partition(".")
        stem = layer + inside
        if module in seconds or module == "subln" or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if module in first_of_pair:
            fused, second = first_of_pair[module]
            foreign[f"{stem}{fused}.{kind}"] = join_pair(tensor, ours[f"{stem}{second}.{kind}"].detach().cpu())
        elif module == "v_proj":
            foreign[name] = groups_to_halves(tensor, config.num_kv_groups)
        elif module == "o_proj" and kind == "weight" and f"{stem}subln.weight" in ours:
            foreign[name] = fold_norm_weight(tensor, ours[f"{stem}subln.weight"].detach().cpu())
        elif name.endswith(WARMUP_STEP):
            require_whole_lambda(name, tensor, config)
        elif module == "lambda_full":
            foreign[f"{stem}{kind}"] = tensor.float()
        else:
            foreign[name] = tensor
    if config.attention_bias != config.attention_out_bias:
        for name in [name for name in foreign if name.endswith(_ATTENTION_WEIGHTS)]:
            bias = name.removesuffix("weight") + "bias"
            foreign.setdefault(bias, foreign[name].new_zeros(foreign[name].shape[0]))
    return foreign
