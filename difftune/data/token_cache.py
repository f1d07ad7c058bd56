"""Tokenised sources on disk: built once, by any number of processes, resumed after a kill, mapped into memory.

An entry is a folder of flat files, one an array of :class:`~difftune.data.tokenized.TokenizedSet`, and ``meta.json``.
It is built beside its place, by appending: one piece of a few hundred rows after another, in the order of the source,
whichever process tokenised it. A journal says how much of the files is whole. So memory holds some pieces and no more,
the bytes do not depend on the number of processes, and whoever comes after a kill cuts the files to the journal and
goes on from there. The entry appears whole, by renaming.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from difftune.data.mapped import map_array
from difftune.data.sources import Source, fingerprint
from difftune.data.tokenized import ARRAYS, OF_TOKENS, Counts, Piece, TokenizedSet, read_pieces
from difftune.data.tokenizers import tokenizer_fingerprint

log = logging.getLogger(__name__)

JOURNAL_EVERY_S = 5.0
"""Seconds between two notes of what is whole: at most this much work is done again after a kill."""

Progress = Callable[[int, int], None]
"""Is told rows and tokens done so far."""


def load_tokenized(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> TokenizedSet:
    """The tokenised source, from the cache if it holds this very content.

    The key is a hash of the content of the source, its settings, the tokenizer with its chat template, and
    the code of this room. Of several processes one builds an entry and the others wait.

    Args:
        source: What to read.
        tokenizer: Decides the ids.
        cache_dir: Folder of the cache, made if absent. None: no cache, all in memory.
        workers: Processes that tokenise; 1: this one.
        progress: Called after each piece.

    Raises:
        ValueError: If the source cannot be read or has no row, or a row is broken; names the row.
    """
    if cache_dir is None:
        return _join(list(_tokenized(source, tokenizer, workers, 0)), source)
    entry = cache_entry(source, tokenizer, cache_dir)
    # What is there is whole, by renaming: reading it writes nothing, no lock either.
    if (cached := open_entry(entry, source.path)) is not None:
        return cached
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(entry.with_name(f"{entry.name}.lock")):
        if (cached := open_entry(entry, source.path)) is None:
            _build_entry(source, tokenizer, entry, workers, progress)
            cached = open_entry(entry, source.path)
            assert cached is not None, f"the cache entry {entry} cannot be read back"
    return cached


def cache_entry(source: Source, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> Path:
    """The folder in which a tokenised source is, or would be."""
    settings = json.dumps([source.format, source.answer_only, source.bad_rows])
    parts = [_code_fingerprint(), fingerprint(source), tokenizer_fingerprint(tokenizer), settings]
    return cache_dir / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def content_hash(entry: Path) -> str:
    """The hash of an entry's tokens and all that is kept of them, as `meta.json` has it."""
    return json.loads((entry / "meta.json").read_bytes())["content"]


def open_entry(entry: Path, source: str) -> TokenizedSet | None:
    """A cache entry, its arrays mapped from disk; None if absent or damaged."""
    if not entry.is_dir():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
        counts = Counts(meta["rows_read"], Counter(meta["dropped"]), meta["unknown_tokens"], meta["first_bad"])
        arrays: dict[str, Any] = {
            name: map_array(entry / f"{name}.bin", dtype, meta["sizes"][name], scattered=name in OF_TOKENS)
            for name, dtype in ARRAYS.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cache entry %s is damaged (%s) and is built again", entry, error)
        return None
    return TokenizedSet(source=source, counts=counts, **arrays)


class AppendedArrays:
    """Flat files that grow together, and a journal of how much of them is whole.

    Args:
        folder: Holds them; made if absent.
        names: Of the arrays.

    Attributes:
        state: What the journal said, with what was given to `note` last; empty at the beginning. Files are cut to it.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self.state = self._read_journal()
        self._files = {}
        for name in names:
            file = (folder / f"{name}.bin").open("ab")
            size = self.state.get("bytes", {}).get(name, 0)
            if file.tell() < size:
                raise ValueError(
                    f"{folder / name}.bin is shorter than its journal says: remove {folder} and start again"
                )
            file.truncate(size)
            self._files[name] = file
        self._noted = time.monotonic()

    def append(self, name: str, array: np.ndarray) -> None:
        """Write an array behind the ones before it."""
        self._files[name].write(np.ascontiguousarray(array).data if array.size else b"")

    def note(self, state: dict[str, Any], *, now: bool = False) -> None:
        """Put to disk what was appended, and say so; without `now` only if the last time was long ago."""
        if not now and time.monotonic() - self._noted < JOURNAL_EVERY_S:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.state = {**state, "bytes": {name: file.tell() for name, file in self._files.items()}}
        journal = self._folder / "journal.tmp"
        journal.write_text(json.dumps(self.state))
        journal.replace(self._folder / "journal.json")
        self._noted = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _read_journal(self) -> dict[str, Any]:
        try:
            return json.loads((self._folder / "journal.json").read_bytes())
        except (OSError, ValueError):
            return {}


def finish(building: Path, entry: Path, meta: dict[str, Any]) -> None:
    """Write `meta.json`, and rename a finished folder to its place."""
    (building / "meta.json").write_text(json.dumps(meta))
    (building / "journal.json").unlink()
    shutil.rmtree(entry, ignore_errors=True)
    building.rename(entry)


def _build_entry(
    source: Source, tokenizer: PreTrainedTokenizerBase, entry: Path, workers: int, progress: Progress | None
) -> None:
    """Build a cache entry beside its place, or go on with what a killed process left there."""
    building = entry.with_name(f"{entry.name}.building")
    files = AppendedArrays(building, list(ARRAYS))
    rows, tokens, documents = (files.state.get(name, 0) for name in ("rows", "tokens", "documents"))
    counts = Counts(
        rows,
        Counter(files.state.get("dropped", {})),
        files.state.get("unknown_tokens", 0),
        files.state.get("first_bad", {}),
    )
    content = files.state.get("content", "")
    if rows:
        log.info("%s: going on after %d rows that were tokenised before", source.path, rows)
    else:
        files.append("offsets", np.zeros(1, np.int64))
    try:
        for piece in _tokenized(source, tokenizer, workers, rows):
            digest = hashlib.sha256(content.encode())
            for name in ARRAYS:
                array = getattr(piece, name)
                digest.update(array)
                files.append(name, array[1:] + tokens if name == "offsets" else array)
            content = digest.hexdigest()
            counts, tokens, documents = counts + piece.counts, tokens + len(piece.ids), documents + len(piece)
            done = {"rows": counts.rows_read, "tokens": tokens, "documents": documents, "content": content}
            found = {name: getattr(counts, name) for name in ("dropped", "unknown_tokens", "first_bad")}
            files.note({**done, **found})
            if progress is not None:
                progress(counts.rows_read, tokens)
        if not counts.rows_read:
            raise ValueError(f"{source.path} has no row")
        files.note({}, now=True)
    except ValueError:
        # The source is wrong: mended it is another one, with another entry.
        files.close()
        shutil.rmtree(building)
        raise
    files.close()
    sizes = {"ids": tokens, "learned": tokens, "offsets": documents + 1}
    meta = {
        "sizes": {name: sizes.get(name, documents) for name in ARRAYS},
        "rows_read": counts.rows_read,
        "dropped": dict(counts.dropped),
        "unknown_tokens": counts.unknown_tokens,
        "first_bad": counts.first_bad,
        "content": content,
    }
    finish(building, entry, meta)


def _tokenized(
    source: Source, tokenizer: PreTrainedTokenizerBase, workers: int, skip_rows: int
) -> Iterator[TokenizedSet]:
    """The pieces of a source in order, tokenised here or by other processes."""
    pieces = read_pieces(source, skip_rows=skip_rows)
    if workers == 1:
        for piece in pieces:
            yield piece.tokenize(source, tokenizer)
        return
    # The children of a fork share what is imported; elsewhere each imports anew.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(
        workers, context, initializer=_remember, initargs=(source, tokenizer, os.getpid())
    ) as pool:
        waiting: deque[Future[TokenizedSet]] = deque()
        try:
            for piece in pieces:
                waiting.append(pool.submit(_work, piece))
                # As many as keep every process busy: the rest of the source stays on disk.
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


_task: tuple[Source, PreTrainedTokenizerBase] | None = None


def _remember(source: Source, tokenizer: PreTrainedTokenizerBase, parent: int) -> None:
    """What a process of the pool needs for every piece; one thread each."""
    global _task
    _task = (source, tokenizer)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process when its parent was killed: a pool waits for work for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(piece: Piece) -> TokenizedSet:
    assert _task is not None, "set when the process starts"
    return piece.tokenize(*_task)


def _join(pieces: list[TokenizedSet], source: Source) -> TokenizedSet:
    if not pieces:
        raise ValueError(f"{source.path} has no row")
    names = [name for name in ARRAYS if name != "offsets"]
    joined: dict[str, Any] = {name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names}
    offsets = np.cumsum(np.concatenate([[0], *(piece.lengths for piece in pieces)]), dtype=np.int64)
    counts = sum((piece.counts for piece in pieces), Counts())
    return TokenizedSet(source=source.path, offsets=offsets, counts=counts, **joined)


def _code_fingerprint() -> str:
    """A hash of the modules that decide what a row becomes: a change to them outdates old entries."""
    digest = hashlib.sha256()
    rooms = "files readers rows bad_rows sources synthetic formats chat turns tokenized token_cache ../rendering"
    for name in rooms.split():
        digest.update(Path(__file__).parent.joinpath(f"{name}.py").read_bytes())
    return digest.hexdigest()
