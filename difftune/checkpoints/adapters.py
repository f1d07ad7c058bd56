"""Adapters on disk: PEFT's file format, read strictly, and only onto the base that it was trained on.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``: LoRA, lambda and whatever else was trained,
under PEFT's names, so that PEFT reads it too. The config also says which base it belongs to, in ``auto_mapping``, the
one place where PEFT keeps what it does not know.
"""

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from difftune.checkpoints.adapter_base import describe_quantization, load_base
from difftune.checkpoints.adapter_config import adapter_base, read_adapter_config
from difftune.checkpoints.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_adapter
from difftune.checkpoints.folders import (
    TRAINING_WEIGHTS,
    check_names,
    read_json,
    read_training_weights,
    resolve_folder,
)
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM
from difftune.modeling.adapters import (
    activate_adapter,
    add_adapter,
    base_tensors,
    file_key,
    saved_tensors,
)
from difftune.modeling.quantized import quantization_of

log = logging.getLogger(__name__)

_RECORD = "difftune_base"
_CONTEXT = "difftune_context"
# What may differ between the model that an adapter was trained on and the one it is put on.
_NOT_COMPARED = {
    "use_cache",
    "attention_backend",
    "initializer_range",
    "lambda_std_dev",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
_COMPARED = sorted(set(DiffTransformerConfig.__annotations__) - _NOT_COMPARED - {"keys_to_ignore_at_inference"})
# Enough of each tensor to tell two trainings apart.
_SAMPLED = 4096


def save_adapter(
    adapted: PeftModel,
    out_dir: str | Path,
    name: str = "default",
    *,
    base: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter to a folder, complete or not at all, and read it back before that is called done.

    Args:
        adapted: The model that holds it.
        out_dir: The folder to make.
        name: Of the adapter.
        base: Folder or hub id of the base model, for whoever loads the adapter. Default: where the base came from.
        tokenizer: Saved beside it, for whoever generates with the adapter.
        overwrite: Replace an adapter that is there.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder exists, or a tensor is not finite (named).

    Example:
        >>> save_adapter(adapted, "adapters/maths", base="my-model")  # doctest: +SKIP
    """
    config = describe_config(adapted, name, base=base)
    return write_adapter(config, saved_tensors(adapted, name), out_dir, name, tokenizer, overwrite)


def save_trained_adapter(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """As :func:`save_adapter`, from a training checkpoint, one rank's or all ranks' together, without its base.

    Args:
        checkpoint: Its folder.
        out_dir: The folder to make.
        tokenizer: Saved beside it.
        overwrite: Replace an adapter that is there.

    Returns:
        The folder.

    Raises:
        ValueError: As :func:`save_adapter`; if the checkpoint is damaged.
    """
    folder = Path(checkpoint)
    read_adapter_config(folder)
    return write_adapter(
        read_json(folder / ADAPTER_CONFIG), _read_tensors(folder), out_dir, "default", tokenizer, overwrite
    )


def describe_config(adapted: PeftModel, name: str = "default", *, base: str | None = None) -> dict[str, Any]:
    """What ``adapter_config.json`` says of an adapter: PEFT's config, and the record of its base; plain values.

    A training checkpoint that holds this file beside its weights is read by :func:`load_adapter` too.
    """
    model: Any = adapted.get_base_model()
    config: dict[str, Any] = json.loads(json.dumps(adapted.peft_config[name].to_dict(), default=sorted))
    config["inference_mode"] = True
    config["base_model_name_or_path"] = base or model.config._name_or_path or None
    config["auto_mapping"] = {
        "base_model_class": "DiffTransformerForCausalLM",
        "parent_library": "difftune.modeling.modeling",
        _RECORD: base_record(adapted),
        _CONTEXT: {field: getattr(model.config, field) for field in ("max_position_embeddings", "rope_parameters")},
    }
    return config


def load_adapter(
    model: DiffTransformerForCausalLM | PeftModel,
    source: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
) -> PeftModel:
    """Put an adapter from disk onto its base, in place, and make it the active one.

    Args:
        model: The base, or one that has adapters already.
        source: A folder or hub id with ``adapter_config.json``, written by us or by PEFT; or a training checkpoint.
        name: What to call it in the model.
        trainable: Whether its training is to go on.

    Returns:
        PEFT's wrapper around the model.

    Raises:
        ValueError: If there is no adapter, it is of another kind, belongs to another base (what differs is named), or
            its tensors are not exactly those that its config promises (missing and extra ones are named). The model is
            unchanged then.

    Example:
        >>> adapted = load_adapter(load_model("my-model"), "adapters/maths")  # doctest: +SKIP
    """
    folder = resolve_folder(source)
    config, tensors = read_adapter_config(folder), _read_tensors(folder)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_base(config, model, folder)
    _check_tensors(config, tensors, inner.config, folder)
    adapted = add_adapter(model, config, name)
    with torch.no_grad():
        for key, tensor in saved_tensors(adapted, name).items():
            if tensor.is_meta:
                given = tensors[key].to(tensor.dtype, copy=True)
                torch.utils.swap_tensors(tensor, nn.Parameter(given) if isinstance(tensor, nn.Parameter) else given)
            else:
                tensor.copy_(tensors[key])
    activate_adapter(adapted, name, trainable=trainable)
    return adapted


def load_with_base(
    source: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    attention_backend: str | None = None,
    trainable: bool = False,
    base_as: str = "dequantized",
) -> PeftModel:
    """Load an adapter and the base model that it names, whose context becomes what it was in training.

    Args:
        source: As of :func:`load_adapter`.
        base: Folder or hub id of the base. Default: the one that the adapter names.
        dtype: Of the base's weights, but those in 4 bits. Default: as stored; that of the training for a 4-bit base.
        attention_backend: Of the base. Default: as stored.
        trainable: Whether the training of the adapter is to go on.
        base_as: For an adapter whose base was in 4 bits: ``dequantized`` (the numbers that it was trained on, as plain
            weights), ``quantized`` (the same in 4 bits) or ``original`` (the weights before they were quantised, which
            makes another model). Means nothing for other adapters.

    Returns:
        The base with the adapter active, named ``default``, in evaluation mode on the CPU.

    Raises:
        ImportError: If the base was in 4 bits, and bitsandbytes is not installed.
        ValueError: If the adapter names no base, ``base_as`` is unknown, or as :func:`load_adapter` and ``load_model``.
    """
    folder = resolve_folder(source)
    config, named = read_adapter_config(folder), base or adapter_base(folder)
    try:
        model = load_base(named, recorded_quantization(config), base_as, dtype, attention_backend)
    except ValueError as error:
        raise ValueError(f"the base model of {folder}: {error}") from error
    _extend_context(model, (config.auto_mapping or {}).get(_CONTEXT))
    return load_adapter(model, folder, trainable=trainable).eval()


def recorded_quantization(config: LoraConfig) -> dict[str, Any] | None:
    """How the base was quantised when the adapter was trained, as :func:`quantization_of` says it, or None."""
    return (config.auto_mapping or {}).get(_RECORD, {}).get("quantization")


def base_record(model: torch.nn.Module) -> dict[str, Any]:
    """What tells the base of an adapter from other models: its architecture, and hashes of its shapes and weights.

    The hashes take a sample of each frozen tensor, rounded to bfloat16: the same base in float32 and in bfloat16 has
    one record. Projections are hashed apart, because a quantised base lacks them; float16, which rounds otherwise, has
    no hashes.

    Args:
        model: The base, or with adapters on it. The weights of one that has the attribute ``weights_on_disk`` are
            read from there: it is sharded, or not loaded yet.
    """
    config: Any = model.config
    architecture = json.loads(json.dumps({field: getattr(config, field) for field in _COMPARED}))
    fixed, projections = hashlib.sha256(), hashlib.sha256()
    on_disk: Any = getattr(model, "weights_on_disk", {})
    comparable, quantization = False, quantization_of(model) or getattr(model, "dequantized_from", None)
    for name, held in sorted(base_tensors(model).items()):
        tensor = on_disk[name].to(held.dtype) if name in on_disk else held
        is_projection = name.endswith("_proj.weight") and "lambda_full" not in name
        if is_projection and not tensor.is_floating_point():
            continue
        comparable = tensor.dtype != torch.float16 and not tensor.is_meta
        if not comparable:
            break
        flat = tensor.reshape(-1)
        sample = flat[:: -(-flat.numel() // _SAMPLED)].to("cpu", torch.bfloat16).contiguous()
        digest = projections if is_projection else fixed
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return {
        "architecture": architecture,
        "weights": fixed.hexdigest() if comparable else None,
        # Not of dequantised ones either: the adapter goes onto the base that they were made of.
        "projections": projections.hexdigest() if comparable and quantization is None else None,
        "quantization": quantization,
    }


def _extend_context(model: DiffTransformerForCausalLM, trained: dict[str, Any] | None) -> None:
    """Give the base the context that the adapter was trained with, where it has another rotation or a shorter one."""
    if trained is None:
        return
    here = model.config
    if trained["rope_parameters"] != here.rope_parameters:
        model.extend_context(**trained)
    elif trained["max_position_embeddings"] > here.max_position_embeddings:
        model.extend_context(max_position_embeddings=trained["max_position_embeddings"])


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder or of a training checkpoint, by PEFT's names."""
    if (folder / TRAINING_WEIGHTS).is_file():
        return {file_key(name) or name: tensor for name, tensor in read_training_weights(folder).items()}
    try:
        return load_file(folder / ADAPTER_WEIGHTS)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}: the adapter is incomplete") from error
    except SafetensorError as error:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS} is damaged or incomplete ({error}): save it again") from error


def _check_base(config: LoraConfig, model: torch.nn.Module, folder: Path) -> None:
    """Raise unless the model is the one that the adapter was trained on, as far as the adapter says."""
    theirs = (config.auto_mapping or {}).get(_RECORD)
    if theirs is None:
        return
    ours = base_record(model)
    differing = [
        f"{field} is {ours['architecture'].get(field)!r} here and {value!r} there"
        for field, value in theirs["architecture"].items()
        if ours["architecture"].get(field) != value
    ]
    for part in ("weights", "projections"):
        if not differing and ours[part] and theirs[part] and ours[part] != theirs[part]:
            differing.append("the architecture is the same, the weights are not")
    if differing:
        trained_on = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
        raise ValueError(
            f"{folder} was trained on another base{trained_on}: {'; '.join(differing)}. An adapter works on its own "
            "base alone"
        )
    if theirs.get("quantization") != ours["quantization"]:
        log.warning(
            "%s was trained on %s and is put on %s: the logits are others than in the training",
            folder,
            *(describe_quantization(record.get("quantization")) for record in (theirs, ours)),
        )


def _check_tensors(
    config: LoraConfig, tensors: dict[str, torch.Tensor], architecture: DiffTransformerConfig, folder: Path
) -> None:
    """Raise unless the tensors are exactly those that the config puts on such a model; a skeleton is the oracle."""
    with torch.device("meta"):
        try:
            skeleton = add_adapter(DiffTransformerForCausalLM(copy.deepcopy(architecture)), copy.deepcopy(config))
        except ValueError as error:
            raise ValueError(f"{folder} does not fit a {architecture.attention} model: {error}") from error
    expected = saved_tensors(skeleton)
    check_names(tensors, expected, source=str(folder), expected_by=ADAPTER_CONFIG)
    for key, parameter in expected.items():
        if tensors[key].shape != parameter.shape:
            shapes = f"{tuple(tensors[key].shape)}, {ADAPTER_CONFIG} makes it {tuple(parameter.shape)}"
            raise ValueError(f"{key} in {folder} is {shapes}")
