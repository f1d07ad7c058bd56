"""The config.json of Microsoft's layout of DIFF V1: its fields <-> ours, and what that layout cannot express."""

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from difftune.modeling import DiffTransformerConfig

UNILM_MODEL_TYPE = "unilm_diff"
"""``model_type`` in the config.json of this layout."""

SUBLN_EPS = 1e-5
"""Microsoft's module fixes it."""

# Field of its config.json -> ours. Heads are counted in pairs there, in softmax maps here.
_FIELDS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "rope_parameters": "rope_parameters",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "lambda_std_dev": "lambda_std_dev",
    "initializer_range": "initializer_range",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
REQUIRED_FIELDS = (
    "vocab_size",
    "embed_dim",
    "ffn_dim",
    "num_layers",
    "num_heads",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
)
"""What a config.json of this layout must say; nothing of it is guessed."""

_COUNTED_IN_PAIRS = ("num_heads", "num_kv_heads")
# What transformers or a person may have added, and what says nothing about the architecture.
_IGNORED = ("model_type", "architectures", "dtype", "transformers_version", "_name_or_path")


def config_from_unilm(fields: Mapping[str, Any], *, where: str = "config.json") -> DiffTransformerConfig:
    """Translate the fields of a config.json of Microsoft's layout.

    Args:
        fields: Its content.
        where: Its path, for messages.

    Returns:
        Ours: ``diff_v1``, sublayer norm ``affine`` with Microsoft's eps, lambda_init by depth.

    Raises:
        ValueError: If a field is missing, unknown, of a wrong type, or the sizes do not fit together.

    Source:
        The constructor of ``MultiheadFlashDiff2`` in microsoft/unilm.

    Example:
        >>> config_from_unilm({"model_type": "llama"})
        Traceback (most recent call last):
            ...
        ValueError: config.json: model_type is 'llama', must be 'unilm_diff' for Microsoft's layout
    """
    if fields.get("model_type") != UNILM_MODEL_TYPE:
        raise ValueError(
            f"{where}: model_type is {fields.get('model_type')!r}, must be {UNILM_MODEL_TYPE!r} for Microsoft's layout"
        )
    unknown = [name for name in fields if name not in _FIELDS and name not in _IGNORED]
    missing = [name for name in REQUIRED_FIELDS if fields.get(name) is None]
    if unknown or missing:
        parts = [
            f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("does not know", unknown)) if names
        ]
        raise ValueError(f"{where}: {' and '.join(parts)}; its fields are {', '.join(_FIELDS)}")
    given = {name: copy.deepcopy(value) for name, value in fields.items() if name in _FIELDS and value is not None}
    given.setdefault("num_kv_heads", given["num_heads"])
    for name in ("embed_dim", *_COUNTED_IN_PAIRS):
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"{where}: {name} is {given[name]!r}, must be a whole number of at least 1")
    if given["embed_dim"] % (2 * given["num_heads"]):
        raise ValueError(
            f"{where}: embed_dim ({given['embed_dim']}) must be a multiple of 2 x num_heads ({given['num_heads']}): "
            "num_heads counts pairs of softmax maps, half of a Transformer's heads"
        )
    if given["num_heads"] % given["num_kv_heads"]:
        raise ValueError(
            f"{where}: num_heads ({given['num_heads']}) must be a multiple of num_kv_heads ({given['num_kv_heads']}): "
            "both count pairs"
        )
    for name in _COUNTED_IN_PAIRS:
        given[name] *= 2
    ours = {_FIELDS[name]: value for name, value in given.items()}
    try:
        return DiffTransformerConfig(**ours, attention="diff_v1", subln="affine", subln_eps=SUBLN_EPS)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def config_to_unilm(config: DiffTransformerConfig) -> dict[str, Any]:
    """Translate our config, or say everything that Microsoft's layout cannot express.

    Args:
        config: Ours.

    Returns:
        The fields of its config.json.

    Raises:
        ValueError: With one line for each reason and its remedy.

    Source:
        The constructor of ``MultiheadFlashDiff2`` in microsoft/unilm.

    Example:
        >>> tiny = DiffTransformerConfig(hidden_size=16, num_attention_heads=4)
        >>> config_to_unilm(tiny)["num_heads"]
        2
    """
    problems = _inexpressible(config)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(
            f"this model cannot be written in Microsoft's layout; difftune's own keeps everything:\n{lines}"
        )
    fields = {name: copy.deepcopy(getattr(config, ours)) for name, ours in _FIELDS.items()}
    for name in _COUNTED_IN_PAIRS:
        fields[name] //= 2
    return {"model_type": UNILM_MODEL_TYPE, **{name: value for name, value in fields.items() if value is not None}}


def _inexpressible(config: DiffTransformerConfig) -> list[str]:
    """Why Microsoft's layout cannot hold the model, each reason with its remedy."""
    if config.attention != "diff_v1":
        remedy = "convert it to diff_v1 first" if config.attention == "softmax" else "write it as difftune"
        return [f"attention={config.attention!r}: this is the layout of diff_v1 only; {remedy}"]
    problems = []
    if config.subln == "none":
        problems.append("subln='none': Microsoft always normalises each head; train with subln='affine' or 'plain'")
    elif config.subln_eps != SUBLN_EPS:
        problems.append(f"subln_eps={config.subln_eps}: Microsoft fixes {SUBLN_EPS}; train with that")
    if config.lambda_init is not None:
        problems.append(
            f"lambda_init={config.lambda_init}: Microsoft computes it from the depth; train with lambda_init=null"
        )
    if config.qk_norm:
        problems.append("qk_norm=True: Microsoft has no norm on queries and keys; train with qk_norm=false")
    for name in ("attention_bias", "attention_out_bias"):
        if getattr(config, name):
            problems.append(f"{name}=True: Microsoft's projections have no bias; train with {name}=false")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act={config.hidden_act!r}: the paper's SwiGLU has silu; train with hidden_act='silu'")
    if config.num_attention_heads * (config.head_dim or 0) != config.hidden_size:
        problems.append(
            f"head_dim={config.head_dim}: Microsoft derives it, hidden_size / num_attention_heads = "
            f"{config.hidden_size} / {config.num_attention_heads}; train with head_dim=null"
        )
    return problems
