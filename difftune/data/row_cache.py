"""The rows of an epoch, laid once on a machine and mapped into memory by every process that reads them.

A folder `rows-...` beside the tokens holds a flat file an epoch: where each row begins, and the documents of all rows.
Its name is a hash of all that decides the rows: the lengths of the documents, the settings, the code. Whoever needs an
epoch first lays its rows, others wait for the file, which appears whole, by renaming. Three epochs are kept: the
first, which every start counts, and the last two. The folder can be removed at any time: it is made again.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from difftune.data.packing import Rows

log = logging.getLogger(__name__)


class RowCache:
    """The rows of epochs, in files or, without a folder or where nothing can be written, of the last epoch in memory.

    Args:
        folder: Where tokens are cached. None: no files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._digest: tuple[np.ndarray, str] | None = None
        self._held: tuple[Path | str, Rows] | None = None

    def rows(self, lengths: np.ndarray, settings: Sequence[object], epoch: int, lay: Callable[[], Rows]) -> Rows:
        """The rows of an epoch: those laid before, by whichever process, or new ones.

        Args:
            lengths: int64, shape [documents]: tokens of each document.
            settings: What else than the lengths decides the rows, as plain values; the epoch apart.
            epoch: From 0.
            lay: Makes them, a function of the other arguments alone.
        """
        key = self._key(lengths, settings)
        name = f"{key}/{epoch}"
        if self._held is None or self._held[0] != name:
            # The rows before are let go first: where they are in no file, two epochs would be in memory.
            self._held = None
            folder = self._folder and self._folder / f"rows-{key}"
            self._held = name, lay() if folder is None else self._shared(folder, epoch, len(lengths), lay)
        return self._held[1]

    def __getstate__(self) -> dict[str, object]:
        # A process that is not forked maps the files itself.
        return {**self.__dict__, "_digest": None, "_held": None}

    def _shared(self, folder: Path, epoch: int, documents: int, lay: Callable[[], Rows]) -> Rows:
        """The rows in the file of an epoch, which is made if absent."""
        file = folder / f"epoch-{epoch}.bin"
        # What is there is whole, by renaming: reading it writes nothing, no lock either.
        if (rows := _open(file, documents)) is not None:
            return rows
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                if (rows := _open(file, documents)) is None:
                    rows = lay()
                    _write(file, rows)
                    _keep_only(folder, {0, epoch - 1, epoch})
                    rows = _open(file, documents)
                    assert rows is not None, f"the rows in {file} cannot be read back"
        except OSError as error:
            log.warning("%s cannot be written (%s): each process keeps the rows of an epoch in memory", folder, error)
            self._folder = None
        return lay() if rows is None else rows

    def _key(self, lengths: np.ndarray, settings: Sequence[object]) -> str:
        # The lengths are those of the data, which stay: hashed once.
        if self._digest is None or self._digest[0] is not lengths:
            self._digest = lengths, hashlib.sha256(np.ascontiguousarray(lengths).data).hexdigest()
        parts = [self._digest[1], json.dumps(list(settings)), _code_fingerprint()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _open(file: Path, documents: int) -> Rows | None:
    """Rows mapped from their file; None if it is absent or damaged."""
    try:
        flat = np.asarray(np.memmap(file, dtype=np.int64, mode="r"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s) and is made again", file, error)
        return None
    rows = Rows(documents=flat[len(flat) - documents :], offsets=flat[: len(flat) - documents])
    if len(flat) <= documents or rows.offsets[0] != 0 or rows.offsets[-1] != documents:
        log.warning("%s is damaged (it does not hold %d documents) and is made again", file, documents)
        return None
    return rows


def _write(file: Path, rows: Rows) -> None:
    """Put rows to disk, whole or not at all; only under the lock."""
    building = file.with_suffix(".tmp")
    try:
        with building.open("wb") as stream:
            for array in (rows.offsets, rows.documents):
                stream.write(np.ascontiguousarray(array, dtype=np.int64).data)
            stream.flush()
            os.fsync(stream.fileno())
        building.replace(file)
    finally:
        building.unlink(missing_ok=True)


def _keep_only(folder: Path, epochs: set[int]) -> None:
    """Remove the files of other epochs, and what killed processes left. Who has one mapped can go on reading it."""
    names = {f"epoch-{epoch}.bin" for epoch in epochs}
    for file in folder.glob("epoch-*"):
        if file.name not in names:
            # Where a mapped file cannot be removed, it is the next time.
            with contextlib.suppress(OSError):
                file.unlink()


def _code_fingerprint() -> str:
    """A hash of what lays rows, numpy's random numbers included."""
    digest = hashlib.sha256(np.__version__.encode())
    for name in ("corpus", "packing", "stream"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()
