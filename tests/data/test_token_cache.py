import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import time

import numpy as np
import pytest

from difftune.data import token_cache, tokenized
from difftune.data.corpus import Corpus
from difftune.data.sources import Source
from difftune.data.statistics import count_corpus
from difftune.data.token_cache import AppendedArrays, cache_entry, content_hash, load_tokenized
from difftune.data.tokenizers import build_tokenizer

ROWS = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(1200)]


def same(left, right) -> bool:
    names = ("ids", "learned", "offsets", "questions", "row_numbers")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names) and (
        left.counts == right.counts
    )


@pytest.fixture
def source(write_jsonl) -> Source:
    return Source(
        write_jsonl([*ROWS, {"question": "", "answer": "1"}, {"question": "7+7", "answer": "14"}]), bad_rows="drop"
    )


def entries(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.suffix != ".building")


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
            (Source(source.path, limit=5, bad_rows="drop"), digits),
            (Source(source.path, answer_only=True, bad_rows="drop"), digits),
            (Source(source.path, format="question_answer", bad_rows="drop"), digits),
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
    assert load_tokenized(Source(moved, bad_rows="drop"), digits, tmp_path / "cache").source == moved
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

    monkeypatch.setattr(f"difftune.data.token_cache.{step}", full)
    with pytest.raises(OSError, match="No space left"):
        load_tokenized(source, digits, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def load_in_child(path, cache, results):
    results.put(int(load_tokenized(Source(path, bad_rows="drop"), build_tokenizer("digits"), cache).ids.sum()))


def test_of_two_processes_one_builds_and_the_other_waits(source, tmp_path, monkeypatch):
    build, log = token_cache._build_entry, tmp_path / "builds"

    def slow_build(*arguments):
        with log.open("a") as stream:
            stream.write("built\n")
        time.sleep(0.5)
        return build(*arguments)

    monkeypatch.setattr(token_cache, "_build_entry", slow_build)  # the children inherit it
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (source.path, tmp_path / "cache", results)
    children = [context.Process(target=load_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    assert len({results.get(timeout=300) for _ in children}) == 1
    for child in children:
        child.join()
    assert log.read_text() == "built\n"
    assert len(entries(tmp_path / "cache")) == 1


def test_source_whose_rows_are_all_dropped_is_kept_with_its_reasons(digits, write_jsonl, tmp_path):
    source = Source(write_jsonl([{"question": "", "answer": "1"}]), bad_rows="drop")
    for _ in range(2):
        data = load_tokenized(source, digits, tmp_path / "cache")
        assert len(data) == 0
        assert data.counts.dropped == {"bad row: empty question": 1}


def files_of(cache) -> dict[str, str]:
    """Hash of every file of the only entry."""
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(entry.iterdir())}


@pytest.fixture
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(tokenized, "PIECE_ROWS", 50)


def test_bytes_do_not_depend_on_the_number_of_processes(source, digits, tmp_path, small_pieces):
    for workers in (1, 4):
        load_tokenized(source, digits, tmp_path / str(workers), workers=workers)
    one, four = (files_of(tmp_path / name) for name in ("1", "4"))
    assert one == four and set(one) == {*(f"{name}.bin" for name in tokenized.ARRAYS), "meta.json"}
    assert same(load_tokenized(source, digits), load_tokenized(source, digits, workers=2))


def build_until_killed(source, cache, workers):
    """In a child: journal after the fifth piece, die after the ninth."""
    calls = 0

    def progress(rows, tokens):
        nonlocal calls
        calls += 1
        token_cache.JOURNAL_EVERY_S = 0.0 if calls == 4 else 1e9
        if calls == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    load_tokenized(source, build_tokenizer("digits"), cache, workers=workers, progress=progress)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_and_gives_the_same_bytes(workers, source, digits, tmp_path, small_pieces, caplog):
    load_tokenized(source, digits, tmp_path / "straight")
    cache = tmp_path / "killed"
    child = multiprocessing.get_context("fork").Process(target=build_until_killed, args=(source, cache, workers))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and entries(cache) == []
    (building,) = cache.glob("*.building")
    journal = json.loads((building / "journal.json").read_text())
    assert journal["rows"] == 250
    with (building / "ids.bin").open("ab") as stream:
        stream.write(b"written after the journal")
    seen = []
    with caplog.at_level(logging.INFO):
        load_tokenized(source, digits, cache, progress=lambda rows, tokens: seen.append(rows))
    assert "going on after 250 rows" in caplog.text and seen[0] == 300
    assert files_of(cache) == files_of(tmp_path / "straight")


def test_a_broken_row_leaves_nothing_behind(digits, tmp_path, write_jsonl):
    path = write_jsonl([*ROWS[:700], {"question": "1+1"}])
    with pytest.raises(ValueError, match="line 701: no column 'answer'"):
        load_tokenized(Source(path), digits, tmp_path / "cache", workers=2)
    assert not list((tmp_path / "cache").glob("*.building"))


def test_files_shorter_than_their_journal_are_refused(tmp_path):
    files = AppendedArrays(tmp_path / "x", ["a"])
    files.append("a", np.arange(5))
    files.note({"done": 5}, now=True)
    files.close()
    assert AppendedArrays(tmp_path / "x", ["a"]).state["done"] == 5
    (tmp_path / "x" / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="shorter than its journal says: remove"):
        AppendedArrays(tmp_path / "x", ["a"])


def test_the_content_hash_is_that_of_the_tokens(source, digits, tmp_path):
    hashes = set()
    for folder, tokenizer in (("a", digits), ("b", digits), ("c", build_tokenizer("bytes"))):
        load_tokenized(source, tokenizer, tmp_path / folder)
        hashes.add(content_hash(cache_entry(source, tokenizer, tmp_path / folder)))
    assert len(hashes) == 2


def test_mapped_arrays_go_to_another_process_by_name(source, digits, tmp_path):
    data = load_tokenized(source, digits, tmp_path)
    pickled = pickle.dumps(data)
    assert len(pickled) < 5000 < data.ids.nbytes
    again = pickle.loads(pickled)
    assert same(again, data) and isinstance(again.ids, np.memmap)


LONG = 2**31 + 7


@pytest.fixture
def beyond_32_bits(source, digits, tmp_path) -> token_cache.TokenizedSet:
    """A source of which two billion tokens in one document were tokenised before: files with a hole, and a journal."""
    cache = tmp_path / "cache"
    entry = cache_entry(source, digits, cache)
    files = AppendedArrays(entry_building(entry), list(tokenized.ARRAYS))
    for name, dtype in tokenized.ARRAYS.items():
        files.append(
            name, np.array([0, LONG] if name == "offsets" else [LONG] if name == "label_counts" else [3], dtype)
        )
    files.note({"rows": tokenized.PIECE_ROWS, "tokens": LONG, "documents": 1}, now=True)
    files.close()
    journal = json.loads((entry_building(entry) / "journal.json").read_text())
    for name in ("ids", "learned"):
        journal["bytes"][name] = LONG * np.dtype(tokenized.ARRAYS[name]).itemsize
        os.truncate(entry_building(entry) / f"{name}.bin", journal["bytes"][name])
    (entry_building(entry) / "journal.json").write_text(json.dumps(journal))
    return load_tokenized(source, digits, cache)


def entry_building(entry):
    entry.parent.mkdir(exist_ok=True)
    return entry.with_name(f"{entry.name}.building")


def test_documents_behind_two_billion_tokens_are_themselves(beyond_32_bits, source, digits):
    expected, skipped = load_tokenized(source, digits), tokenized.PIECE_ROWS
    data = beyond_32_bits
    assert len(data.ids) == LONG + int(expected.lengths[skipped:].sum()) > 2**31
    assert data.lengths.tolist() == [LONG, *expected.lengths[skipped:].tolist()]
    corpus = Corpus([expected, data], seq_len=64, overlong="drop")
    assert corpus.longest == LONG and len(corpus) == 2 * len(expected) - skipped
    rows = corpus.rows(np.random.default_rng(0), packing=True)
    assert sorted(rows.documents.tolist()) == list(range(len(corpus)))
    for index in (0, 700, len(expected), len(corpus) - 1):
        of = index if index < len(expected) else index - len(expected) + skipped
        assert corpus.document(index).ids.tolist() == expected.document(of).ids.tolist()
        assert corpus.document(index).learned.tolist() == expected.document(of).learned.tolist()
    stats = count_corpus(corpus, rows, packing=True, micro_batch_size=1, eos_id=digits.eos_token_id, complete=True)
    assert stats.eos_share == 1 and stats.longest_row == LONG


def test_documents_behind_two_billion_tokens_are_cut_where_others_are(beyond_32_bits, source, digits):
    expected = Corpus([load_tokenized(source, digits)], seq_len=10, overlong="truncate")
    corpus = Corpus([beyond_32_bits], seq_len=10, overlong="truncate")
    skipped = tokenized.PIECE_ROWS
    assert corpus.lengths.tolist() == [10, *expected.lengths[skipped:].tolist()]
    assert corpus.label_counts.tolist() == [1, *expected.label_counts[skipped:].tolist()]
    assert corpus.truncated > 500
    last = [document.ids[-1] for document in map(corpus.document, range(len(corpus)))]
    assert 0 < corpus.ends_in(digits.eos_token_id) == last.count(digits.eos_token_id) < len(corpus)
    with pytest.raises(ValueError, match=f"{LONG} tokens do not fit seq_len=64"):
        Corpus([beyond_32_bits], seq_len=64, overlong="raise")
