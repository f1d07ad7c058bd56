"""Data files: broken, empty, of the wrong shape; training rows and problems of an evaluation."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs.case import Case, fit

_GOOD = '{"question": "1+1", "answer": "2"}\n'
_LOST = b"PAR1" + bytes(60) + b"PAR1"


def _rows(name: str, text: str | bytes, *says: str, file: str = "rows.jsonl", **others: object) -> Case:
    """A training file."""
    return fit(f"rows: {name}", f"data.train=[{{path: {file}}}]", says=(file, *says), files={file: text}, **others)


def _problems(name: str, text: str | bytes, *says: str, file: str = "problems.jsonl") -> Case:
    """A file of problems."""
    argv = ("evaluate", "--model", "model", "--data", file)
    return Case(f"problems: {name}", argv, (file, *says), files={file: text}, copies=("model",))


def _parquet(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def write(work: Path) -> None:
        import pyarrow
        from pyarrow.parquet import write_table

        table = pyarrow.table(
            {"question": [f"{n}+1" for n in range(2000)], "answer": [str(n + 1) for n in range(2000)]}
        )
        write_table(table, work / "rows.parquet", compression="snappy", use_dictionary=False)
        (work / "rows.parquet").write_bytes(change((work / "rows.parquet").read_bytes()))

    return write


def _corrupt_page(data: bytes) -> bytes:
    return data[:200] + bytes(200) + data[400:]


_MESSAGES = json.dumps({"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]})

CASES: list[Case] = [
    _rows("nothing", "", "no"),
    _rows("blank lines", "\n\n\n", "no"),
    _rows("a broken line", _GOOD + '{"question": "1+1", "answ\n' + _GOOD, "line 2", "JSON"),
    _rows("text", "hello\n", "line 1", "JSON"),
    _rows("numbers", "1\n2\n", "line 1", "object", "int"),
    _rows("lists", "[1]\n", "line 1", "object", "list"),
    _rows("null", "null\n", "line 1", "object"),
    _rows("one large object", '{"data": [' + _GOOD.strip() + "]}\n", "data"),
    _rows("other columns", '{"a": 1, "b": 2}\n', "a, b", "format"),
    _rows("no columns", "{}\n", "line 1"),
    _rows("a list as an answer", '{"question": "1+1", "answer": ["2"]}\n', "line 1", "answer"),
    _rows("null as an answer", '{"question": "1+1", "answer": null}\n', "line 1", "answer"),
    _rows("an answer that is gone", _GOOD + '{"question": "1+1"}\n', "line 2", "answer"),
    _rows("not UTF-8", b'{"question": "1+1", "answer": "\xff"}\n', "line 1"),
    _rows("UTF-16", _GOOD.encode("utf-16"), "line 1"),
    _rows("a lone surrogate", '{"question": "1+1", "answer": "\\ud800"}\n', "line 1"),
    _rows("deep JSON", '{"question": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1", "deep"),
    _rows("a huge integer", '{"question": "1", "answer": ' + "9" * 5000 + "}\n", "line 1"),
    _rows("NaN as an answer", '{"question": "1+1", "answer": NaN}\n', "line 1"),
    _rows("a character that digits lack", '{"question": "caf\u00e9", "answer": "2"}\n', "\u00e9"),
    _rows("every row empty", '{"question": "1+1", "answer": ""}\n', "empty"),
    fit(
        "rows: every row too long",
        "data.train=[{path: rows.jsonl}]",
        says=("64", "none of the 1 rows"),
        files={"rows.jsonl": json.dumps({"question": "1" * 999, "answer": "2"}) + "\n"},
    ),
    _rows("messages as text", '{"messages": "hi"}\n', "line 1", "messages"),
    _rows("messages of text", '{"messages": ["hi"]}\n', "line 1", "messages"),
    _rows("no messages", '{"messages": []}\n', "messages"),
    _rows("an unknown role", _MESSAGES.replace("user", "narrator") + "\n", "line 1", "narrator"),
    _rows("a role that is a number", _MESSAGES.replace('"user"', "3") + "\n", "line 1", "role"),
    _rows("a message without content", '{"messages": [{"role": "user"}]}\n', "line 1", "content"),
    _rows("content that is a number", _MESSAGES.replace('"2"', "2") + "\n", "line 1", "content"),
    _rows("only a question", '{"messages": [{"role": "user", "content": "hi"}]}\n', "line 1"),
    _rows("a later row of another shape", _GOOD + _MESSAGES + "\n", "line 2"),
    _rows("JSON that is an object", "{}", "array", file="rows.json"),
    _rows("JSON that is cut off", '[{"question": "1"', "JSON", file="rows.json"),
    _rows("JSON lines named JSON", _GOOD + _GOOD, "jsonl", file="rows.json"),
    _rows("JSON of numbers", "[1, 2]", "row 1", file="rows.json"),
    _rows("deep JSON, whole", "[" * 100_000 + "]" * 100_000, "deep", file="rows.json"),
    _rows("Parquet of nothing", b"", "Parquet", file="rows.parquet"),
    _rows("Parquet of text", b"hello", "Parquet", file="rows.parquet"),
    _rows("Parquet of zeros", _LOST, "Parquet", file="rows.parquet"),
    _rows("an unknown ending", "a", ".jsonl", file="rows.xyz"),
    _rows("an archive named JSON lines", gzip.compress(_GOOD.encode()), "line 1", file="rows.jsonl"),
    _rows("no ending", _GOOD, ".jsonl", file="rows"),
    fit(
        "rows: Parquet cut off",
        "data.train=[{path: rows.parquet}]",
        says=("rows.parquet",),
        prepare=_parquet(lambda data: data[:-9]),
    ),
    fit(
        "rows: Parquet with a corrupt page",
        "data.train=[{path: rows.parquet}]",
        says=("rows.parquet",),
        prepare=_parquet(_corrupt_page),
    ),
    fit(
        "rows: an unknown format",
        "data.train=[{path: rows.jsonl, format: nope}]",
        says=("nope", "messages"),
        files={"rows.jsonl": _GOOD},
    ),
    fit(
        "rows: a format of other columns",
        "data.train=[{path: rows.jsonl, format: messages}]",
        says=("rows.jsonl", "messages"),
        files={"rows.jsonl": _GOOD},
    ),
    fit(
        "rows: a folder without the split",
        "data.train=[{path: d, split: train}]",
        says=("train", "x_test.jsonl"),
        files={"d/x_test.jsonl": _GOOD},
    ),
    fit(
        "rows: overlong is an error",
        "data.train=[{path: rows.jsonl}]",
        "data.overlong=raise",
        says=("rows.jsonl", "64"),
        files={"rows.jsonl": _GOOD + json.dumps({"question": "1" * 99, "answer": "2"}) + "\n"},
    ),
    fit("rows: a hub data set, offline", "data.train=[{path: some-org/some-data}]", says=("some-org/some-data", "hub")),
    Case(
        "rows: prepare of a broken line",
        ("prepare", "--config", "tiny.yaml", "data.train=[{path: rows.jsonl}]", "--check", "--workers", "1"),
        ("rows.jsonl", "line 2"),
        files={"rows.jsonl": _GOOD + "{\n" + _GOOD},
    ),
    Case(
        "rows: prepare of nothing",
        ("prepare", "--config", "tiny.yaml", "data.train=[{path: rows.jsonl}]", "--workers", "1"),
        ("rows.jsonl",),
        files={"rows.jsonl": ""},
    ),
    fit(
        "rows: streaming a broken line",
        "data.train=[{path: rows.jsonl}]",
        "data.streaming=true",
        says=("rows.jsonl", "line 2"),
        files={"rows.jsonl": _GOOD + "{\n" + _GOOD},
    ),
    fit(
        "rows: streaming a file of nothing",
        "data.train=[{path: rows.jsonl}]",
        "data.streaming=true",
        says=("rows.jsonl",),
        files={"rows.jsonl": ""},
    ),
    fit("rows: an upsampling of nothing", "data.upsample={power: .inf}", says=("upsample",)),
    _problems("nothing", ""),
    _problems("a broken line", _GOOD + "{\n", "line 2"),
    _problems(
        "no answers",
        '{"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}\n',
        "answer",
    ),
    _problems("a column too few", '{"question": "1+1"}\n', "question"),
    _problems("deep JSON", '{"question": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1", "deep"),
    Case(
        "problems: a character that digits lack",
        ("evaluate", "--model", "model", "--data", "p.jsonl"),
        ("problem 0", "cannot encode", "bytes"),
        files={"p.jsonl": '{"question": "caf\u00e9", "answer": "2"}\n'},
        copies=("model",),
    ),
    _problems("an unknown ending", "x", ".jsonl", file="problems.doc"),
    Case(
        "problems: a set that is not there",
        ("evaluate", "--model", "model", "--data", "none.jsonl"),
        ("none.jsonl",),
        copies=("model",),
    ),
    Case(
        "problems: shots that are not there",
        (
            "evaluate",
            "--model",
            "model",
            "--task",
            "math:synthetic:arithmetic",
            "math.num_shots=2",
            "math.shots_path=none.jsonl",
        ),
        ("none.jsonl",),
        copies=("model",),
    ),
    Case(
        "texts: a text that is not there",
        ("evaluate", "--model", "model", "--task", "nll:none.txt"),
        ("none.txt",),
        copies=("model",),
    ),
    Case(
        "texts: a text of nothing",
        ("evaluate", "--model", "model", "--task", "nll:t.txt"),
        ("t.txt", "no text"),
        files={"t.txt": ""},
        copies=("model",),
    ),
    Case(
        "texts: not UTF-8",
        ("evaluate", "--model", "model", "--task", "nll:t.txt"),
        ("t.txt", "UTF-8"),
        files={"t.txt": b"\xff\xfe\x00"},
        copies=("model",),
    ),
    Case(
        "texts: a column that is not there",
        ("evaluate", "--model", "model", "--task", "nll:t.jsonl", "nll.column=body"),
        ("t.jsonl", "body"),
        files={"t.jsonl": '{"text": "a"}\n'},
        copies=("model",),
    ),
]
