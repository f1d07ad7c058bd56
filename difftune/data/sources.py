"""Where rows come from: files, folders, hub data sets and generators, read one row at a time."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from difftune.data import synthetic

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLIT_WORDS = {"train", "test", "validation", "valid", "val", "dev"}
_SYNTHETIC = "synthetic:"


@dataclass(frozen=True)
class Source:
    """One place that training rows or problems come from."""

    path: str
    """A .jsonl, .json or .parquet file, a folder of them, a `datasets` hub id, `synthetic:arithmetic` or
    `synthetic:reasoning_gym/<task>`. What exists on disk wins over a hub id of the same name."""
    format: str = "auto"
    """A name of `difftune.data.formats.FORMATS`; "auto" decides by the columns of the first row."""
    split: str = "train"
    """Split of a hub data set or a generator ("train" or "test"); in a folder whose file names say train,
    test or validation, the files of that split. A single file is one split: not looked at."""
    name: str | None = None
    """Configuration of a hub data set ("main" of gsm8k). None: its default."""
    limit: int | None = None
    """Read only the first so many rows. None: all."""
    answer_only: bool = False
    """Learn the final answer instead of the worked solution; the format must know the answer."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a generator: see `difftune.data.synthetic`. Only for `synthetic:` paths."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a data source needs a path: a file, a folder, a hub id or synthetic:arithmetic")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit of {self.path} must be at least 1 or null (all rows), got {self.limit}")
        if self.options and not self.path.startswith(_SYNTHETIC):
            raise ValueError(f"options {sorted(self.options)} are for synthetic: paths; {self.path} takes none")


@dataclass(frozen=True)
class Row:
    """One row as its source holds it, and where it stands there, for error messages."""

    columns: dict[str, Any]
    where: str


def read_rows(source: Source, *, streaming: bool = False) -> Iterator[Row]:
    """Yield the rows of a source in its own order, which is the same at every call.

    Args:
        source: What to read.
        streaming: A hub data set is read over the network as it is needed, instead of being downloaded first.
            Local files and generators are read row by row either way (.json files whole, as their syntax
            demands).

    Raises:
        ValueError: If the path is neither a file nor a folder nor a reachable hub data set, or if a file is
            broken; the message names the file and the line.
    """
    return islice(_all_rows(source, streaming), source.limit)


def fingerprint(source: Source) -> str:
    """A hash of all that `read_rows(source)` depends on: content of files, version of a hub data set."""
    digest = hashlib.sha256()
    settings = [source.split, source.name, source.limit, source.options]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if source.path.startswith(_SYNTHETIC):
        digest.update(f"{source.path} {synthetic.version(_generator(source))}".encode())
    elif (path := Path(source.path).expanduser()).exists():
        for file in _files(path, source.split):
            digest.update(f"{file.name} ".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    else:
        digest.update(_hub_dataset(source.path, source.name, source.split, False)._fingerprint.encode())
    return digest.hexdigest()


def _generator(source: Source) -> str:
    return source.path.removeprefix(_SYNTHETIC)


def _all_rows(source: Source, streaming: bool) -> Iterator[Row]:
    if source.path.startswith(_SYNTHETIC):
        rows = synthetic.generate(_generator(source), source.split, source.options)
        yield from (Row(row, f"{source.path}, row {n}") for n, row in enumerate(rows, 1))
    elif (path := Path(source.path).expanduser()).exists():
        for file in _files(path, source.split):
            yield from _READERS[file.suffix](file)
    else:
        rows = _hub_dataset(source.path, source.name, source.split, streaming)
        yield from (Row(row, f"{source.path}, {source.split} row {n}") for n, row in enumerate(rows, 1))


def _files(path: Path, split: str) -> list[Path]:
    """The data files of a path, in the order of their names."""
    if path.is_file():
        if path.suffix not in FILE_SUFFIXES:
            raise ValueError(f"{path} must be a data file ({', '.join(FILE_SUFFIXES)}), got suffix {path.suffix!r}")
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in FILE_SUFFIXES)
    if not files:
        raise ValueError(
            f"{path} holds no data file ({', '.join(FILE_SUFFIXES)}); subfolders are not searched: name one"
        )
    # A folder that names its splits must not leak its test files into training.
    splits = {file: _SPLIT_WORDS & set(re.split(r"[^a-z]+", file.stem.lower())) for file in files}
    if not any(splits.values()):
        return files
    chosen = [file for file in files if split in splits[file]]
    if not chosen:
        found = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds no file of the split {split!r}: found {found}; set split, or name one file")
    return chosen


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                columns = json.loads(line.rstrip())
            except ValueError as error:  # also UnicodeDecodeError
                cause = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{where}: not valid JSON ({cause}); it begins {line[:60]!r}") from error
            yield Row(_mapping(columns, where), where)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        hint = "; one object a line? then name the file .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{path}: not valid JSON ({error}){hint}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a JSON array of objects, got {type(rows).__name__}")
    for number, columns in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield Row(_mapping(columns, where), where)


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for columns in batch.to_pylist():
            number += 1
            yield Row(columns, f"{path}, row {number}")


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _mapping(columns: Any, where: str) -> dict[str, Any]:
    if not isinstance(columns, dict):
        raise ValueError(f"{where}: a row must be a JSON object with named columns, got {type(columns).__name__}")
    return columns


@lru_cache(maxsize=4)
def _hub_dataset(path: str, name: str | None, split: str, streaming: bool) -> Any:
    """A `datasets` data set; kept, because its fingerprint is asked for before its rows."""
    looks_local = path.endswith(FILE_SUFFIXES) or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local:
        raise ValueError(f"{path}: no such file or folder (looked in {Path.cwd()})")
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: no such file or folder (looked in {Path.cwd()}), and as a data set of the hub "
            f"(name={name}, split={split}) it could not be loaded: {error}"
        ) from error
