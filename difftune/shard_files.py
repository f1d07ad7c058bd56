"""Tensors in the files of many ranks: written by torch.distributed.checkpoint, read by any number of processes.

A checkpoint of several ranks that share one model has a folder ``shards`` with a file a rank, in torch's distributed
format, and ``.metadata``, which says where each part of each tensor is. Names are those of a state dict, flat:
``model.norm.weight``. Any number of processes can read it, one too, and none needs a process group.
"""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

SHARDS = "shards"
"""Folder of the tensors, inside a checkpoint's."""
METADATA = ".metadata"

# What torch's own metadata is made of; a pickle that asks for anything else is no metadata.
_HARMLESS = {
    ("torch", "Size"),
    ("torch._utils", "_rebuild_device"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
}


class ShardReader(FileSystemReader):
    """Torch's reader, with metadata that cannot run code when they are unpickled."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``.

        Raises:
            ValueError: If it is not what torch writes.
        """
        path = Path(self.path) / METADATA
        with path.open("rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except pickle.UnpicklingError as error:
                raise ValueError(f"{path} is not what torch.distributed.checkpoint writes: {error}") from error
        metadata.storage_meta = None
        return metadata


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint's tensors are in the files of its ranks."""
    return (checkpoint / SHARDS).is_dir()


def describe_shards(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a sharded checkpoint without its content, on the meta device, by name."""
    described = {}
    for name, entry in ShardReader(checkpoint / SHARDS).read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), f"{name} is no tensor, and only tensors are written"
        described[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return described


def read_into(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Fill tensors by name from a sharded checkpoint; of a DTensor this process's part. No communication.

    Args:
        checkpoint: The checkpoint's folder.
        tensors: Of the right shapes; changed in place.
    """
    with warnings.catch_warnings():
        # Torch warns that each process reads by itself, which is what is wanted.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=ShardReader(checkpoint / SHARDS), no_dist=True)


def read_whole(checkpoint: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """Read whole tensors from a sharded checkpoint into this process, on the CPU.

    Args:
        checkpoint: The checkpoint's folder.
        wanted: Which names. Default: all.
    """
    described = describe_shards(checkpoint)
    tensors = {name: torch.empty_like(t, device="cpu") for name, t in described.items() if wanted(name)}
    read_into(checkpoint, tensors)
    return tensors


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
