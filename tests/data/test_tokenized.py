import logging
import multiprocessing
import shutil
import time

import numpy as np
import pytest

from difftune.data import tokenized
from difftune.data.sources import Source
from difftune.data.tokenized import load_tokenized, question_key, tokenize_pieces
from difftune.data.tokenizers import build_tokenizer

ROWS = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(1200)]


def same(left, right) -> bool:
    names = ("ids", "learned", "offsets", "questions", "row_numbers")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names) and (
        left.counts == right.counts
    )


@pytest.fixture
def source(write_jsonl) -> Source:
    return Source(write_jsonl([*ROWS, {"question": "", "answer": "1"}, {"question": "7+7", "answer": "14"}]))


def entries(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_documents_are_the_rows_in_order(source, digits):
    data = load_tokenized(source, digits)
    assert len(data) == 1201
    assert digits.decode(data.document(600).ids.tolist()) == "<|user|>600+1<|assistant|>601<|eos|>"
    assert digits.decode(data.document(600).ids[data.document(600).learned].tolist()) == "601<|eos|>"
    assert data.row_numbers[-2:].tolist() == [1200, 1202]
    assert data.counts.rows_read == 1202
    assert data.counts.dropped == {"empty question": 1}
    assert data.questions[4] == question_key(" 4 + 1")


def test_pieces_together_are_the_whole(source, digits):
    pieces = list(tokenize_pieces(source, digits, streaming=True))
    assert [piece.counts.rows_read for piece in pieces] == [512, 512, 178]
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), load_tokenized(source, digits).ids)


def test_second_load_comes_from_the_cache_and_is_identical(source, digits, tmp_path, monkeypatch):
    plain = load_tokenized(source, digits)
    built = load_tokenized(source, digits, tmp_path / "cache")
    monkeypatch.setattr(tokenized, "encode_examples", lambda *_: pytest.fail("tokenised again"))
    cached = load_tokenized(source, build_tokenizer("digits"), tmp_path / "cache")
    assert same(plain, built) and same(plain, cached)
    assert isinstance(cached.ids, np.memmap)
    assert len(entries(tmp_path / "cache")) == 1


def test_change_of_content_settings_tokenizer_or_template_is_another_entry(source, digits, tmp_path, write_jsonl):
    cache = tmp_path / "cache"
    other_template = build_tokenizer("digits", chat_template=" " + digits.chat_template)
    for number, (changed, tokenizer) in enumerate(
        [
            (source, digits),
            (Source(source.path, limit=5), digits),
            (Source(source.path, answer_only=True), digits),
            (Source(source.path, format="question_answer"), digits),
            (source, build_tokenizer("bytes")),
            (source, other_template),
        ],
        1,
    ):
        load_tokenized(changed, tokenizer, cache)
        assert len(entries(cache)) == number
    write_jsonl(ROWS)
    assert len(load_tokenized(source, digits, cache)) == 1200
    assert len(entries(cache)) == 7


def test_same_content_in_another_place_is_the_same_entry(source, digits, tmp_path):
    load_tokenized(source, digits, tmp_path / "cache")
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(source.path, tmp_path / "moved")
    assert load_tokenized(Source(moved), digits, tmp_path / "cache").source == moved
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("damage", ["short", "no meta", "broken meta"])
def test_damaged_entry_is_built_again_and_said_so(damage, source, digits, tmp_path, caplog):
    cache = tmp_path / "cache"
    good = load_tokenized(source, digits, cache)
    entry = cache / entries(cache)[0]
    if damage == "short":
        (entry / "learned.bin").write_bytes(b"\x01")
    elif damage == "no meta":
        (entry / "meta.json").unlink()
    else:
        (entry / "meta.json").write_text('{"sizes": {')
    with caplog.at_level(logging.WARNING):
        again = load_tokenized(source, digits, cache)
    assert "is damaged" in caplog.text
    assert same(again, load_tokenized(source, digits)) and len(good) == len(again)


@pytest.mark.parametrize("step", ["os.fsync", "Path.rename"])
def test_failure_before_the_last_step_leaves_no_entry(step, source, digits, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"difftune.data.tokenized.{step}", full)
    with pytest.raises(OSError, match="No space left"):
        load_tokenized(source, digits, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def load_in_child(path, cache, results):
    results.put(int(load_tokenized(Source(path), build_tokenizer("digits"), cache).ids.sum()))


def test_of_two_processes_one_builds_and_the_other_waits(source, tmp_path, monkeypatch):
    build, log = tokenized._build, tmp_path / "builds"

    def slow_build(*arguments):
        with log.open("a") as stream:
            stream.write("built\n")
        time.sleep(0.5)
        return build(*arguments)

    monkeypatch.setattr(tokenized, "_build", slow_build)  # the children inherit it
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (source.path, tmp_path / "cache", results)
    children = [context.Process(target=load_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    assert len({results.get(timeout=60) for _ in children}) == 1
    for child in children:
        child.join()
    assert log.read_text() == "built\n"
    assert len(entries(tmp_path / "cache")) == 1


def test_empty_source_is_an_error(digits, write_jsonl):
    with pytest.raises(ValueError, match="has no row"):
        load_tokenized(Source(write_jsonl([])), digits)


def test_source_whose_rows_are_all_dropped_is_kept_with_its_reasons(digits, write_jsonl, tmp_path):
    source = Source(write_jsonl([{"question": "", "answer": "1"}]))
    for _ in range(2):
        data = load_tokenized(source, digits, tmp_path / "cache")
        assert len(data) == 0
        assert data.counts.dropped == {"empty question": 1}


def test_broken_row_is_named(digits, write_jsonl):
    path = write_jsonl([*ROWS[:3], {"question": "1+1"}])
    with pytest.raises(ValueError, match="line 4: no column 'answer'"):
        load_tokenized(Source(path), digits)
