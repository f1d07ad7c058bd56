"""Flat arrays in files, mapped into memory, of which here and there a part is read."""

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

# Not everywhere is there a way to say it.
_RANDOM, _SOON = getattr(mmap, "MADV_RANDOM", None), getattr(mmap, "MADV_WILLNEED", None)


class Mapped(np.memmap):
    """An array in a file that goes to another process by its name: pickled as it is, all that is in it would."""

    def __reduce__(self) -> Any:
        # A part of it, or what was computed from it, goes as any array.
        if self.filename is None or self.nbytes != Path(self.filename).stat().st_size:
            return np.array(self).__reduce__()
        return _map_again, (Path(self.filename), self.dtype, self.shape, self.scattered)

    def __array_finalize__(self, obj: Any) -> None:
        super().__array_finalize__(obj)
        # numpy has left the name to what shares the memory of the file.
        self.scattered = self.filename is not None and getattr(obj, "scattered", False)


def map_array(file: Path, dtype: Any, size: int, *, scattered: bool = False) -> np.ndarray:
    """A flat array mapped from disk.

    Args:
        file: Holds nothing else.
        dtype: Of an entry.
        size: Entries.
        scattered: Parts will be read here and there, by :func:`part`. Else the system reads ahead of whoever reads:
            megabytes on some machines, for a document of kilobytes.

    Raises:
        ValueError: If the file has another size.
    """
    if file.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes instead of {size} entries")
    if not size:
        # An empty file cannot be mapped.
        return np.empty(0, dtype)
    array = Mapped(file, dtype=dtype, mode="r")
    array.scattered = scattered
    if scattered and _RANDOM is not None:
        _pages(array).madvise(_RANDOM)
    return array


def part(array: np.ndarray, start: int, end: int) -> np.ndarray:
    """``array[start:end]``, plain; of an array mapped as `scattered` it is asked for at once, and not page by page.

    Args:
        array: Any array; a mapped one whole, with any shape.
        start: First entry along its first dimension.
        end: Behind the last one.
    """
    if isinstance(array, Mapped) and array.scattered and _SOON is not None and start < end:
        first = start * array.strides[0] // mmap.PAGESIZE * mmap.PAGESIZE
        _pages(array).madvise(_SOON, first, end * array.strides[0] - first)
    return np.asarray(array)[start:end]


def _pages(array: np.ndarray) -> mmap.mmap:
    """What an array is mapped by."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap), "np.memmap keeps it"
    return base


def _map_again(file: Path, dtype: Any, shape: tuple[int, ...], scattered: bool) -> np.ndarray:
    return map_array(file, dtype, math.prod(shape), scattered=scattered).reshape(shape)
