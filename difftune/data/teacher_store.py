"""What a teacher says to the label tokens of a tokenised source, stored once beside its tokens.

For each label token: the teacher's k most likely tokens, their log-probabilities, and the log of the mass of all
others. An entry belongs to one entry of the token cache and to one :class:`TeacherSettings`; it is built by appending,
resumed after a kill and appears whole, as :mod:`difftune.data.token_cache` does it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from difftune.data.chat import Encoded, TeacherRows
from difftune.data.mapped import map_array
from difftune.data.sources import Source
from difftune.data.token_cache import AppendedArrays, Progress, cache_entry, finish
from difftune.data.tokenized import StoredTeacher, TokenizedSet

DTYPES = ("float16", "float32")
BATCH_TOKENS = 8192
"""Tokens, padding included, that a teacher is given at once; a longer document comes alone."""

Score = Callable[[Sequence[Encoded]], Sequence[TeacherRows]]
"""From some documents to what the teacher says to the label tokens of each."""


@dataclass(frozen=True)
class TeacherSettings:
    """What decides the stored values."""

    teacher: str
    """The teacher, as the recipe names it."""
    top_k: int
    temperature: float
    seq_len: int
    """Tokens of a document that are scored; the rest is never learned."""
    overlong: str
    """"drop": documents longer than `seq_len` are not scored; else their first `seq_len` tokens are."""
    dtype: str = "float16"
    """Of the stored log-probabilities; the tail's are float32."""
    quantization: str | None = None
    """How the teacher's weights are held; None: plain."""

    def entry(self, source: Source, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> Path:
        """The folder in which the values for a source are, or would be."""
        tokens = cache_entry(source, tokenizer, cache_dir)
        key = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return tokens.with_name(f"{tokens.name}-teacher-{key}")

    def require(self, source: Source, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> None:
        """Check that the tokens of a source and the values for them are there, without writing anything.

        Raises:
            ValueError: If they are not.
        """
        tokens, entry = cache_entry(source, tokenizer, cache_dir), self.entry(source, tokenizer, cache_dir)
        if not all((folder / "meta.json").is_file() for folder in (tokens, entry)):
            raise ValueError(
                f"nothing is stored of the teacher {self.teacher} for {source.path} with top_k={self.top_k}, "
                f"temperature={self.temperature:g} and seq_len={self.seq_len} in {cache_dir}: run `difftune prepare "
                "--teacher` with this recipe first, or leave out distill.top_k to run the teacher while training"
            )


def with_teacher(
    tokens: TokenizedSet,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    settings: TeacherSettings,
) -> TokenizedSet:
    """A tokenised source with what was stored of a teacher, mapped from disk.

    Raises:
        ValueError: If nothing is stored for this source, tokenizer and settings, or it is damaged.
    """
    settings.require(source, tokenizer, cache_dir)
    entry = settings.entry(source, tokenizer, cache_dir)
    labels = json.loads((entry / "meta.json").read_bytes())["labels"]
    k = settings.top_k
    try:
        indices = map_array(entry / "indices.bin", np.int32, labels * k, scattered=True).reshape(labels, k)
        log_probs = map_array(entry / "log_probs.bin", settings.dtype, labels * k, scattered=True).reshape(labels, k)
        log_tail = map_array(entry / "log_tail.bin", np.float32, labels, scattered=True)
        offsets = map_array(entry / "offsets.bin", np.int64, len(tokens) + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{entry} is damaged ({error}): remove it and run difftune prepare --teacher again") from error
    return replace(tokens, teacher=StoredTeacher(TeacherRows(indices, log_probs, log_tail), offsets))


def store_teacher(
    tokens: TokenizedSet,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    settings: TeacherSettings,
    score: Score,
    progress: Progress | None = None,
) -> Path:
    """Store what a teacher says to a tokenised source, or go on with what a killed process left; return the entry.

    Args:
        tokens: The tokenised source.
        source: The source.
        tokenizer: Its tokenizer.
        cache_dir: Where its tokens are.
        settings: What `score` was made with.
        score: The teacher.
        progress: Is told documents and label tokens done so far.
    """
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype of a stored teacher must be one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    entry = settings.entry(source, tokenizer, cache_dir)
    building = entry.with_name(f"{entry.name}.building")
    with FileLock(entry.with_name(f"{entry.name}.lock")):
        if (entry / "meta.json").is_file():
            return entry
        files = AppendedArrays(building, ["offsets", *TeacherRows._fields])
        done, labels = files.state.get("documents", 0), files.state.get("labels", 0)
        if not done:
            files.append("offsets", np.zeros(1, np.int64))
        types = {"indices": np.int32, "log_probs": settings.dtype, "log_tail": np.float32}
        for start, end in _batches(tokens.lengths, settings, done):
            scored = {n: tokens.document(n).first(settings.seq_len) for n in _to_score(tokens, settings, start, end)}
            said = dict(zip(scored, score(list(scored.values())) if scored else [], strict=True))
            for n in range(start, end):
                if n in said:
                    expected = int(np.count_nonzero(scored[n].learned))
                    assert len(said[n].log_tail) == expected, "a row for each label token"
                    labels += expected
                    for name, dtype in types.items():
                        files.append(name, getattr(said[n], name).astype(dtype))
                files.append("offsets", np.asarray([labels], np.int64))
            files.note({"documents": end, "labels": labels})
            if progress is not None:
                progress(end, labels)
        files.note({}, now=True)
        files.close()
        finish(building, entry, {**asdict(settings), "labels": labels})
    return entry


def _to_score(tokens: TokenizedSet, settings: TeacherSettings, start: int, end: int) -> list[int]:
    if settings.overlong != "drop":
        return list(range(start, end))
    return (start + np.flatnonzero(np.diff(tokens.offsets[start : end + 1]) <= settings.seq_len)).tolist()


def _batches(lengths: np.ndarray, settings: TeacherSettings, start: int) -> Iterator[tuple[int, int]]:
    """Spans of documents that go to the teacher together; they depend on the lengths alone."""
    lengths = np.minimum(lengths, settings.seq_len)
    while start < len(lengths):
        end, longest = start, 0
        while end < len(lengths):
            longest = max(longest, int(lengths[end]))
            if end > start and longest * (end + 1 - start) > BATCH_TOKENS:
                break
            end += 1
        yield start, end
        start = end
