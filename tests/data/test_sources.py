import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from difftune.data.sources import Source, fingerprint, read_rows

ROWS = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(5)]


def columns(source: Source, **options) -> list[dict]:
    return [row.columns for row in read_rows(source, **options)]


def test_jsonl_json_and_parquet_hold_the_same_rows(tmp_path, write_jsonl):
    jsonl = write_jsonl(ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for path in (jsonl, str(tmp_path / "rows.json"), str(tmp_path / "rows.parquet")):
        assert columns(Source(path)) == ROWS
        assert columns(Source(path), streaming=True) == ROWS


def test_rows_know_where_they_stand(write_jsonl):
    path = write_jsonl(ROWS)
    assert [row.where for row in read_rows(Source(path))][2] == f"{path}, line 3"


def test_broken_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3\n{"a": 4}\n')
    with pytest.raises(
        ValueError, match=r"broken\.jsonl, line 4: not valid JSON \(.* at column 8\); it begins '\{\"a\": 3"
    ):
        columns(Source(str(path)))


def test_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"a": "ok"}\n{"a": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        columns(Source(str(path)))


def test_line_that_is_not_an_object_is_named(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="line 1: a row must be a JSON object with named columns, got list"):
        columns(Source(str(path)))


def test_json_file_with_one_object_a_line_says_so(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"name the file .jsonl"):
        columns(Source(str(path)))


def test_json_file_must_be_an_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="must hold a JSON array of objects, got dict"):
        columns(Source(str(path)))


def test_damaged_parquet_is_an_error(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        columns(Source(str(path)))


@pytest.mark.parametrize("path", ["missing/rows.jsonl", "./missing", "/nowhere/rows.parquet", "a/b/c"])
def test_missing_file_is_an_error_that_says_where_it_looked(path):
    with pytest.raises(ValueError, match=r"no such file or folder.*looked in"):
        columns(Source(path))


def test_unreachable_hub_id_is_an_error_that_names_both_readings():
    with pytest.raises(ValueError, match=r"nobody/nothing: no such file or folder.*hub.*could not be loaded"):
        columns(Source("nobody/nothing"))


def test_other_suffix_is_refused(tmp_path):
    for name in ("rows.zip", "rows.parquet.gz", "rows"):
        (tmp_path / name).write_text("a,b\n")
        with pytest.raises(ValueError, match=r"must be a data file \(.jsonl, .ndjson, .*got suffix"):
            columns(Source(str(tmp_path / name)))


def test_folder_is_read_in_the_order_of_names(tmp_path, write_jsonl):
    write_jsonl(ROWS[3:], "b.jsonl")
    write_jsonl(ROWS[:3], "a.jsonl")
    (tmp_path / "README.md").write_text("not data")
    assert columns(Source(str(tmp_path))) == ROWS


def test_folder_that_names_its_splits_gives_only_the_one_asked_for(tmp_path, write_jsonl):
    write_jsonl(ROWS[:2], "train-00000-of-00001.jsonl")
    write_jsonl(ROWS[2:], "test-00000-of-00001.jsonl")
    assert columns(Source(str(tmp_path))) == ROWS[:2]
    assert columns(Source(str(tmp_path), split="test")) == ROWS[2:]
    with pytest.raises(ValueError, match="no file of the split 'validation'"):
        columns(Source(str(tmp_path), split="validation"))


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no data file"):
        columns(Source(str(tmp_path)))


def test_limit_reads_the_first_rows_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken\n')
    assert columns(Source(str(path), limit=2)) == [{"a": 1}, {"a": 2}]


def test_hub_data_set_is_read_by_name_split_and_configuration(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name, *, split, streaming):
        asked.append((path, name, split, streaming))
        data = datasets.Dataset.from_list(ROWS)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("owner/some-set", name="main", split="validation")
    assert columns(source, streaming=True) == ROWS
    assert columns(source) == ROWS
    assert asked == [("owner/some-set", "main", "validation", True), ("owner/some-set", "main", "validation", False)]
    assert next(read_rows(source)).where == "owner/some-set, validation row 1"
    assert fingerprint(source) == fingerprint(source)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"limit of x.jsonl must be at least 1"):
        Source("x.jsonl", limit=0)
    with pytest.raises(ValueError, match=r"options \['count'\] are for synthetic: paths"):
        Source("x.jsonl", options={"count": 3})
    with pytest.raises(ValueError, match="needs a path"):
        Source("")


def test_fingerprint_follows_content_and_settings_not_the_name(tmp_path, write_jsonl):
    path = write_jsonl(ROWS)
    first = fingerprint(Source(path))
    assert fingerprint(Source(path)) == first
    assert fingerprint(Source(path, limit=3)) != first
    write_jsonl([*ROWS[:-1], {"question": "4+1", "answer": "6"}])
    assert fingerprint(Source(path)) != first
    one = fingerprint(Source("synthetic:arithmetic", options={"count": 5}))
    assert one != fingerprint(Source("synthetic:arithmetic", options={"count": 5}, split="test"))
    assert one != fingerprint(Source("synthetic:arithmetic", options={"count": 6}))


def test_columns_have_our_names(write_jsonl):
    path = write_jsonl([{"task": "1+1", "gold": 2, "answer": "no"}])
    names = {"question": "task", "answer": "gold"}
    assert columns(Source(path, columns=names)) == [{"question": "1+1", "answer": 2}]
    assert fingerprint(Source(path, columns=names)) != fingerprint(Source(path))
    swapped = Source(path, columns={"task": "gold", "gold": "task"})
    assert columns(swapped) == [{"task": 2, "gold": "1+1", "answer": "no"}]
    with pytest.raises(ValueError, match="line 1: no column 'q', which `columns` names; there are answer, gold, task"):
        columns(Source(path, columns={"question": "q"}))
    with pytest.raises(ValueError, match="name one column of the source twice"):
        Source(path, columns={"question": "a", "answer": "a"})


def test_saved_data_sets_are_read_by_split(tmp_path):
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "two")
    assert columns(Source(str(tmp_path / "one"))) == columns(Source(str(tmp_path / "two"))) == ROWS
    assert columns(Source(str(tmp_path / "two"), split="test")) == ROWS[:1]
    assert fingerprint(Source(str(tmp_path / "one"))) != fingerprint(Source(str(tmp_path / "two")))
    with pytest.raises(ValueError, match="has no split 'dev': there are train, test"):
        columns(Source(str(tmp_path / "two"), split="dev"))


def test_nan_is_null_in_every_kind_of_file(tmp_path):
    rows = [{"a": float("nan"), "b": 1.5}, {"a": 2.0, "b": float("nan")}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert columns(Source(str(tmp_path / name))) == [{"a": None, "b": 1.5}, {"a": 2.0, "b": None}]
