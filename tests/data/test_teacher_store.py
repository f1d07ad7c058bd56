import hashlib
import multiprocessing
import os
import signal

import numpy as np
import pytest

from difftune.data import teacher_store, token_cache
from difftune.data.batches import packed_batch, padded_batch
from difftune.data.chat import TeacherRows
from difftune.data.corpus import Corpus
from difftune.data.sources import Source
from difftune.data.teacher_store import TeacherSettings, store_teacher, with_teacher
from difftune.data.token_cache import load_tokenized
from difftune.data.tokenizers import build_tokenizer

SOURCE = Source("synthetic:arithmetic", options={"count": 60, "level": 2})
SETTINGS = TeacherSettings("my-teacher", top_k=2, temperature=1.0, seq_len=30, overlong="drop")


def said_to(document, number):
    """A teacher that says, for each label, that label and the position before it."""
    at = np.flatnonzero(document.learned)
    said = np.stack([document.ids[at], at - 1], axis=1)
    return TeacherRows(said, -said.astype(np.float64) / 8, -at.astype(np.float64))


def score(documents):
    return [said_to(document, number) for number, document in enumerate(documents)]


def store(cache, digits, settings=SETTINGS, score=score, **options):
    tokens = load_tokenized(SOURCE, digits, cache)
    return tokens, store_teacher(tokens, SOURCE, digits, cache, settings, score, **options)


def test_every_document_gets_back_what_was_said_to_it(digits, tmp_path):
    tokens, _ = store(tmp_path, digits)
    assert int(tokens.lengths.max()) > 30 > int(tokens.lengths.min())
    data = with_teacher(tokens, SOURCE, digits, tmp_path, SETTINGS)
    for n in range(len(data)):
        document = data.document(n)
        expected = said_to(document, n) if len(document.ids) <= 30 else TeacherRows(*[np.empty(0)] * 3)
        assert document.teacher is not None
        assert np.array_equal(document.teacher.log_tail, expected.log_tail)
        assert np.array_equal(document.teacher.indices.ravel(), expected.indices.ravel())
    assert data.teacher.arrays.log_probs.dtype == np.float16


def test_truncated_documents_are_scored_and_cut_alike(digits, tmp_path):
    settings = TeacherSettings("my-teacher", 2, 1.0, 20, "truncate", "float32")
    tokens, _ = store(tmp_path, digits, settings)
    corpus = Corpus([with_teacher(tokens, SOURCE, digits, tmp_path, settings)], seq_len=20, overlong="truncate")
    for n in range(len(corpus)):
        document = corpus.document(n)
        assert len(document.ids) <= 20
        assert np.array_equal(document.teacher.indices, said_to(document, n).indices)


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_brings_a_row_for_each_label_in_their_order(packing, digits, tmp_path):
    tokens, _ = store(tmp_path, digits)
    corpus = Corpus([with_teacher(tokens, SOURCE, digits, tmp_path, SETTINGS)], seq_len=30, overlong="drop")
    rows = [[corpus.document(n) for n in row] for row in corpus.rows(np.random.default_rng(0), packing=packing)][:5]
    batch = packed_batch(rows, 30, 0) if packing else padded_batch(rows, 0, 30)
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    assert batch["teacher_indices"][:, 0].tolist() == labels[kept].tolist()
    assert batch["teacher_indices"][:, 1].tolist() == batch["position_ids"][:, :-1][kept].tolist()


def test_another_setting_is_another_entry_and_is_asked_for_by_name(digits, tmp_path):
    tokens, _ = store(tmp_path, digits)
    for change in ({"top_k": 3}, {"temperature": 2.0}, {"teacher": "other"}, {"seq_len": 25}):
        settings = TeacherSettings(**{**vars(SETTINGS), **change})
        with pytest.raises(ValueError, match=r"nothing is stored of the teacher .* run `difftune prepare --teacher`"):
            with_teacher(tokens, SOURCE, digits, tmp_path, settings)


def test_damage_is_named(digits, tmp_path):
    tokens, entry = store(tmp_path, digits)
    (entry / "log_tail.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"log_tail.bin has 0 bytes .* remove it and run difftune prepare --teacher"):
        with_teacher(tokens, SOURCE, digits, tmp_path, SETTINGS)


def test_what_is_stored_is_not_scored_again(digits, tmp_path):
    _, entry = store(tmp_path, digits)
    before = {path.name: path.read_bytes() for path in entry.iterdir() if path.is_file()}
    _, again = store(tmp_path, digits, score=lambda documents: pytest.fail("scored again"))
    assert again == entry and before == {path.name: path.read_bytes() for path in again.iterdir() if path.is_file()}


def store_until_killed(cache):
    calls = 0

    def progress(documents, labels):
        nonlocal calls
        calls += 1
        token_cache.JOURNAL_EVERY_S = 0.0 if calls == 3 else 1e9
        if calls == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    store(cache, build_tokenizer("digits"), progress=progress)


def test_a_killed_store_goes_on_and_gives_the_same_bytes(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_store, "BATCH_TOKENS", 200)
    _, straight = store(tmp_path / "straight", digits)
    child = multiprocessing.get_context("fork").Process(target=store_until_killed, args=(tmp_path / "killed",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    seen = []
    _, resumed = store(tmp_path / "killed", digits, progress=lambda documents, labels: seen.append(documents))
    assert seen[0] > 10
    hashes = [{f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in e.iterdir()} for e in (straight, resumed)]
    assert hashes[0] == hashes[1]


def test_batches_of_a_teacher_keep_within_the_limit(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_store, "BATCH_TOKENS", 150)
    sizes = []

    def watching(documents):
        sizes.append((len(documents), max(len(document.ids) for document in documents)))
        return score(documents)

    store(tmp_path, digits, score=watching)
    assert all(n == 1 or n * longest <= 150 for n, longest in sizes) and max(n for n, _ in sizes) > 2


def test_an_unknown_dtype_is_refused(digits, tmp_path):
    with pytest.raises(ValueError, match="one of float16, float32, got 'int8'"):
        store(tmp_path, digits, TeacherSettings("t", 2, 1.0, 40, "drop", "int8"))
