"""The Llama family of transformers (Llama, Mistral, SmolLM2, Qwen2, Qwen3) and GGUF files of it: read and written.

Our ``softmax`` kind has their arrangement and their names, so both directions are exact and move no number; what is
translated is the config. What our model does not express (sliding windows, a bias in the MLP, ...) is refused by name.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from difftune.checkpoints.folders import check_shapes, check_tied_head, read_config, read_json
from difftune.checkpoints.shards import LazyTensors, write_shards
from difftune.checkpoints.streams import HEAD
from difftune.modeling import DiffTransformerConfig

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
"""``model_type`` of the readable families. SmolLM2 is a Llama."""

_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def read_llama(folder: Path) -> tuple[PreTrainedConfig, Mapping[str, torch.Tensor]]:
    """Open a folder of the family; names and shapes are checked, tensors are read when asked for.

    Args:
        folder: Written by ``save_pretrained``: config.json, and safetensors in one file or shards.

    Returns:
        Its config, and tensor by name, which is our name in the ``softmax`` kind too.

    Raises:
        ValueError: If it is of another family or architecture, quantised, or its tensors are not those of its config.

    Example:
        >>> config, tensors = read_llama(Path("SmolLM2-135M"))  # doctest: +SKIP
    """
    config = read_llama_config(folder)
    model_class = FAMILIES[config.model_type][1]
    stored = LazyTensors(folder)
    if config.tie_word_embeddings:
        check_tied_head(stored, source=str(folder))
    # Old checkpoints store the rotary frequencies, which the config determines.
    tensors = _View(
        stored,
        [
            name
            for name in stored
            if not name.endswith("rotary_emb.inv_freq") and not (name == HEAD and config.tie_word_embeddings)
        ],
    )
    shapes = stored.shapes()
    check_shapes({name: shapes[name] for name in tensors}, model_class, config, source=str(folder))
    return config, tensors


def read_llama_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder of the family, without its tensors.

    Args:
        folder: As of :func:`read_llama`.

    Raises:
        ValueError: If it is of another family or architecture, or quantised.
    """
    fields = read_json(folder / "config.json")
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{folder} holds model_type {model_type!r}; of the Llama family are read: {_listed()}")
    config_class, model_class = FAMILIES[model_type]
    architectures = fields.get("architectures") or [model_class.__name__]
    if model_class.__name__ not in architectures:
        raise ValueError(
            f"{folder} holds a {', '.join(architectures)}, not a language model: give one whose architecture is "
            f"{model_class.__name__}"
        )
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{folder} is quantised ({method}): packed weights are not converted; take the unquantised model, "
            "or the GGUF file itself, which is dequantised while it is read"
        )
    config: PreTrainedConfig = read_config(folder, config_class)
    return config


def read_gguf(path: Path, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedConfig, Mapping[str, torch.Tensor]]:
    """Read a GGUF file of the family through transformers, dequantised. The whole model is in memory then.

    Args:
        path: The file.
        dtype: Of the weights. Default float32, which holds every quantised value.

    Returns:
        Its config, and tensor by name, which is our name in the ``softmax`` kind too.

    Raises:
        ImportError: If the package ``gguf`` is not installed.
        ValueError: If it is of another family, or stays packed.

    Example:
        >>> config, tensors = read_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))  # doctest: +SKIP
    """
    if not transformers.utils.is_gguf_available():
        raise ImportError(f"{path} is a GGUF file, and reading it needs a package: pip install gguf")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model_type = AutoConfig.from_pretrained(**where, trust_remote_code=False).model_type
    if model_type not in FAMILIES:
        raise ValueError(f"{path} holds model_type {model_type!r}; of the Llama family are read: {_listed()}")
    unpacked = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=dtype or torch.float32, quantization_config=unpacked, trust_remote_code=False
    )
    config, tensors = model.config, model.state_dict()
    del model
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    packed = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if packed or getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{path} stays packed as transformers {transformers.__version__} reads it ({len(packed)} tensors): "
            "packed weights are not converted; save the model in bfloat16 with another tool first"
        )
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_shapes(shapes, FAMILIES[model_type][1], config, source=str(path))
    return config, tensors


def write_llama(
    config: DiffTransformerConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write a ``softmax`` model as the member of the family that has its biases and norms.

    Args:
        config: Ours.
        tensors: Name and tensor.
        folder: Made if absent. Not atomic.
        dtype: Of the weights, for config.json.
        max_shard_bytes: Largest weight file.

    Raises:
        ValueError: If no member of the family has that combination.
    """
    foreign = config_to_llama(config)
    foreign.dtype = dtype
    foreign.architectures = [FAMILIES[foreign.model_type][1].__name__]
    write_shards(tensors, folder, max_shard_bytes=max_shard_bytes)
    foreign.save_pretrained(folder)


def config_from_llama(foreign: PreTrainedConfig) -> DiffTransformerConfig:
    """Translate a config of the family to ours, kind ``softmax``, or say everything that ours does not express.

    Args:
        foreign: transformers' config.

    Returns:
        Ours.

    Raises:
        ValueError: With one line for each reason and its remedy.

    Source:
        transformers ``models/{llama,mistral,qwen2,qwen3}``.

    Example:
        >>> config_from_llama(LlamaConfig(hidden_size=64, num_attention_heads=4)).head_dim
        16
    """
    problems = _problems(foreign)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"this {foreign.model_type} model uses what a DIFF Transformer here does not have:\n{lines}")
    biased = bool(getattr(foreign, "attention_bias", False))
    shared: dict[str, Any] = {name: copy.deepcopy(getattr(foreign, name, None)) for name in _SAME_FIELDS}
    return DiffTransformerConfig(
        **shared,
        head_dim=getattr(foreign, "head_dim", None) or foreign.hidden_size // foreign.num_attention_heads,
        attention="softmax",
        attention_bias=biased or foreign.model_type == "qwen2",
        attention_out_bias=biased,
        qk_norm=foreign.model_type == "qwen3",
    )


def config_to_llama(config: DiffTransformerConfig) -> PreTrainedConfig:
    """Translate our ``softmax`` config to the member of the family that has its biases and norms.

    Args:
        config: Ours.

    Returns:
        transformers' config: Qwen3's with norms on queries and keys, Qwen2's with biases on the inputs only, else
        Llama's.

    Raises:
        ValueError: If the kind is another, or no member has that combination.

    Example:
        >>> config_to_llama(DiffTransformerConfig(attention="softmax", qk_norm=True)).model_type
        'qwen3'
    """
    if config.attention != "softmax":
        raise ValueError(f"attention={config.attention!r}: a Llama has softmax attention; write it as difftune")
    inputs, output = config.attention_bias, config.attention_out_bias
    model_type = "qwen3" if config.qk_norm else "qwen2" if inputs and not output else "llama"
    if model_type != "qwen2" and inputs != output:
        raise ValueError(
            f"attention_bias={inputs} with attention_out_bias={output}, qk_norm={config.qk_norm}: no model of the "
            "Llama family has these together; write it as difftune"
        )
    if model_type == "qwen2" and config.head_dim != config.hidden_size // config.num_attention_heads:
        raise ValueError(
            f"head_dim={config.head_dim}: Qwen2, the member with biases on the inputs only, has hidden_size / "
            f"num_attention_heads = {config.hidden_size // config.num_attention_heads}; write it as difftune"
        )
    config_class = FAMILIES[model_type][0]
    own: dict[str, Any] = {} if model_type == "qwen2" else {"head_dim": config.head_dim, "attention_bias": inputs}
    return config_class(**{name: copy.deepcopy(getattr(config, name)) for name in _SAME_FIELDS}, **own)


class _View(Mapping[str, torch.Tensor]):
    """Some tensors of a lazy mapping."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: list[str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _problems(foreign: PreTrainedConfig) -> list[str]:
    """What the source model uses and ours has not, each with its remedy."""
    problems = []
    if foreign.model_type not in FAMILIES:
        return [f"model_type={foreign.model_type!r}: readable are {_listed()}"]
    window, longest = getattr(foreign, "sliding_window", None), foreign.max_position_embeddings
    sliding = {kind for kind in getattr(foreign, "layer_types", None) or [] if kind != "full_attention"}
    if sliding or (window is not None and window < longest):
        problems.append(
            f"sliding_window={window}: attention here sees the whole context; take a release without it, or set "
            f"max_position_embeddings ({longest}) to at most {window} in config.json if that is all you need"
        )
    if getattr(foreign, "mlp_bias", False):
        problems.append("mlp_bias=True: the gated unit here has no bias; take a model without it")
    if foreign.attention_dropout:
        problems.append(
            f"attention_dropout={foreign.attention_dropout}: attention here has none; set it to 0 in config.json"
        )
    factor = (foreign.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        problems.append(f"partial_rotary_factor={factor}: heads here are rotated whole; take a model with 1.0")
    return problems


def _listed() -> str:
    return ", ".join(f"{name} ({model_class.__name__})" for name, (_, model_class) in FAMILIES.items())
