"""What difftune writes, safely: a file whole or not at all, a folder by one process, nothing over foreign files."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from difftune.user_errors import is_user_error, naming

LOCK = ".lock"
"""In a folder that is being written; the system frees it when its holder dies."""

_NOBODYS = {LOCK, ".DS_Store", "Thumbs.db", ".gitkeep", ".gitignore", "lost+found", ".snapshot"}
_OUTPUT = {".log", ".out", ".err"}
"""Of launchers, which put the output of a run into its folder before the run begins."""
_SHOWN = 3


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, and its folder: an interruption or a power cut leaves the old content or the new, nothing between.

    Args:
        path: The file. Where it is a link, what is behind the link is written.
        content: Text, written in UTF-8, or bytes.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}"[-200:])
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The user knows the file by its own name.
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def one_writer(
    folder: Path, *, name: str, what: str, is_ours: Callable[[], bool], parts: tuple[str, ...] = ()
) -> Iterator[None]:
    """Hold a folder as the one process that writes to it.

    Args:
        folder: The folder; made if it is not there, and removed at the end if nothing was written.
        name: The key or option that names it, for messages.
        what: What lies in such a folder, for messages: "run".
        is_ours: Whether the folder holds such a thing already.
        parts: Entries that may be there before.

    Raises:
        ValueError: If another process writes there, or if it holds files that are not difftune's.
    """
    with naming(name):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / LOCK
        was_there = file.exists()
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{name}: {folder} is being written by another process of difftune: wait for its end, or name "
                "another folder"
            ) from None
    refused = False
    try:
        foreign = [] if is_ours() else foreign_entries(folder, parts)
        if foreign:
            raise ValueError(
                f"{name}: {folder} holds files and no {what} of difftune ({_shown(foreign)}): name a new or an empty "
                "folder"
            )
        yield
    except BaseException as error:
        refused = is_user_error(error)
        raise
    finally:
        if refused and not was_there:
            file.unlink(missing_ok=True)
        lock.release()
        _remove_empty(folder, missing)


def foreign_entries(folder: Path, parts: tuple[str, ...] = ()) -> list[str]:
    """What a folder holds besides `parts`, without empty folders and what systems and launchers leave."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in {*_NOBODYS, *parts}
        and entry.suffix not in _OUTPUT
        and not entry.name.startswith(".nfs")
        and not (entry.is_dir() and not any(entry.iterdir()))
    )


def _shown(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _remove_empty(folder: Path, made: list[Path]) -> None:
    """Take folders away again that were made for nothing."""
    if folder in made and {path.name for path in folder.iterdir()} <= {LOCK}:
        (folder / LOCK).unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()
