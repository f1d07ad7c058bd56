"""Checkpoints of a model that is sharded over ranks: written by all of them together, whole or not at all.

The folder is that of :mod:`difftune.training.checkpoint_io`, and what makes it whole is the same; only weights and
optimiser are in ``shards/``, a file a rank, in torch's distributed format. Rank 0 renames it once every rank has
written its file; if one fails, all of them learn why, and nothing is left.

Any number of ranks can go on from it, with or without sharding, since names and shapes are those of the whole model.
"""

import errno
import shutil
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from difftune.shard_files import SHARDS, ShardedTensors, is_sharded
from difftune.training.checkpoint_io import (
    WEIGHTS,
    AtomicCheckpointIO,
    HashingFile,
    commit,
    find_damage,
    temporary_of,
    with_aliases,
    write_files,
)
from difftune.training.optimizer_state import (
    in_order,
    is_optimizer_tensor,
    join_tensors,
    parameter_names,
    split_tensors,
)

Result = TypeVar("Result")
_SHOWN = 4


class ShardedCheckpointIO(AtomicCheckpointIO):
    """Saves what all ranks hold together; to be made, and called, on all of them.

    Args:
        timeout: After which a rank gives up on the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        # Of its own, so that a thread may save while the training talks, and for objects, which NCCL cannot send.
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to the folder ``path``, replacing one that is there.

        Args:
            checkpoint: This rank's: tensors of the model and of named optimiser states may be DTensors; the rest is
                taken from rank 0. ``aliases`` has the further names of tied weights.
            path: The folder, on a disk that all ranks share.
            storage_options: Must be None.

        Raises:
            OSError: On all ranks, if one of them could not write; an old checkpoint at ``path`` is untouched.
            RuntimeError: On all ranks, if one failed otherwise.
        """
        assert storage_options is None, "no storage options exist"
        path = Path(path)
        temporary, first = temporary_of(path), dist.get_rank() == 0
        moments, states = split_tensors(checkpoint["optimizer_states"])
        weights = {name: t for name, t in checkpoint["state_dict"].items() if name not in checkpoint["aliases"]}
        rest = {**checkpoint, "optimizer_states": states}
        del rest["state_dict"]
        writer = dcp.FileSystemWriter(temporary / SHARDS)
        writer.fs = files = _HashingFileSystem()

        def begin() -> dict[str, Any]:
            if not first:
                return {}
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / SHARDS).mkdir(parents=True)
            return write_files(rest, temporary)

        try:
            entries = self._together(begin)
            self._together(lambda: dcp.save({**weights, **moments}, storage_writer=writer, process_group=self._group))
            entries += self._together(lambda: files.entries)
            listed = {name: entry for part in entries for name, entry in part.items()}
            self._together(lambda: commit(temporary, path, checkpoint["global_step"], listed) if first else None)
        except BaseException:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _together(self, work: Callable[[], Result]) -> list[Result]:
        """Do a part of the work on every rank, and return what came of it; raise on all if one failed."""
        result: Result | None = None
        failures: dict[int, tuple[int | None, str]] = {}
        try:
            result = work()
        except CheckpointException as error:
            failures = {rank: _describe(cause) for rank, (cause, _) in error.failures.items()}
        except Exception as error:
            failures = {dist.get_rank(): _describe(error)}
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, (None if failures else result, failures), group=self._group)
        failures = {rank: failure for _, some in everyone for rank, failure in some.items()}
        if failures:
            numbers, texts = zip(*failures.values(), strict=True)
            message = f"rank {', '.join(map(str, failures))} could not save: {texts[0]}"
            if None in numbers:
                raise RuntimeError(message)
            raise OSError(numbers[0], message)
        return [cast(Result, result) for result, _ in everyone]


class ShardedCheckpoints:
    """What a strategy of sharded models inherits, before Lightning's, to save and load through this module."""

    _timeout: timedelta | None
    lightning_module: Any
    optimizers: list[torch.optim.Optimizer]
    checkpoint_io: Any

    def build_checkpoint_io(self) -> ShardedCheckpointIO:
        """What writes; call it on all ranks."""
        return ShardedCheckpointIO(self._timeout or default_pg_timeout)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's parts, as DTensors."""
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """This rank's parts; the training module puts names to them."""
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, on all ranks."""
        checkpoint["aliases"] = find_aliases(self.lightning_module)
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill the module and the optimisers, on all ranks."""
        module = self.lightning_module
        # Ranks that looked into the folder at different times go on from one checkpoint.
        agreed = [str(checkpoint_path)]
        dist.broadcast_object_list(agreed)
        return load_into(
            Path(agreed[0]),
            module,
            self.optimizers,
            strict=module.strict_loading,
            check=module.check_checkpoint,
        )


def load_into(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    strict: bool = True,
    check: Callable[[dict[str, Any]], None] = lambda checkpoint: None,
) -> dict[str, Any]:
    """Fill a sharded model and its optimisers from a checkpoint of any strategy; call on all ranks.

    Each rank reads its own parts and nothing else, also from a checkpoint in one file.

    Args:
        path: The checkpoint.
        module: Its parameters and buffers may be plain or DTensors.
        optimizers: Over its parameters.
        strict: Whether the checkpoint must have everything that is in the module's state dict.
        check: Called with the checkpoint before anything is changed; tensors have shapes, and perhaps no content.

    Returns:
        The checkpoint, whose tensors are now those of the module.

    Raises:
        ValueError: If it is damaged, or its tensors are not those of the module and the optimisers.
    """
    reason = _find_damage_together(path)
    if reason is not None:
        raise ValueError(
            f"{path} cannot be resumed from: {reason}; choose another, or resume=auto for the newest whole one"
        )
    checkpoint = torch.load(path / WEIGHTS, map_location="cpu", weights_only=True, mmap=True)
    stored = ShardedTensors(path) if is_sharded(path) else None
    if stored is not None:
        of_model = {name: tensor for name, tensor in stored.described.items() if not is_optimizer_tensor(name)}
        checkpoint["state_dict"] = with_aliases(of_model, checkpoint)
        checkpoint["optimizer_states"] = join_tensors(stored.described, checkpoint["optimizer_states"])
    check(checkpoint)
    weights = _weights_to_fill(module, checkpoint["state_dict"], strict=strict)

    parameters = dict(module.named_parameters())
    names = [parameter_names(optimizer.param_groups, module) for optimizer in optimizers]
    states = [in_order(saved, own) for saved, own in zip(checkpoint["optimizer_states"], names, strict=True)]
    sources = checkpoint["state_dict"] | split_tensors(states)[0]
    for state in states:
        for name, entry in state["state"].items():
            state["state"][name] = {key: _room_for(value, parameters[name]) for key, value in entry.items()}
    targets = weights | split_tensors(states)[0]
    if stored is not None:
        stored.read_into({name: tensor for name, tensor in targets.items() if name not in checkpoint["aliases"]})
    else:
        for name, tensor in targets.items():
            _fill(tensor, sources[name])
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    return {**checkpoint, "state_dict": weights, "optimizer_states": []}


def find_aliases(module: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, and the first name of each."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            aliases[name] = first[id(parameter)]
    return aliases


def _find_damage_together(path: Path) -> str | None:
    """What is wrong with a checkpoint; every rank reads its share of the files."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found: list[str | None] = [None] * world
    dist.all_gather_object(found, find_damage(path, (rank, world)))
    return next((reason for reason in found if reason is not None), None)


def _weights_to_fill(module: nn.Module, saved: dict[str, Any], *, strict: bool) -> dict[str, torch.Tensor]:
    """The tensors of a module that a checkpoint has, by name."""
    own = module.state_dict()
    problems = [f"{name} is not in this model" for name in sorted(saved.keys() - own.keys())]
    problems += [f"{name} is missing" for name in sorted(own.keys() - saved.keys())] if strict else []
    problems += [
        f"{name} has the shape {tuple(saved[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(saved.keys() & own.keys())
        if saved[name].shape != own[name].shape
    ]
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"the checkpoint is of another model: {'; '.join(problems[:_SHOWN])}{more}")
    return {name: own[name] for name in saved}


def _room_for(value: Any, parameter: torch.Tensor) -> Any:
    """What an optimiser keeps of a parameter, to be filled: placed as the parameter if it has its shape."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
    return torch.zeros_like(value, device="cpu")


@torch.no_grad()
def _fill(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy this rank's part of a whole tensor."""
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        part = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
        tensor.to_local().copy_(part)
    else:
        tensor.copy_(whole)


class _HashingFileSystem(FileSystem):
    """Hashes what torch writes, and remembers why writing failed."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        """Of the manifest, for the files that were written."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as raw:
            file = HashingFile(cast(IO[bytes], raw))
            try:
                yield file
            except RuntimeError as error:
                raise (file.error or error) from None
            # Torch writes the metadata under another name first.
            self.entries[f"{SHARDS}/{Path(path).name.removesuffix('.tmp')}"] = file.entry()


def _describe(error: BaseException) -> tuple[int | None, str]:
    """Number, if it is the system's, and text of an error, for the other ranks."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO, str(error)
    # An error in the program: all of it is needed.
    return None, "".join(traceback.format_exception(error))
