"""A model folder for others: complete in its place or not there at all, with a card that says what it is."""

import logging
import platform
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout

import difftune
from difftune.interruption import raise_pending, raising

log = logging.getLogger(__name__)

_PRIVATE_PATH = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s/|,;()`]+/)*([^\s/|,;()`]+)/?")

# In the hidden folder beside the place: who writes there holds the lock, which the system frees when it dies.
_LOCK, _NEW, _OLD = "lock", "new", "old"


@contextmanager
def new_folder(out_dir: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write in, and rename it to its place when the block ends without an error.

    On any error, Ctrl-C or SIGTERM nothing is left behind, and a folder that was to be overwritten is untouched. What a
    process left that could not tidy up (SIGKILL, a power cut) is hidden, and the next call for the same place removes
    it.

    Args:
        out_dir: Where the folder shall be.
        overwrite: Replace a model folder that is there.

    Yields:
        An empty folder beside that place, of the same name.

    Raises:
        ValueError: If something stands there that may not be replaced.

    Example:
        >>> with new_folder("out") as folder:  # doctest: +SKIP
        ...     (folder / "config.json").write_text("{}")
    """
    target = Path(out_dir).expanduser().absolute()
    _remove_leftovers(target)
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with raising(signal.SIGTERM, lambda: SystemExit(128 + signal.SIGTERM)):
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            with FileLock(work / _LOCK):
                written = work / _NEW / target.name
                written.mkdir(parents=True)
                yield written
                _follow_umask(written)
                raise_pending()
                _put_in_place(written, target, work / _OLD)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def check_target(out_dir: str | Path, *, overwrite: bool = False) -> None:
    """Raise unless a folder may be made, or the one that is there may be replaced.

    Args:
        out_dir: Where the folder shall be.
        overwrite: Whether the user asked to replace what is there.

    Raises:
        ValueError: If it exists and ``overwrite`` is false, or it holds neither a model nor an adapter.
    """
    target = Path(out_dir).expanduser().absolute()
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists: choose another folder, or overwrite=True (--overwrite) to replace it")
    if not any((target / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{target} is not a model folder (no config.json or adapter_config.json), "
            "so it is not overwritten: remove it yourself"
        )


def usage(name: str, *, brings_code: bool) -> str:
    """How a reader loads the folder, for :func:`model_card`.

    Args:
        name: Of the folder.
        brings_code: Whether transformers has no such model, and the folder brings the code of it.

    Returns:
        A sentence and a block of Python.
    """
    needs = (
        "transformers loads it with the modelling code in this folder. "
        "Where difftune is installed, `import difftune.modeling` takes the place of `trust_remote_code`:"
        if brings_code
        else "Plain transformers loads it:"
    )
    trust = ", trust_remote_code=True" if brings_code else ""
    # AutoTokenizer reads config.json first, and asks before it imports the class that auto_map names there.
    alone = (
        f"""

The tokenizer alone needs no code: `transformers.PreTrainedTokenizerFast.from_pretrained("{name}")`."""
        if brings_code
        else ""
    )
    return f"""{needs}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
```{alone}"""


def model_card(name: str, *, about: str, usage: str, rows: Mapping[str, str], details: str = "") -> str:
    """The README.md of a model folder.

    Args:
        name: Of the folder.
        about: What the model is and how it was made; "by difftune" and the version follow.
        usage: How to load it.
        rows: The table: what, and its value. The versions are added.
        details: Markdown below the table.

    Returns:
        The text.
    """
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    about, rows = without_folders(about), {what: without_folders(value) for what, value in rows.items()}
    table = "\n".join(f"| {what} | {value} |" for what, value in {**rows, "written with": versions}.items())
    below = f"\n{details}\n" if details else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

{about} by difftune {difftune.__version__}. {usage}

| | |
|---|---|
{table}
{below}"""


def without_folders(text: str) -> str:
    """A text in which a path from the root or the home folder is its last name: where it lay is the author's affair.

    Example:
        >>> without_folders("/disk/models/base, merged into org/model")
        'base, merged into org/model'
    """
    return _PRIVATE_PATH.sub(r"\1", text)


def _remove_leftovers(target: Path) -> None:
    """Remove the hidden folders of processes that died while they wrote to this place; those of living ones stay."""
    hidden = re.compile(re.escape(f".{target.name}.") + r"[^.]+\.partial")
    folders = target.parent.iterdir() if target.parent.is_dir() else ()
    for work in [folder for folder in folders if hidden.fullmatch(folder.name) and (folder / _LOCK).is_file()]:
        try:
            with FileLock(work / _LOCK).acquire(timeout=0):
                # It died between taking the old folder away and putting the new one there.
                if (work / _OLD).is_dir() and not target.exists():
                    (work / _OLD).rename(target)
                    log.warning("%s is back: a process died while it replaced it", target)
                shutil.rmtree(work, ignore_errors=True)
        except Timeout:
            continue
        log.warning("removed %s, which a process that died had left unfinished", work)


def _follow_umask(folder: Path) -> None:
    """Give files the rights that a new file has here: safetensors writes its own for the owner alone."""
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(rights)


def _put_in_place(written: Path, target: Path, replaced: Path) -> None:
    """Rename the finished folder to its place; the one that stood there survives a failure and an interruption."""
    try:
        if target.exists():
            target.rename(replaced)
        written.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
