"""A source as token ids: tokenised piece by piece, kept in flat arrays, cached by content."""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from difftune.data.chat import Encoded, encode_examples
from difftune.data.formats import Dropped, Example, Format, read_example, resolve_format
from difftune.data.sources import Row, Source, fingerprint, read_rows
from difftune.data.tokenizers import tokenizer_fingerprint

log = logging.getLogger(__name__)

PIECE_ROWS = 512
_ARRAYS = {
    "ids": np.int32,
    "learned": np.bool_,
    "offsets": np.int64,
    "questions": np.uint64,
    "row_numbers": np.int64,
}


@dataclass
class Counts:
    """What happened to the rows of a source before their length was looked at."""

    rows_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows by the reason for which they are not learned."""
    unknown_tokens: int = 0
    """Tokens that are the tokenizer's unknown token: text that the model cannot see."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.rows_read + other.rows_read,
            self.dropped + other.dropped,
            self.unknown_tokens + other.unknown_tokens,
        )


@dataclass(frozen=True)
class TokenizedSet:
    """Documents one after another in flat arrays, whole (no length limit is applied yet)."""

    source: str
    """Path of the source."""
    ids: np.ndarray
    """int32, all tokens of all documents."""
    learned: np.ndarray
    """bool, for each token whether it is a label."""
    offsets: np.ndarray
    """int64, shape [documents + 1]: where each document begins."""
    questions: np.ndarray
    """uint64, shape [documents]: `question_key` of each document's last user turn."""
    row_numbers: np.ndarray
    """int64, shape [documents]: the row of the source, from 1, that each document was."""
    counts: Counts

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64, shape [documents]: tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int) -> Encoded:
        """One document, as views."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Encoded(self.ids[part], self.learned[part])


def question_key(text: str) -> int:
    """64 bits that stand for a question, blind to white space: finds evaluation problems in training rows."""
    return int.from_bytes(hashlib.blake2b("".join(text.split()).encode(), digest_size=8).digest(), "little")


def tokenize_pieces(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, streaming: bool = False
) -> Iterator[TokenizedSet]:
    """Tokenise a source in its own order, a few hundred rows at a time."""
    rows = read_rows(source, streaming=streaming)
    row_format: Format | None = None
    start = 1
    while piece := list(islice(rows, PIECE_ROWS)):
        if row_format is None:
            row_format = resolve_format(source.format, piece[0].columns, piece[0].where)
        yield _tokenize(piece, start, source, row_format, tokenizer)
        start += len(piece)


def load_tokenized(source: Source, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None = None) -> TokenizedSet:
    """The tokenised source, from the cache if it holds this very content.

    The key is a hash of the content of the source, its settings, the tokenizer with its chat template, and
    the code of this room. An entry is a folder that appears whole, by renaming; of several processes one
    builds and the others wait.

    Args:
        source: What to read.
        tokenizer: Decides the ids.
        cache_dir: Folder of the cache, made if absent. None: no cache.
    """
    if cache_dir is None:
        return _build(source, tokenizer)
    settings = json.dumps([source.format, source.answer_only])
    parts = [_code_fingerprint(), fingerprint(source), tokenizer_fingerprint(tokenizer), settings]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    entry = cache_dir / key
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{key}.lock"):
        if (cached := _open_entry(entry, source.path)) is None:
            _write_entry(_build(source, tokenizer), entry)
            cached = _open_entry(entry, source.path)
            assert cached is not None, f"the cache entry {entry} cannot be read back"
    return cached


def _tokenize(
    rows: Sequence[Row], start: int, source: Source, row_format: Format, tokenizer: PreTrainedTokenizerBase
) -> TokenizedSet:
    counts = Counts(rows_read=len(rows))
    kept: list[tuple[int, Row, Example]] = []
    for number, row in enumerate(rows, start):
        example = read_example(row_format, row.columns, row.where, answer_only=source.answer_only)
        if isinstance(example, Dropped):
            counts.dropped[example.reason] += 1
        else:
            kept.append((number, row, example))
    documents = encode_examples(tokenizer, [example for _, _, example in kept], [row.where for _, row, _ in kept])
    ids = np.concatenate([np.empty(0, np.int32), *(document.ids for document in documents)])
    if tokenizer.unk_token_id is not None:
        counts.unknown_tokens = int(np.count_nonzero(ids == tokenizer.unk_token_id))
    return TokenizedSet(
        source=source.path,
        ids=ids,
        learned=np.concatenate([np.empty(0, np.bool_), *(document.learned for document in documents)]),
        offsets=np.cumsum([0, *(len(document.ids) for document in documents)], dtype=np.int64),
        questions=np.asarray([_question(example) for _, _, example in kept], dtype=np.uint64),
        row_numbers=np.asarray([number for number, _, _ in kept], dtype=np.int64),
        counts=counts,
    )


def _question(example: Example) -> int:
    asked = [message["content"] for message in example.messages if message["role"] == "user"]
    return question_key(asked[-1] if asked else example.text or "")


def _build(source: Source, tokenizer: PreTrainedTokenizerBase) -> TokenizedSet:
    pieces = list(tokenize_pieces(source, tokenizer))
    if not pieces:
        raise ValueError(f"{source.path} has no row")
    joined = {name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in _ARRAYS if name != "offsets"}
    offsets = np.cumsum(np.concatenate([[0], *(piece.lengths for piece in pieces)]), dtype=np.int64)
    counts = sum((piece.counts for piece in pieces), Counts())
    return TokenizedSet(source=source.path, offsets=offsets, counts=counts, **joined)


def _write_entry(tokenized: TokenizedSet, entry: Path) -> None:
    """Write a cache entry beside its place and rename it there, so that it is never seen half-written."""
    building = entry.with_name(f"{entry.name}.tmp")
    for left_over in (entry, building):
        shutil.rmtree(left_over, ignore_errors=True)
    building.mkdir()
    try:
        for name in _ARRAYS:
            with (building / f"{name}.bin").open("wb") as stream:
                getattr(tokenized, name).tofile(stream)
                stream.flush()
                os.fsync(stream.fileno())
        counts = tokenized.counts
        meta = {
            "sizes": {name: len(getattr(tokenized, name)) for name in _ARRAYS},
            "rows_read": counts.rows_read,
            "dropped": dict(counts.dropped),
            "unknown_tokens": counts.unknown_tokens,
        }
        (building / "meta.json").write_text(json.dumps(meta))
        building.rename(entry)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _open_entry(entry: Path, source: str) -> TokenizedSet | None:
    """A cache entry, its arrays mapped from disk; None if absent or damaged."""
    if not entry.is_dir():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
        counts = Counts(meta["rows_read"], Counter(meta["dropped"]), meta["unknown_tokens"])
        arrays = {}
        for name, dtype in _ARRAYS.items():
            size, file = meta["sizes"][name], entry / f"{name}.bin"
            if file.stat().st_size != size * np.dtype(dtype).itemsize:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes instead of {size} entries")
            # An empty file cannot be mapped.
            arrays[name] = np.memmap(file, dtype=dtype, mode="r") if size else np.empty(0, dtype)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cache entry %s is damaged (%s) and is built again", entry, error)
        return None
    return TokenizedSet(source=source, counts=counts, **arrays)


def _code_fingerprint() -> str:
    """A hash of the modules that decide what a row becomes: a change to them outdates old entries."""
    digest = hashlib.sha256()
    for name in ("sources", "synthetic", "formats", "chat", "tokenized"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()
