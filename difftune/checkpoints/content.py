"""What a model on disk is, whatever its folder is called: hashes of its weights and of the settings beside them."""

from pathlib import Path
from typing import Any

from difftune.checkpoints.folders import read_json, resolve_folder
from difftune.fingerprints import files_hash, value_hash

_WEIGHTS = (".safetensors", ".pt", ".bin", ".pth", ".gguf", ".distcp")
_PLACES = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version", "revision")
"""Keys that say where something lay, or which library wrote it."""


def model_content(source: str | Path) -> dict[str, str]:
    """Hashes by what they are of: `weights`, `architecture`, and where there are such `generation` and `base`.

    The folder can be moved and copied, and files be written anew, without a change. An adapter has the hashes of its
    base too.

    Args:
        source: A model, an adapter or a training checkpoint; a folder or hub id.

    Raises:
        ValueError: If it is not there.
    """
    folder = resolve_folder(source)
    weights = [file for file in folder.rglob("*") if file.suffix in _WEIGHTS and file.is_file()]
    found = {"weights": files_hash(folder, weights)}
    for name, file in (("architecture", "config.json"), ("generation", "generation_config.json")):
        if (folder / file).is_file():
            found[name] = value_hash(_without_places(read_json(folder / file)))
    if (folder / "adapter_config.json").is_file():
        config = read_json(folder / "adapter_config.json")
        found["architecture"] = value_hash(_without_places(config))
        base = config.get("base_model_name_or_path")
        if base:
            found["base"] = value_hash(model_content(base))
    return found


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if key not in _PLACES}
    return value
