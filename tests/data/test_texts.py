import json
from pathlib import Path

import pytest

from difftune.data.texts import join_texts, load_texts


def test_plain_text_files_are_documents_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("c.txt", " \n")):
        (tmp_path / name).write_text(text)
    assert load_texts(str(tmp_path)) == ["first", "second"]
    assert load_texts(str(tmp_path), limit=1) == ["first"]
    assert load_texts(str(tmp_path / "b.txt")) == ["second"]


def test_a_column_of_a_data_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "books.jsonl"
    file.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two", "body": "2"}) + "\n")
    assert load_texts(str(file)) == ["one", "two"]
    with pytest.raises(ValueError, match="line 1: no text in column 'body'; there are text: set column"):
        load_texts(str(file), column="body")


def test_a_file_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"a\.txt has no text"):
        load_texts(str(tmp_path / "a.txt"))


def test_prose_is_long_enough_varied_and_always_the_same() -> None:
    one, two = load_texts("synthetic:prose", limit=2, characters=5000)
    assert len(one) >= 5000 and one != two
    assert load_texts("synthetic:prose", limit=2, characters=5000) == [one, two]
    assert load_texts("synthetic:prose", characters=5000, seed=1) != [one]
    sentences = one.split(". ")
    assert len(set(sentences)) > 0.99 * len(sentences) and one.isascii()


def test_texts_are_joined_to_documents_of_a_least_length() -> None:
    assert join_texts(["aa", "bb", "cc", "dd", "e"], 6) == ["aa\n\nbb", "cc\n\ndd"]
    assert join_texts(["aa", "bb"], 100) == ["aa\n\nbb"], "all there is, though too little"


def test_a_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(ValueError, match=r"a\.txt: not a text in UTF-8"):
        load_texts(str(tmp_path / "a.txt"))
