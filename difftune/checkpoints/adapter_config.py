"""The config of an adapter on disk, and the base that it names: where both are, and whether they can be."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from peft import LoraConfig

from difftune.checkpoints.adapter_files import ADAPTER_CONFIG
from difftune.checkpoints.folders import read_json, resolve_folder

FOREIGN = "difftune_diffllama"
"""What ``auto_mapping`` has in an adapter that was exported for transformers' DiffLlama."""


def base_of_adapter(source: str | Path) -> str | None:
    """The base that a local adapter folder names; None if the folder is no adapter or names none."""
    path = Path(source).expanduser() / ADAPTER_CONFIG
    return read_json(path).get("base_model_name_or_path") if path.is_file() else None


def tokenizer_folder(path: str) -> str:
    """Where the tokenizer of a model is: in its folder, above a checkpoint, or with the base of an adapter."""
    # A checkpoint has no tokenizer of its own; that of its run lies above it.
    above = [folder / "tokenizer" for folder in Path(path).absolute().parents[:3]]
    own = (Path(path) / "tokenizer_config.json").is_file()
    near = path if own else next((str(folder) for folder in above if folder.is_dir()), None)
    if near is None and (base := base_of_adapter(path)) is not None:
        _require_another(Path(path), base)
        return tokenizer_folder(base)
    return near or path


def adapter_base(source: str | Path) -> str:
    """The base model that an adapter names, if it can be had.

    Args:
        source: As of :func:`load_adapter`.

    Raises:
        ValueError: If it names none, or one that is not there.
    """
    folder = resolve_folder(source)
    named = read_adapter_config(folder).base_model_name_or_path
    if not named or not isinstance(named, str):
        raise ValueError(f"{folder} does not say what its base model is: name it (--base DIR)")
    _require_another(folder, named)
    try:
        resolve_folder(named)
    except ValueError as error:
        raise ValueError(
            f"the base that {folder} names is not there: {error}; name another place (--base DIR)"
        ) from error
    return named


def _require_another(folder: Path, base: Any) -> None:
    """Refuse an adapter that is its own base, directly or through other adapters: it could never be loaded."""
    chain = [folder.expanduser().absolute()]
    named = base
    while isinstance(named, str) and (Path(named).expanduser() / ADAPTER_CONFIG).is_file():
        chain.append(Path(named).expanduser().absolute())
        if chain[-1].resolve() in {path.resolve() for path in chain[:-1]}:
            shown = " -> ".join(str(path) for path in chain)
            raise ValueError(f"the adapter {folder} leads back to itself as its base ({shown}): name it (--base DIR)")
        named = base_of_adapter(named)


def read_adapter_config(folder: Path) -> LoraConfig:
    """PEFT's config of an adapter.

    Args:
        folder: Holds it.

    Raises:
        ValueError: If it is none, of another type than LoRA, or has a setting that is not read here.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} holds no adapter (no {ADAPTER_CONFIG}): give a folder that save_adapter wrote")
    fields = read_json(folder / ADAPTER_CONFIG)
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {fields.get('peft_type')!r}: only LORA is read")
    if FOREIGN in (fields.get("auto_mapping") or {}):
        raise ValueError(
            f"{folder} was exported for plain transformers' DiffLlama: use the adapter that it was made of"
        )
    odd = {
        "bias": (None, "none"),
        "lora_bias": (None, False),
        "fan_in_fan_out": (None, False),
        "target_parameters": (None, []),
        "trainable_token_indices": (None,),
        "layer_replication": (None,),
    }
    found = [f"{key}={fields[key]!r}" for key, plain in odd.items() if fields.get(key) not in plain]
    if found:
        raise ValueError(f"{folder} uses {', '.join(found)}, which is not read here: use PEFT itself")
    for name in ("r", "lora_alpha"):
        value = fields.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {name} must be a finite number above 0, got {value!r}")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    return LoraConfig(**{key: value for key, value in fields.items() if key in known and key != "runtime_config"})
