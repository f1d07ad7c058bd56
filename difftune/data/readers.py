"""The rows of one file, by its suffix; a row that cannot be read comes as a bad row, so that its number is kept."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from difftune.data.files import kind_of_file
from difftune.data.rows import BadRow, Row

_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip", b"PAR1": ".parquet", b"BZh": ".bz2"}
_UTF16 = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a data file.

    Raises:
        ValueError: If the file as a whole cannot be read; names it.
    """
    kind = kind_of_file(path)
    assert kind is not None, "chosen by data_files"
    suffix, codec = kind
    if suffix == ".parquet":
        yield from _read_parquet(path)
    elif suffix == ".arrow":
        yield from _read_arrow(path)
    else:
        try:
            with _open(path, codec) as binary:
                _check_encoding(path, binary)
                # What is not UTF-8 comes as half a surrogate pair: found below, with its line.
                text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline=None)
                yield from _TEXT_READERS[suffix](path, text)
        except OSError as error:
            if codec is None or isinstance(error, PermissionError | FileNotFoundError):
                raise
            raise ValueError(f"{path}: the compressed file is truncated or damaged ({error})") from error


def _open(path: Path, codec: str | None) -> io.BufferedReader:
    if codec is None:
        return path.open("rb")
    import pyarrow

    if not pyarrow.Codec.is_available(codec):
        raise ValueError(f"{path}: this pyarrow cannot read {codec}; unpack the file")
    return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression=codec)))


def _check_encoding(path: Path, file: io.BufferedReader) -> None:
    """Refuse what is no UTF-8 text from its first bytes on."""
    start = file.peek(64)[:64]
    for magic, suffix in _MAGIC.items():
        if start.startswith(magic):
            raise ValueError(f"{path}, line 1: its content is that of a {suffix} file: name it so, or unpack it")
    name = next((name for magic, name in _UTF16.items() if start.startswith(magic)), None)
    if name or b"\0" in start:
        raise ValueError(
            f"{path}, line 1: the text is {name or 'UTF-16 or UTF-32'}, only UTF-8 is read: convert it, such as by "
            f"`iconv -f {name or 'UTF-16LE'} -t UTF-8`"
        )


def _not_utf8(text: str) -> str | None:
    """What is wrong with the encoding of a text that was read with surrogateescape, if anything."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        return (
            f"not UTF-8 (byte 0x{byte:02x} at character {error.start + 1}): convert the file, such as by "
            "`iconv -f LATIN1 -t UTF-8`"
        )
    return None


def _read_jsonl(path: Path, file: io.TextIOWrapper) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield _json_row(line, where)


def _json_row(line: str, where: str) -> Row:
    try:
        columns = _loads(line.strip())
    except json.JSONDecodeError as error:
        hint = "; a row must stand on one line" if line.strip() in ("{", "[", "[{") else ""
        text = f"not valid JSON ({error.msg} at column {error.colno}{hint}); it begins {line.rstrip()[:60]!r}"
        return _bad(where, _not_utf8(line) or text)
    except ValueError as error:
        return _bad(where, f"not valid JSON ({error}); it begins {line.rstrip()[:60]!r}")
    if wrong := _not_utf8(line):
        return _bad(where, wrong)
    return _row(columns, where)


def _read_json(path: Path, file: io.TextIOWrapper) -> Iterator[Row]:
    text = file.read()
    if wrong := _not_utf8(text):
        line = next(n for n, line in enumerate(text.split("\n"), 1) if _not_utf8(line))
        raise ValueError(f"{path}, line {line}: {wrong}")
    try:
        rows = _loads(text)
    except ValueError as error:
        hint = "; one object a line? then name the file .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{path}: not valid JSON ({error}){hint}") from error
    if not isinstance(rows, list):
        keys = f" with the keys {', '.join(map(repr, list(rows)[:8]))}" if isinstance(rows, dict) else ""
        raise ValueError(f"{path} must hold a JSON array of objects, got {type(rows).__name__}{keys}")
    for number, columns in enumerate(rows, 1):
        yield _row(columns, f"{path}, row {number}")


def _read_csv(path: Path, file: io.TextIOWrapper) -> Iterator[Row]:
    """Every cell is text, an empty one too. A first line without a comma and with semicolons is of semicolons."""
    file.reconfigure(newline="")
    # Cells hold whole traces.
    csv.field_size_limit(2**31 - 1)
    header = file.readline()
    kind = kind_of_file(path)
    delimiter = "\t" if kind and kind[0] == ".tsv" else ";" if ";" in header and "," not in header else ","

    def lines() -> Iterator[str]:
        yield header
        yield from file

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"{path}, line 1: not a valid header of a CSV file ({error})") from error
    if len(set(names)) < len(names) or (names and not all(name.strip() for name in names)):
        raise ValueError(f"{path}, line 1: the columns of a CSV file need different names, got {', '.join(names)}")
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                # How many rows it swallowed cannot be known.
                raise ValueError(
                    f"{where}: a quote is opened here and never closed, so no row after it is seen"
                ) from error
            yield _bad(where, f"not valid CSV ({error}): quote cells that hold quotes, and double these")
            continue
        if not cells:
            continue
        if len(cells) != len(names):
            yield _bad(where, f"another number of cells than the header ({len(cells)} of {len(names)})")
        elif wrong := _not_utf8("".join(cells)):
            yield _bad(where, wrong)
        else:
            yield Row(dict(zip(names, cells, strict=True)), where)


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    number = 0
    for group in range(file.num_row_groups):
        end = number + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                yield from _batch_rows(path, batch, number)
                number += batch.num_rows
        except (ArrowException, OSError) as error:
            for lost in range(number + 1, end + 1):
                yield _bad(f"{path}, row {lost}", f"the page of the Parquet file is damaged ({error})")
        number = end


def _read_arrow(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, ipc, memory_map

    number = 0
    try:
        with memory_map(str(path)) as file:
            try:
                reader = ipc.open_file(file)
                batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
            except ArrowException:
                file.seek(0)
                batches = iter(ipc.open_stream(file))
            for batch in batches:
                yield from _batch_rows(path, batch, number)
                number += batch.num_rows
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}, after row {number}: not a readable Arrow file ({error})") from error


def _batch_rows(path: Path, batch: Any, before: int) -> Iterator[Row]:
    try:
        yield from (Row(columns, f"{path}, row {n}") for n, columns in enumerate(batch.to_pylist(), before + 1))
        return
    except UnicodeDecodeError:
        pass
    for n in range(batch.num_rows):
        where = f"{path}, row {before + n + 1}"
        try:
            yield Row(batch.slice(n, 1).to_pylist()[0], where)
        except UnicodeDecodeError as error:
            yield _bad(where, f"not UTF-8 ({error})")


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that stands there twice, one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _row(columns: Any, where: str) -> Row:
    if not isinstance(columns, dict):
        return _bad(where, f"a row must be a JSON object with named columns, got {type(columns).__name__}")
    return Row(columns, where)


def _bad(where: str, text: str) -> Row:
    return Row({}, where, BadRow(where, text))


_TEXT_READERS: dict[str, Callable[[Path, io.TextIOWrapper], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
