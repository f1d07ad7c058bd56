"""Tensors one at a time: read from disk when asked for, written shard by shard. No model has to fit into memory."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from difftune.checkpoints.folders import check_names, read_weight_map

MAX_SHARD_BYTES = 5 * 1000**3
"""Default size of the largest weight file, and what the writer holds in memory."""

STATE_DICT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
"""Files that may hold one state dict."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LazyTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name: ``self[name]`` reads that one from disk, and nothing is kept.

    Args:
        source: A folder with ``model.safetensors`` or with shards and their index, or one state dict file: safetensors,
            or what ``torch.save`` made of a dict of tensors.

    Raises:
        ValueError: If there is none, it is damaged, a shard is missing, or index and shards disagree.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._pickled: dict[str, torch.Tensor] | None = None
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, torch.Size] = {}
        if source.is_file() and source.suffix != ".safetensors":
            self._pickled = _load_pickled(source)
            self._shapes = {name: tensor.shape for name, tensor in self._pickled.items()}
            return
        for path in _safetensors_files(source):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    self._files[name] = path
                    self._shapes[name] = torch.Size(file.get_slice(name).get_shape())
        if source.is_dir() and (source / _INDEX).is_file():
            listed = read_weight_map(source / _INDEX)
            check_names(self._files, listed, source=f"the shards of {source}", expected_by=_INDEX)

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._pickled is not None:
            return self._pickled[name]
        # Opened again for each tensor: closing the file is what gives the mapped memory back.
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)

    def part(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """``self[name][index]``, of which nothing else is read; without an index, a tensor of no axes."""
        if self._pickled is not None or not index:
            return self[name][index]
        with _opened(self._files[name]) as file:
            return file.get_slice(name)[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shapes(self) -> dict[str, torch.Size]:
        """Shape by name, without reading a tensor."""
        return dict(self._shapes)


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *, max_shard_bytes: int = 2 * 1024**3
) -> None:
    """Write a stream of tensors as ``model.safetensors``, or as shards with their index.

    A shard is written as soon as the next tensor would not fit, so memory holds one shard. Not atomic: on an error,
    also one that the stream raises, the files written so far stay.

    Args:
        tensors: Name and tensor; each is used once and let go.
        folder: Made if absent.
        max_shard_bytes: Largest file, unless one tensor alone is larger.

    Raises:
        ValueError: If a name comes twice, or none comes.

    Example:
        >>> write_shards([("a", torch.ones(2))], Path("out"))  # doctest: +SKIP
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    pointers: set[int] = set()
    seen: set[str] = set()
    size = total = 0

    def part_path(number: int) -> Path:
        return folder / f"model-{number:05d}.safetensors.part"

    def flush() -> None:
        nonlocal size
        # The metadata is what transformers asks of a file before it reads it.
        save_file(shard, part_path(len(parts)), metadata={"format": "pt"})
        parts.append(list(shard))
        shard.clear()
        pointers.clear()
        size = 0

    for name, given in tensors:
        if name in seen:
            raise ValueError(f"{name} comes twice: the source has two tensors of that name, remove one")
        seen.add(name)
        tensor = given.detach().contiguous()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in pointers:
            tensor = tensor.clone()  # safetensors refuses tensors that share memory, and a view would keep all of it
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
        shard[name] = tensor
        pointers.add(tensor.data_ptr())
        size += tensor.nbytes
        total += tensor.nbytes
    if not seen:
        raise ValueError(f"there is no tensor to write to {folder}: the source is empty")
    flush()
    if len(parts) == 1:
        part_path(0).rename(folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file_name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        part_path(number).rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def require_usable(name: str, tensor: torch.Tensor, source: str) -> torch.Tensor:
    """Return the tensor, or raise: weights that are quantised or not finite are never passed on.

    Args:
        name: Of the tensor, for the message.
        tensor: The weights.
        source: Where they are from, for the message.

    Returns:
        ``tensor``.

    Raises:
        ValueError: If its dtype is not one of float16, bfloat16, float32, float64, or a value is NaN or infinite.

    Example:
        >>> require_usable("w", torch.tensor([1.0, float("nan")]), "here")
        Traceback (most recent call last):
            ...
        ValueError: w in here has 1 of 2 values that are NaN or infinite: take a checkpoint from before it diverged
    """
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} in {source} is {tensor.dtype}: quantised weights are not read, save it in bfloat16")
    # NaN is both the least and the largest value where there is one. Unlike isfinite, aminmax needs no memory.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise ValueError(
            f"{name} in {source} has {bad} of {tensor.numel()} values that are NaN or infinite: "
            "take a checkpoint from before it diverged"
        )
    return tensor


def _safetensors_files(source: Path) -> list[Path]:
    """The files to read; each exists."""
    if source.is_file():
        return [source]
    if (source / _INDEX).is_file():
        files = [source / name for name in sorted(set(read_weight_map(source / _INDEX).values()))]
    elif (source / _SINGLE).is_file():
        files = [source / _SINGLE]
    else:
        raise ValueError(
            f"{source} holds neither {_SINGLE} nor {_INDEX}: give the state dict file itself, if it is one"
        )
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} does not exist: the checkpoint is incomplete, download it again")
    return files


def _opened(path: Path) -> safe_open:
    """The file, its header checked."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): download or save it again") from error


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """A dict of tensors that torch.save wrote: mapped, so that it is not read at once; no code in it runs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a state dict written by torch.save ({reason}): save it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}: save model.state_dict() instead")
    others = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} holds more than tensors ({', '.join(others[:8])}): save the dict of the weights alone, "
            "such as torch.save(checkpoint['model'], ...)"
        )
    return state
