"""A command that is refused leaves nothing behind: what it had written by then is taken away again."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from difftune.user_errors import is_user_error


@contextmanager
def nothing_left_if_refused(folder: Path, keep: str, restore: Sequence[str] = ()) -> Iterator[None]:
    """Remove from a folder what was not there before, if the work inside ends with an error of the user's input.

    Of the files that were there, those that match `restore` are put back as they were. Nothing is done once something
    matches `keep` that did not before: then work was done that is worth more than a clean folder.

    Args:
        folder: What the work writes to; with the folders above it that are not there yet.
        keep: Pattern, below the folder, of what is worth keeping: `checkpoints/*/step-*`.
        restore: Patterns, below the folder, of small files that the work writes anew.
    """
    missing = next((path for path in (*reversed(folder.parents), folder) if not path.exists()), None)
    before = set() if missing is not None else set(folder.rglob("*"))
    contents = {path: path.read_bytes() for one in restore for path in sorted(folder.glob(one)) if path.is_file()}
    kept = set() if missing is not None else set(folder.glob(keep))
    try:
        yield
    except BaseException as error:
        if is_user_error(error) and folder.exists() and set(folder.glob(keep)) <= kept:
            if missing is not None:
                shutil.rmtree(missing, ignore_errors=True)
            else:
                _remove_new(folder, before)
                for path, content in contents.items():
                    if path.read_bytes() != content:
                        path.write_bytes(content)
        raise


def _remove_new(folder: Path, before: set[Path]) -> None:
    # The deepest first, so that a folder is empty when its turn comes.
    for path in sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True):
        if path in before:
            continue
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
