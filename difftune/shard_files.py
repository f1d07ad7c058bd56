"""Tensors in the files of many ranks: written by torch.distributed.checkpoint, read by any number of processes.

A checkpoint of several ranks that share one model has a folder ``shards`` with a file a rank, in torch's distributed
format, and ``.metadata``, which says where each part of each tensor is. Names are those of a state dict, flat:
``model.norm.weight``. Any number of processes can read it, one too, and none needs a process group.
"""

import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
    """Torch's reader, with metadata that are read once, and cannot run code when they are unpickled."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``.

        Raises:
            ValueError: If it is not what torch writes.
        """
        if self._metadata is not None:
            return self._metadata
        path = Path(self.path) / METADATA
        with path.open("rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except pickle.UnpicklingError as error:
                raise ValueError(f"{path} is not what torch.distributed.checkpoint writes: {error}") from error
        metadata.storage_meta = None
        self._metadata = metadata
        return metadata


class ShardedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a sharded checkpoint by name, each read, whole and anew, when it is asked for.

    Args:
        checkpoint: The checkpoint's folder.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._reader = ShardReader(checkpoint / SHARDS)
        self.described: dict[str, torch.Tensor] = {}
        """Without content, on the meta device."""
        for name, entry in self._reader.read_metadata().state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), f"{name} is no tensor, and only tensors are written"
            self.described[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def read_into(self, tensors: dict[str, Any]) -> None:
        """Fill tensors of the right shapes, by name; of a DTensor this process's part. No communication."""
        with warnings.catch_warnings():
            # Torch warns that each process reads by itself, which is what is wanted.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=self._reader, no_dist=True)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU, by name."""
        tensors = {name: torch.empty_like(self.described[name], device="cpu") for name in names}
        self.read_into(tensors)
        return tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint's tensors are in the files of its ranks."""
    return (checkpoint / SHARDS).is_dir()


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
