"""Where a checkpoint's files are and what is in them: local folder or hub id, one file, shards, training state."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from difftune.shard_files import ShardedTensors, is_sharded

Config = TypeVar("Config", bound=PreTrainedConfig)

TRAINING_WEIGHTS = "checkpoint.pt"
"""The file of a training checkpoint that holds the weights, beside config.json and manifest.json."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHOWN = 8
_MODEL = "model."


def could_be_hub_id(name: str) -> bool:
    """Whether a name that no folder has may be ``owner/name`` on the hub; else it can only be a path."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """Return the local folder of a checkpoint; a hub id (``owner/name``) is downloaded or found in the cache.

    Args:
        path_or_hub_id: A folder on this machine, or the id of a repository on the Hugging Face hub.

    Returns:
        The folder.

    Raises:
        ValueError: If it is a file, or neither a folder nor a reachable hub repository.
    """
    if not str(path_or_hub_id):
        raise ValueError("an empty name is no checkpoint: give a folder, or a hub id such as 'owner/name'")
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file: give the folder that holds it, with its config.json")
    text = str(path_or_hub_id)
    if not could_be_hub_id(text):
        raise ValueError(f"{text} does not exist: give a folder, or a hub id such as 'owner/name'")
    # Imported here: a local folder needs no hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{text} is neither a folder here nor a hub repository that can be reached ({reason}): "
            "check the name, or download it first and give the folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ValueError: If the file is missing, is no JSON (with line), or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; write or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_config(folder: Path, config_class: type[Config]) -> Config:
    """Read ``config.json`` into a config class, which checks its fields.

    Args:
        folder: Holds the file.
        config_class: The class of its ``model_type``.

    Returns:
        The config.

    Raises:
        ValueError: If a field has a wrong type or value; it names file and field.
    """
    fields = read_json(folder / "config.json")
    # The code that lies beside the weights does not follow the config when it is saved elsewhere.
    fields.pop("auto_map", None)
    for name in ("dtype", "torch_dtype"):
        dtype = fields.get(name)
        if dtype is not None and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
            raise ValueError(
                f"{folder / 'config.json'}: {name} must be a type of torch, such as float32, got {dtype!r}"
            )
    try:
        return config_class.from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
        # What transformers trips over is in the file: an unknown dtype is an attribute that torch lacks.
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Read ``generation_config.json``, the defaults of ``generate``.

    Args:
        folder: Where it may be.

    Returns:
        The config, or None if there is no such file.

    Raises:
        ValueError: If it is not a generation config.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    fields = read_json(path)
    try:
        config = GenerationConfig.from_dict(fields)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                    raise ValueError(f"{name} must be a token's number or a list of them, got {value!r}")
        return config
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a safetensors checkpoint, in one file or in shards, onto the CPU.

    Args:
        folder: Holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.

    Returns:
        Tensor by name.

    Raises:
        ValueError: If there are no safetensors, a shard is missing or damaged, or the index and the shards disagree.
    """
    if not (folder / _INDEX).is_file():
        if not (folder / _SINGLE).is_file():
            raise ValueError(
                f"{folder} holds neither {_SINGLE} nor {_INDEX}: other weight formats are not read; "
                "load the model with transformers and save_pretrained() it once"
            )
        return _read_file(folder / _SINGLE)
    weight_map = read_weight_map(folder / _INDEX)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        tensors.update(_read_file(folder / shard))
    check_names(tensors, weight_map, source=f"the shards of {folder}", expected_by=_INDEX)
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """Which file of a folder holds each tensor, as the index of its shards says.

    Args:
        index: The ``*.index.json``.

    Returns:
        File name by tensor name.

    Raises:
        ValueError: If it lists none, or a file that is not in its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: the download may be incomplete")
    for name, file in weight_map.items():
        # Another folder's file is none of this model's: a download must not reach what lies elsewhere.
        if not isinstance(file, str) or file in ("", "..") or "\0" in file or Path(file).name != file:
            raise ValueError(f"{index} says that {name} is in {file!r}, which is no name of a file beside it")
    return weight_map


def read_training_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the model's tensors from a training checkpoint, without its optimiser, once its hash is right.

    Args:
        folder: Holds ``checkpoint.pt``, the ``manifest.json`` with its hash, and ``shards/`` if several ranks wrote it.

    Returns:
        Tensor by name, on the CPU.

    Raises:
        ValueError: If the checkpoint is damaged, or holds no weights of a model.
    """
    tensors = map_training_weights(folder)
    return {name: tensors[name] if is_sharded(folder) else tensors[name].clone() for name in tensors}


def map_training_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """As :func:`read_training_weights`, but what is used of the tensors is read then, and not more than a tensor."""
    sharded = is_sharded(folder)
    listed = read_json(folder / "manifest.json").get("files", {})
    for name in listed if sharded else [TRAINING_WEIGHTS]:
        _check_hash(folder / name, listed.get(name, {}).get("sha256"))
    # Mapped, so that the optimiser's state, twice the weights, is not read; weights_only, so that no code runs.
    checkpoint = torch.load(folder / TRAINING_WEIGHTS, map_location="cpu", weights_only=True, mmap=True)
    tensors: Mapping[str, torch.Tensor]
    if sharded:
        tensors = _ShardedWeights(folder, checkpoint["aliases"])
    else:
        state = checkpoint.get("state_dict", {})
        tensors = {_in_model(name): tensor for name, tensor in state.items() if name.startswith(_MODEL)}
    if not tensors:
        raise ValueError(f"{folder / TRAINING_WEIGHTS} holds no weights of a model")
    return tensors


class _ShardedWeights(Mapping[str, torch.Tensor]):
    """The model's tensors in a sharded checkpoint, each read when it is asked for."""

    def __init__(self, folder: Path, aliases: dict[str, str]) -> None:
        self._stored = ShardedTensors(folder)
        names = [name for name in self._stored if name.startswith(_MODEL)]
        self._names = {_in_model(name): name for name in names}
        # A checkpoint of an adapter has none of the base's.
        self._names |= {_in_model(alias): name for alias, name in aliases.items() if name in self._stored}

    def shapes(self) -> dict[str, torch.Size]:
        """Shape by name; nothing is read."""
        return {name: self._stored.described[full].shape for name, full in self._names.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _in_model(name: str) -> str:
    """A name of the training module's as the model has it."""
    return name.removeprefix(_MODEL)


def _check_hash(path: Path, expected: str | None) -> None:
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(f"{path} is not what its manifest.json says: the checkpoint is damaged, take another")


def check_names(found: Iterable[str], expected: Iterable[str], *, source: str, expected_by: str) -> None:
    """Raise unless two sets of tensor names are equal.

    Args:
        found: Names that are there.
        expected: Names that should be.
        source: Where they were found, for the message.
        expected_by: Who expects them, for the message.

    Raises:
        ValueError: If a name is missing or extra; it lists them.
    """
    found, expected = set(found), set(expected)
    missing, extra = sorted(expected - found), sorted(found - expected)
    if not missing and not extra:
        return
    parts = [
        f"{len(names)} {word} ({_shown(names)})" for word, names in (("missing", missing), ("extra", extra)) if names
    ]
    raise ValueError(f"the tensors in {source} are not those that {expected_by} expects: {'; '.join(parts)}")


def check_tensors(
    tensors: dict[str, torch.Tensor],
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    source: str,
) -> None:
    """Raise unless the tensors are exactly those that the model class stores; its own skeleton is the oracle.

    A tied ``lm_head.weight`` need not be stored; where it is, equal to the embedding, it is removed.

    Args:
        tensors: Tensor by name.
        model_class: The class that the names belong to.
        config: Of the model.
        source: Where the tensors are from, for the message.

    Raises:
        ValueError: If names are missing or extra, shapes differ, weights are integers (quantised), or a tied head
            differs from the embedding. Each is named.
    """
    if config.tie_word_embeddings:
        check_tied_head(tensors, source=source)
        tensors.pop("lm_head.weight", None)
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, model_class, config, source=source)
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{source}: {_shown(broken)} hold nan or inf, and so would every answer: take an earlier checkpoint, or "
            "download it again"
        )
    integers = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if integers:
        raise ValueError(
            f"{source} stores {_shown(integers)} as integers: quantised weights are not read, save it in bfloat16"
        )


def check_tied_head(tensors: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Raise if a model with tied embeddings stores a head that is not the embedding.

    Args:
        tensors: Tensor by name; may read lazily.
        source: Where they are from, for the message.

    Raises:
        ValueError: If the two differ.
    """
    if "lm_head.weight" not in tensors or "model.embed_tokens.weight" not in tensors:
        return
    if not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
        raise ValueError(
            f"{source} says tie_word_embeddings=true but has an lm_head.weight that differs from the embedding: "
            "set tie_word_embeddings to false in its config.json if the head is meant"
        )


def check_shapes(
    shapes: Mapping[str, torch.Size], model_class: type[PreTrainedModel], config: PreTrainedConfig, *, source: str
) -> None:
    """Raise unless names and shapes are exactly those that the model class stores; needs no tensor.

    Args:
        shapes: Shape by name, without a tied ``lm_head.weight``.
        model_class: The class that the names belong to.
        config: Of the model.
        source: Where the tensors are from, for the message.

    Raises:
        ValueError: If names are missing or extra, or shapes differ. Each is named.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    check_names(shapes, expected, source=source, expected_by=model_class.__name__)
    wrong = [
        f"{name} is {tuple(shapes[name])}, the config makes it {tuple(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors in {source} do not have their shape: {_shown(wrong)}")


def _shown(items: list[str]) -> str:
    """The first few items, and how many more there are."""
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one safetensors file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: the checkpoint is incomplete") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): download or save it again") from error
