"""Load a model from whatever folder it is in; the format is read from the folder, never guessed."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DiffLlamaConfig, PreTrainedModel

from difftune.checkpoints.diffllama import config_from_diffllama, load_diffllama
from difftune.checkpoints.folders import (
    TRAINING_WEIGHTS,
    check_tensors,
    read_config,
    read_generation_config,
    read_json,
    read_tensors,
    read_training_weights,
    resolve_folder,
)
from difftune.checkpoints.llama import FAMILIES, config_from_llama, read_llama, read_llama_config
from difftune.checkpoints.shards import STATE_DICT_SUFFIXES
from difftune.checkpoints.unilm_config import UNILM_MODEL_TYPE
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM, cast_weights
from difftune.modeling.quantized import keep_layout, quantization_config, quantize_base

log = logging.getLogger(__name__)

_OUR_TYPES = ("difftune", "diffllama")
_READABLE = (
    "readable are: a difftune folder (model_type 'difftune'), a transformers DiffLlama folder or hub id "
    f"(model_type 'diffllama'), one of the Llama family ({', '.join(FAMILIES)}), a checkpoint written by difftune fit, "
    "an adapter on one of these"
)
ADAPTER_CONFIG = "adapter_config.json"


def load_model(
    path_or_hub_id: str | Path, *, dtype: torch.dtype | None = None, attention_backend: str | None = None
) -> DiffTransformerForCausalLM:
    """Load a model from a difftune folder, a DiffLlama or Llama folder or hub id, a training checkpoint, or an adapter.

    An adapter, and a checkpoint of a run that trains one, is merged into the base that it names. One of the Llama
    family is read as it is, as the kind ``softmax``: the baseline of what it may be converted to.

    Args:
        path_or_hub_id: The folder, or ``owner/name`` on the Hugging Face hub.
        dtype: Of the weights; lambda stays float32. Default: as stored.
        attention_backend: Of ``difftune.ops.diff_attention``. Default: as stored, ``auto`` for a DiffLlama.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ValueError: If nothing is there, it is of another format (named, with the list of readable ones), or its
            tensors are not those of its config (named).

    Source:
        ``config.json`` as written by transformers' ``save_pretrained``.

    Example:
        >>> model = load_model("runs/quickstart/export")  # doctest: +SKIP
    """
    folder, kind = find_model(path_or_hub_id)
    if kind == "adapter":
        model = _load_merged(folder, dtype, attention_backend)
    elif kind == "diffllama":
        model = load_diffllama(folder, dtype=dtype, attention_backend=attention_backend or "auto")
    elif kind == "llama":
        model = _load_llama(folder, dtype, attention_backend)
    else:
        model = _load_difftune(folder, dtype, attention_backend)
    model.config._name_or_path = str(path_or_hub_id)
    return model


def read_architecture(path_or_hub_id: str | Path) -> DiffTransformerConfig:
    """The architecture of a model that :func:`load_model` reads; of an adapter, that of its base.

    Args:
        path_or_hub_id: As there.

    Raises:
        ValueError: As there.
    """
    folder, kind = find_model(path_or_hub_id)
    if kind == "adapter":
        from difftune.checkpoints.adapter_config import adapter_base

        return read_architecture(adapter_base(folder))
    if kind == "diffllama":
        return config_from_diffllama(read_config(folder, DiffLlamaConfig))
    if kind == "llama":
        return config_from_llama(read_llama_config(folder))
    return read_config(folder, DiffTransformerConfig)


def find_model(path_or_hub_id: str | Path) -> tuple[Path, str]:
    """Find a model that :func:`load_model` reads, and say what it is.

    Args:
        path_or_hub_id: As there.

    Returns:
        Its folder, and ``adapter``, ``diffllama``, ``difftune``, or ``llama`` for all of the Llama family.

    Raises:
        ValueError: If nothing is there, or it is of another format (named, with the list of readable ones).
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file() and path.suffix in (*STATE_DICT_SUFFIXES, ".gguf"):
        raise ValueError(f"{path} is a file, and models are loaded from folders: {_how_to_convert(path)}")
    folder = resolve_folder(path_or_hub_id)
    if (folder / ADAPTER_CONFIG).is_file():
        return folder, "adapter"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json{_what_it_is(folder)}; {_READABLE}")
    model_type = str(read_json(folder / "config.json").get("model_type"))
    if model_type in FAMILIES:
        return folder, "llama"
    if model_type not in _OUR_TYPES:
        what_to_do = _how_to_convert(path_or_hub_id, model_type) if model_type == UNILM_MODEL_TYPE else _READABLE
        raise ValueError(f"{folder} holds model_type {model_type!r}, which is not readable; {what_to_do}")
    return folder, model_type


def load_teacher(
    path_or_hub_id: str, dtype: torch.dtype | None = None, *, quantization: str | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """Load a model to learn from: one of ours, or any causal language model that transformers loads by itself.

    Args:
        path_or_hub_id: The folder, or ``owner/name`` on the Hugging Face hub.
        dtype: Of the weights. Default: as stored.
        quantization: ``nf4`` holds the linear layers of the blocks in 4 bits, and computes in ``dtype``.
        device: "cpu", or "meta" for a model without weights.

    Returns:
        The model in evaluation mode.

    Raises:
        ImportError: If it is to be quantised, and bitsandbytes is not installed.
        ValueError: If nothing is there, transformers cannot load it, or weights are missing.
    """
    folder = resolve_folder(path_or_hub_id)
    ours = is_ours(folder)
    if ours and device != "meta":
        loaded = load_model(path_or_hub_id, dtype=dtype)
        if quantization is not None:
            quantize_base(loaded, quantization, compute_dtype=dtype or loaded.dtype)
        return loaded
    try:
        if device == "meta":
            return _without_weights(folder, ours=ours)
        options: dict[str, Any] = {}
        if quantization is not None:
            compute_dtype = dtype or AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype or torch.float32
            options["quantization_config"] = quantization_config(quantization, compute_dtype)
        loader: Any = AutoModelForCausalLM
        model, found = loader.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the teacher {path_or_hub_id} could not be loaded by transformers: {str(error).splitlines()[0]}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        # Drawn at random by transformers, which only warns.
        raise ValueError(
            f"the teacher {path_or_hub_id} lacks {len(missing)} tensors of a {type(model).__name__}, such as "
            f"{missing[0]}: give a folder with all of its weights"
        )
    if quantization is not None:
        keep_layout(model)
    return model


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a model for :func:`load_model`, an adapter left out."""
    return (folder / TRAINING_WEIGHTS).is_file() or (
        (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") in _OUR_TYPES
    )


def _without_weights(folder: Path, *, ours: bool) -> PreTrainedModel:
    """The architecture of a teacher on the meta device."""
    with torch.device("meta"):
        if ours:
            return DiffTransformerForCausalLM(read_config(folder, DiffTransformerConfig)).eval()
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False
        ).eval()


def _load_difftune(
    folder: Path, dtype: torch.dtype | None, attention_backend: str | None
) -> DiffTransformerForCausalLM:
    """Load our own format (weights or a training checkpoint); transformers would only warn of missing tensors."""
    config = read_config(folder, DiffTransformerConfig)
    if attention_backend is not None:
        config.attention_backend = attention_backend
    is_training_checkpoint = (folder / TRAINING_WEIGHTS).is_file()
    tensors = read_training_weights(folder) if is_training_checkpoint else read_tensors(folder)
    check_tensors(tensors, DiffTransformerForCausalLM, config, source=str(folder))
    dtype = dtype or tensors["model.embed_tokens.weight"].dtype
    model = DiffTransformerForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    model.generation_config = read_generation_config(folder) or model.generation_config
    return model


def _load_llama(folder: Path, dtype: torch.dtype | None, attention_backend: str | None) -> DiffTransformerForCausalLM:
    """A model of the Llama family as our ``softmax`` kind, whose tensors have the same names."""
    foreign, tensors = read_llama(folder)
    config = config_from_llama(foreign)
    if attention_backend is not None:
        config.attention_backend = attention_backend
    state = dict(tensors)
    dtype = dtype or state["model.embed_tokens.weight"].dtype
    model = DiffTransformerForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.generation_config = read_generation_config(folder) or model.generation_config
    log.info(
        "%s (%s) is read as softmax attention: the same function, nothing is converted", folder, foreign.model_type
    )
    return model


def _how_to_convert(source: str | Path, model_type: str | None = None) -> str:
    """The command for a checkpoint that is converted once and then loaded."""
    if model_type is None and (Path(source).parent / "config.json").is_file():
        model_type = read_json(Path(source).parent / "config.json").get("model_type")
    to = "diff_v1" if model_type == UNILM_MODEL_TYPE else "diff_v2"
    return f"convert it once, `difftune convert {source} --to {to} --out DIR`, and load DIR"


def _load_merged(folder: Path, dtype: torch.dtype | None, attention_backend: str | None) -> DiffTransformerForCausalLM:
    """Base and adapter in one, summed in float32 whatever the dtype: the same weights for every dtype asked for."""
    # Imported here: it loads the base through this module.
    from difftune.checkpoints.adapters import load_with_base
    from difftune.checkpoints.merge import merge_adapter

    adapted = load_with_base(folder, attention_backend=attention_backend)
    base: Any = adapted.get_base_model()
    stored = base.dtype
    cast_weights(base, torch.promote_types(stored, torch.float32))
    merged, _ = merge_adapter(adapted, verify=False)
    cast_weights(merged, dtype or stored)
    return merged


def _what_it_is(folder: Path) -> str:
    """A hint for the folders that are mistaken for models most often."""
    if (folder / "checkpoints").is_dir():
        return f", it is a run folder: give {folder / 'export'}, or one of {folder / 'checkpoints'}"
    checkpoints = sorted(path.name for path in folder.glob("step-*"))
    if checkpoints:
        return f", it holds training checkpoints: give one of them, such as {folder / checkpoints[-1]}"
    if (folder / TRAINING_WEIGHTS).is_file():
        return ", it is a training checkpoint of a model without a transformers config"
    return ""
