"""Where rows come from: files, folders, hub data sets and generators, read one row at a time."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from difftune.data import synthetic
from difftune.data.files import COMPRESSION, FILE_SUFFIXES, data_files, is_saved_dataset
from difftune.data.readers import read_file
from difftune.data.rows import BAD_ROWS, BadRow, Row

_SYNTHETIC = "synthetic:"


@dataclass(frozen=True)
class Source:
    """One place that training rows or problems come from."""

    path: str
    """A file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow; text ones also .gz, .zst, .bz2), a folder of them
    or one of `save_to_disk`, a `datasets` hub id, `synthetic:arithmetic` or `synthetic:reasoning_gym/<task>`. What
    exists on disk wins over a hub id of the same name."""
    format: str = "auto"
    """A name of `difftune.data.formats.FORMATS`; "auto" decides by the columns of the first row."""
    split: str = "train"
    """Split of a hub data set or a generator ("train" or "test"); in a folder whose names say train, test or
    validation, the files of that split (see `difftune.data.files`). A single file is one split: not looked at."""
    name: str | None = None
    """Configuration of a hub data set ("main" of gsm8k). None: its default."""
    limit: int | None = None
    """Read only the first so many rows. None: all."""
    answer_only: bool = False
    """Learn the final answer instead of the worked solution; the format must know the answer."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a generator: see `difftune.data.synthetic`. Only for `synthetic:` paths."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column -> the name that it has in the source. Columns that are not named keep theirs."""
    bad_rows: str = "raise"
    """What happens to a row that cannot be used: "raise", or "drop" it, counted by its reason."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a data source needs a path: a file, a folder, a hub id or synthetic:arithmetic")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit of {self.path} must be at least 1 or null (all rows), got {self.limit}")
        if self.options and not self.path.startswith(_SYNTHETIC):
            raise ValueError(f"options {sorted(self.options)} are for synthetic: paths; {self.path} takes none")
        if self.bad_rows not in BAD_ROWS:
            raise ValueError(f"bad_rows must be one of {', '.join(BAD_ROWS)}, got {self.bad_rows!r}")
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError(f"columns of {self.path} name one column of the source twice: {self.columns}")


def read_rows(source: Source, *, streaming: bool = False, keep_bad: bool = False) -> Iterator[Row]:
    """Yield the rows of a source in its own order, which is the same at every call.

    Args:
        source: What to read.
        streaming: A hub data set is read over the network as it is needed, instead of being downloaded first.
            Local files and generators are read row by row either way (.json files whole, as their syntax
            demands).
        keep_bad: A row that cannot be read is yielded too, and says so itself.

    Raises:
        ValueError: If the path is neither a file nor a folder nor a reachable hub data set, or if a file is
            broken; the message names the file and the line.
        BadRow: For a row that cannot be read, unless `keep_bad`.
    """
    for row in islice(_all_rows(source, streaming), source.limit):
        if row.bad is None:
            row = _renamed(_without_nan(row), source.columns)
        if row.bad is not None and not keep_bad:
            raise row.bad
        yield row


def _without_nan(row: Row) -> Row:
    """The row with null for NaN, which is how tables write it: no reader after this takes it for a value or a text."""
    if not any(isinstance(value, float) and math.isnan(value) for value in row.columns.values()):
        return row
    kept = {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.columns.items()
    }
    return replace(row, columns=kept)


def _renamed(row: Row, names: dict[str, str]) -> Row:
    """The row with our names of its columns."""
    if not names:
        return row
    if missing := [name for name in names.values() if name not in row.columns]:
        text = f"no column {missing[0]!r}, which `columns` names; there are {', '.join(sorted(row.columns))}"
        return replace(row, columns={}, bad=BadRow(row.where, text))
    kept = {name: value for name, value in row.columns.items() if name not in names.values()}
    return replace(row, columns=kept | {ours: row.columns[theirs] for ours, theirs in names.items()})


def fingerprint(source: Source) -> str:
    """A hash of all that `read_rows(source)` depends on: content of files, version of a hub data set."""
    digest = hashlib.sha256()
    settings = [source.split, source.name, source.limit, source.options, source.columns]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if source.path.startswith(_SYNTHETIC):
        digest.update(f"{source.path} {synthetic.version(_generator(source))}".encode())
    elif (path := Path(source.path).expanduser()).exists():
        files = sorted(path.rglob("*.*")) if is_saved_dataset(path) else data_files(path, source.split)
        for file in (file for file in files if file.is_file()):
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
        if is_saved_dataset(path):
            rows = _saved_dataset(path, source.split)
            yield from (Row(row, f"{source.path}, row {n}") for n, row in enumerate(rows, 1))
            return
        for file in data_files(path, source.split):
            yield from read_file(file)
    else:
        rows = _hub_dataset(source.path, source.name, source.split, streaming)
        yield from (Row(row, f"{source.path}, {source.split} row {n}") for n, row in enumerate(rows, 1))


def _saved_dataset(path: Path, split: str) -> Any:
    """What `save_to_disk` of `datasets` wrote; of several splits the one that is asked for."""
    import datasets
    from pyarrow import ArrowException

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, ArrowException) as error:
        raise ValueError(f"{path}: not a readable folder of save_to_disk ({error})") from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved.with_format(None)
    if split not in saved:
        raise ValueError(f"{path} has no split {split!r}: there are {', '.join(saved)}; set split")
    return saved[split].with_format(None)


@lru_cache(maxsize=4)
def _hub_dataset(path: str, name: str | None, split: str, streaming: bool) -> Any:
    """A `datasets` data set; kept, because its fingerprint is asked for before its rows."""
    looks_local = (
        path.lower().endswith((*FILE_SUFFIXES, *COMPRESSION)) or path.startswith((".", "/", "~")) or path.count("/") > 1
    )
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
