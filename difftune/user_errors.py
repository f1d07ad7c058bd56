"""Which errors a message is enough for, and what it says: what our own code refused, and what a file system refused."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMEDIES = {
    errno.ENOENT: "look at its spelling, and at the folder that the command runs in",
    errno.EISDIR: "it is a folder, and a file is needed: name another path",
    errno.ENOTDIR: "it is a file, or lies below one, and a folder is needed: name another path",
    errno.EEXIST: "it is a file, and a folder is needed: name another path",
    errno.EACCES: "you may not: choose a place of your own, or change its rights",
    errno.EPERM: "you may not: choose a place of your own, or change its rights",
    errno.EROFS: "nothing can be written there: choose a place on another disk",
    errno.ENOSPC: "make room on its disk, or choose a place on another one",
    errno.EDQUOT: "your quota is used up: make room, or choose a place on another disk",
    errno.EFBIG: "its disk takes no file of this size: choose a place on another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead back to themselves: remove them, or name another path",
    errno.EINVAL: "its file system does not take it: choose another place",
    errno.ENXIO: "it is no file that can be read: name another path",
    errno.EMFILE: "too many files are open: allow more by ulimit -n",
    errno.ENFILE: "too many files are open on this machine: end other programs",
}


def is_user_error(error: BaseException) -> bool:
    """Whether a message is enough: our own code refused a value, or a path cannot be read or written."""
    if isinstance(error, OSError):
        kinds = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
        return error.errno in _REMEDIES or isinstance(error, kinds)
    if not isinstance(error, (ValueError, ImportError)) or error.__traceback__ is None:
        return False
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return Path(innermost.f_code.co_filename).is_relative_to(Path(__file__).parent)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Begin the message of what a file system refuses with the key or option that named the path.

    Raises:
        ValueError: In place of the error.
    """
    try:
        yield
    except OSError as error:
        if is_user_error(error):
            raise ValueError(f"{key}: {message_of(error)}") from error
        raise


def message_of(error: BaseException) -> str:
    """What to tell the user: the path, what the system said of it, and what can be done.

    Example:
        >>> message_of(OSError(28, "No space left on device", "run/a.jsonl"))
        'run/a.jsonl: No space left on device; make room on its disk, or choose a place on another one'
    """
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        place = f"{' to '.join(named)}: " if named else ""
        return f"{place}{error.strerror}; {_REMEDIES[error.errno]}"
    return str(error)
