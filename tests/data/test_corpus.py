import numpy as np
import pytest

from difftune.data.corpus import Corpus
from difftune.data.sources import Source
from difftune.data.token_cache import load_tokenized

# As digits: 3 frame tokens and the text.
LENGTHS = [6, 13, 9]
ROWS = [
    {"prompt": "1+", "completion": "2"},
    {"prompt": "3+4+5", "completion": "12:ok"},
    {"prompt": "12+345", "completion": ""},
    {"prompt": "9+9", "completion": "18."},
]


@pytest.fixture
def parts(digits, write_jsonl):
    first, second = write_jsonl(ROWS[:1], "first.jsonl"), write_jsonl(ROWS[1:], "second.jsonl")
    return [load_tokenized(Source(path, bad_rows="drop"), digits) for path in (first, second)]


def test_documents_of_all_sets_in_order(parts, digits):
    corpus = Corpus(parts, seq_len=50, overlong="drop")
    assert corpus.lengths.tolist() == LENGTHS
    texts = [digits.decode(corpus.document(index).ids.tolist()) for index in range(len(corpus))]
    assert texts[2] == "<|user|>9+9<|assistant|>18.<|eos|>"
    assert corpus.counts.rows_read == 4
    assert corpus.counts.dropped == {"bad row: empty target": 1}


def test_over_long_documents_are_dropped_and_counted(parts):
    corpus = Corpus(parts, seq_len=9, overlong="drop")
    assert corpus.lengths.tolist() == [6, 9]
    assert corpus.counts.dropped == {"bad row: empty target": 1, "longer than 9 tokens": 1}
    assert (corpus.longest, corpus.truncated) == (13, 0)
    assert len(corpus.questions()) == 2


def test_over_long_documents_are_truncated_and_counted(parts, digits):
    corpus = Corpus(parts, seq_len=9, overlong="truncate")
    assert corpus.lengths.tolist() == [6, 9, 9]
    assert digits.decode(corpus.document(1).ids.tolist()) == "<|user|>3+4+5<|assistant|>12"
    assert corpus.label_counts.tolist() == [2, 2, 4]
    assert (corpus.truncated, corpus.ends_in(digits.eos_token_id)) == (1, 2)


def test_document_whose_labels_are_cut_off_is_dropped(parts):
    corpus = Corpus(parts, seq_len=7, overlong="truncate")
    assert corpus.counts.dropped == {"bad row: empty target": 1, "no label within 7 tokens": 1}
    assert corpus.lengths.tolist() == [6, 7]


def test_over_long_document_can_be_an_error_that_names_the_row(parts):
    with pytest.raises(ValueError, match=r"second.jsonl, row 1: 13 tokens do not fit seq_len=9.*longest row has 13"):
        Corpus(parts, seq_len=9, overlong="raise")
    assert len(Corpus(parts, seq_len=13, overlong="raise")) == 3


def test_counts_of_the_sets_are_left_alone(parts):
    for _ in range(2):
        assert Corpus(parts, seq_len=9, overlong="drop").counts.dropped["longer than 9 tokens"] == 1


def test_rows_shuffle_by_the_generator_alone(parts):
    corpus = Corpus(parts, seq_len=13, overlong="drop")
    assert list(corpus.rows(None, packing=False)) == [[0], [1], [2]]
    once, again = (list(corpus.rows(np.random.default_rng(1), packing=False)) for _ in range(2))
    assert once == again
    orders = {tuple(map(tuple, corpus.rows(np.random.default_rng(n), packing=False))) for n in range(20)}
    assert len(orders) > 3


def test_packed_rows_do_not_run_from_long_to_short(digits):
    source = Source("synthetic:arithmetic", options={"terms": [2, 9], "count": 300})
    corpus = Corpus([load_tokenized(source, digits)], seq_len=160, overlong="raise")
    longest = [max(corpus.lengths[row]) for row in corpus.rows(np.random.default_rng(0), packing=True)]
    assert longest != sorted(longest, reverse=True)
    assert [max(corpus.lengths[row]) for row in corpus.rows(None, packing=True)] == sorted(longest, reverse=True)
