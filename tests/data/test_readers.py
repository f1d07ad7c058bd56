import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from difftune.data.readers import read_file

ROWS = [{"text": "one"}, {"text": "zwei ü"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.fixture
def read(tmp_path):
    def read(name: str, content: bytes) -> list:
        (tmp_path / name).write_bytes(content)
        return [row.columns if row.bad is None else str(row.bad) for row in read_file(tmp_path / name)]

    return read


def test_compressed_text_is_read_also_in_several_members(read):
    assert read("a.jsonl.gz", gzip.compress(LINES) + gzip.compress(LINES)) == ROWS * 2
    assert read("a.ndjson.zst", pa.compress(LINES, codec="zstd", asbytes=True)) == ROWS
    assert read("a.JSONL.bz2", bz2.compress(LINES)) == ROWS
    assert read("a.json.gz", gzip.compress(json.dumps(ROWS).encode())) == ROWS
    assert read("a.csv.gz", gzip.compress("text\none\nzwei ü\n".encode())) == ROWS
    assert read("empty.jsonl", b"") == read("empty.csv", b"") == []


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_truncated_or_foreign_compressed_files_are_named(codec, read):
    whole = pa.compress(LINES * 50, codec=codec, asbytes=True) if codec == "zstd" else gzip.compress(LINES * 50)
    for content in (whole[: len(whole) // 2], b"nothing of the kind"):
        with pytest.raises(ValueError, match="compressed file is truncated or damaged"):
            read(f"a.jsonl.{'zst' if codec == 'zstd' else 'gz'}", content)
    with pytest.raises(ValueError, match=r"its content is that of a \.(gz|zst) file"):
        read("a.jsonl", whole)


def test_marks_line_ends_and_separators(read):
    assert read("bom.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")) == ROWS
    assert read("cr.jsonl", LINES.replace(b"\n", b"\r")) == ROWS
    assert read("u2028.jsonl", '{"text": "a\u2028b"}'.encode()) == [{"text": "a\u2028b"}]
    assert read("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()) == ROWS


def test_other_encodings_are_named_with_their_line(read):
    (good, bad) = read("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n')
    assert good == {"text": "x"}
    assert "a.jsonl, line 2: not UTF-8 (byte 0xe9 at character 14)" in bad
    assert "line 3: not UTF-8" in read("a.csv", b"text\nx\ncaf\xe9\n")[1]
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read("a.json", b'[{"text":\n"caf\xe9"}]')
    for encoding in ("utf-16", "utf-16-le", "utf-32-be"):
        with pytest.raises(ValueError, match="line 1: the text is UTF-16"):
            read("a.jsonl", LINES.decode().encode(encoding))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        ('{"a": 1,}', "at column"),
        ("{", "a row must stand on one line"),
        ("[" * 100_000, "not valid JSON (nested too deep)"),
        ("1" * 5000, "not valid JSON"),
        ("3", "a row must be a JSON object with named columns, got int"),
    ],
)
def test_a_bad_line_keeps_its_number(line, said, read):
    rows = read("a.jsonl", f'{{"x": 1}}\n\n{line}\n{{"x": 2}}\n'.encode())
    assert rows[::2] == [{"x": 1}, {"x": 2}]
    assert "a.jsonl, line 3: " in rows[1]
    assert said in rows[1]


def test_json_that_is_no_array_is_refused_with_its_keys(read):
    with pytest.raises(ValueError, match="must hold a JSON array of objects, got dict with the keys 'a', 'b'"):
        read("a.json", b'{"a": [1], "b": [2]}')


def test_tables_of_text(read):
    quoted = 'question,answer\n"a ""b"",\nc",007\n\nd,\n'
    rows = [{"question": 'a "b",\nc', "answer": "007"}, {"question": "d", "answer": ""}]
    assert read("a.csv", quoted.encode()) == rows
    assert read("bom.CSV", b"\xef\xbb\xbf" + quoted.replace("\n", "\r\n").encode())[1] == rows[1]
    assert read("semicolon.csv", b"question;answer\na, b;1\n") == [{"question": "a, b", "answer": "1"}]
    assert read("a.tsv", b"question\tanswer\na;b\t1\n") == [{"question": "a;b", "answer": "1"}]
    assert read("long.csv", b"text\n" + b"x" * 300_000 + b"\n") == [{"text": "x" * 300_000}]
    short = read("short.csv", b"a,b\n1\n1,2\n1,2,3\n")
    assert short[1] == {"a": "1", "b": "2"}
    assert "line 2: another number of cells than the header (1 of 2)" in short[0]
    assert "line 4" in short[2]
    with pytest.raises(ValueError, match=r"open\.csv, line 3: a quote is opened here and never closed"):
        read("open.csv", b'a,b\n1,2\n"3,4\n5,6\n')
    with pytest.raises(ValueError, match="need different names, got a, a"):
        read("twice.csv", b"a,a\n1,2\n")


def test_a_damaged_page_loses_its_rows_and_no_others(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"text": f"row {n} " * 20} for n in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, compression="snappy", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    found = list(read_file(path))
    assert [row.columns for row in found[:100] + found[200:]] == rows[:100] + rows[200:]
    assert all(row.bad is not None for row in found[100:200])
    assert str(found[100].bad).startswith(f"{path}, row 101: the page of the Parquet file is damaged")


def test_arrow_files_of_both_kinds(tmp_path):
    rows = [{"messages": [{"role": "user", "content": None}], "n": None}, {"messages": None, "n": 10**15}]
    table = pa.Table.from_pylist(rows)
    for kind in (pa.ipc.new_file, pa.ipc.new_stream):
        with kind(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert [row.columns for row in read_file(tmp_path / "a.arrow")] == rows
    (tmp_path / "a.arrow").write_bytes(b"no arrow file at all")
    with pytest.raises(ValueError, match="not a readable Arrow file"):
        list(read_file(tmp_path / "a.arrow"))
