import numpy as np
import pytest

from difftune.data.sources import Source
from difftune.data.token_cache import load_tokenized
from difftune.data.tokenized import question_key, tokenize_pieces

ROWS = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(1200)]


@pytest.fixture
def source(write_jsonl) -> Source:
    return Source(
        write_jsonl([*ROWS, {"question": "", "answer": "1"}, {"question": "7+7", "answer": "14"}]), bad_rows="drop"
    )


def test_documents_are_the_rows_in_order(source, digits):
    data = load_tokenized(source, digits)
    assert len(data) == 1201
    assert digits.decode(data.document(600).ids.tolist()) == "<|user|>600+1<|assistant|>601<|eos|>"
    assert digits.decode(data.document(600).ids[data.document(600).learned].tolist()) == "601<|eos|>"
    assert data.row_numbers[-2:].tolist() == [1200, 1202]
    assert data.counts.rows_read == 1202
    assert data.counts.dropped == {"bad row: empty question": 1}
    assert data.questions[4] == question_key(" 4 + 1")


def test_counts_of_documents_are_those_of_their_tokens(digits, tmp_path):
    source = Source("synthetic:arithmetic", options={"count": 60})
    for cache in (None, tmp_path):
        data = load_tokenized(source, digits, cache)
        documents = [data.document(n) for n in range(len(data))]
        assert data.label_counts.tolist() == [int(document.learned.sum()) for document in documents]
        assert data.last_ids.tolist() == [int(document.ids[-1]) for document in documents]
        assert len(set(data.label_counts.tolist())) > 3


def test_pieces_together_are_the_whole(source, digits):
    pieces = list(tokenize_pieces(source, digits, streaming=True))
    assert [piece.counts.rows_read for piece in pieces] == [512, 512, 178]
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), load_tokenized(source, digits).ids)


def test_empty_source_is_an_error(digits, write_jsonl):
    with pytest.raises(ValueError, match="has no row"):
        load_tokenized(Source(write_jsonl([])), digits)


def test_broken_row_is_named(digits, write_jsonl):
    path = write_jsonl([*ROWS[:3], {"question": "1+1"}])
    with pytest.raises(ValueError, match="line 4: no column 'answer'"):
        load_tokenized(Source(path), digits)
