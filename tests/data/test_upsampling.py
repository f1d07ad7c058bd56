import numpy as np
import pytest

from difftune.data.corpus import Corpus
from difftune.data.datamodule import SFTDataModule
from difftune.data.sources import Source
from difftune.data.token_cache import load_tokenized
from difftune.data.upsampling import Upsampling


def draw(seed, long_documents):
    """Many short documents and some long ones."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.integers(10, 1000, 400), rng.integers(4096, 30_000, long_documents)])


def share_of_long(lengths, counts):
    tokens = lengths * counts
    return tokens[lengths >= 4096].sum() / tokens.sum()


def test_long_documents_make_up_the_share_and_short_ones_stand_once():
    lengths = draw(0, 6)
    counts = Upsampling(4096, 0.7).counts(lengths, np.zeros(406, np.int64))
    assert share_of_long(lengths, np.ones(406)) < 0.5
    assert (counts[lengths < 4096] == 1).all()
    assert abs((lengths * counts).sum() - lengths[lengths < 4096].sum() / 0.3) <= lengths.max() / 2
    assert counts.max() - counts[lengths >= 4096].min() <= 1, "all long documents equally often, to within one"


def test_every_source_keeps_its_share_of_the_tokens():
    parts = [draw(1, 3), draw(2, 12), draw(3, 60)]
    lengths, sources = np.concatenate(parts), np.repeat([0, 1, 2], [len(part) for part in parts])
    counts = Upsampling(4096, 0.6).counts(lengths, sources)
    assert counts.min() == 1, "nothing is left out"
    before = np.bincount(sources, lengths) / lengths.sum()
    after = np.bincount(sources, lengths * counts) / (lengths * counts).sum()
    assert after == pytest.approx(before, abs=0.01)
    for source in (0, 1):
        mine = sources == source
        assert share_of_long(lengths[mine], counts[mine]) == pytest.approx(0.6, abs=0.02)
    mine = sources == 2
    own = share_of_long(lengths[mine], 1)
    assert own > 0.6 and share_of_long(lengths[mine], counts[mine]) == pytest.approx(own, abs=0.02)


def test_a_source_without_long_documents_is_taken_as_it_is():
    lengths = np.array([10, 20, 30])
    assert Upsampling(4096, 0.7).counts(lengths, np.zeros(3, np.int64)).tolist() == [1, 1, 1]
    assert Upsampling(4096, 0.7).counts(lengths[:0], np.zeros(0, np.int64)).tolist() == []


def test_the_seed_decides_which_are_taken_once_more():
    lengths, source = draw(0, 40), np.zeros(440, np.int64)
    one, same, other = (Upsampling(4096, 0.95, seed).counts(lengths, source) for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any()


@pytest.mark.parametrize(("tokens", "share"), [(1, 0.5), (4096, 0.0), (4096, 1.0)])
def test_settings_out_of_range_are_refused(tokens, share):
    with pytest.raises(ValueError, match="min_tokens of at least 2 and a share between 0 and 1"):
        Upsampling(tokens, share)


@pytest.fixture
def sources(write_jsonl):
    """Two sources: 40 short texts with a long one, and 10 short ones with two long ones."""
    texts = [["1+2=3"] * 40 + ["12+34=46 " * 9], ["7-5=2"] * 10 + ["99-88=11 " * 11, "1*1=1 " * 17]]
    rows = [[{"text": text} for text in part] for part in texts]
    return [Source(write_jsonl(part, f"{number}.jsonl")) for number, part in enumerate(rows)]


def test_a_corpus_holds_the_copies_and_counts_them(sources, digits):
    sets = [load_tokenized(source, digits) for source in sources]
    plain = Corpus(sets, seq_len=128, overlong="raise")
    corpus = Corpus(sets, seq_len=128, overlong="raise", upsampling=Upsampling(50, 0.6))
    assert corpus.repeats == len(corpus) - len(plain) > 0
    documents = [tuple(corpus.document(index).ids.tolist()) for index in range(len(corpus))]
    assert set(documents) == {tuple(plain.document(index).ids.tolist()) for index in range(len(plain))}
    assert [len(document) for document in documents] == corpus.lengths.tolist()
    assert len(corpus.questions()) == len(corpus)


def build_data(sources, digits, **settings):
    options = {"tokenizer": digits, "train": sources, "seq_len": 128, "micro_batch_size": 2, "max_epochs": 2}
    return SFTDataModule(**{**options, "upsampling": Upsampling(50, 0.6), **settings})


@pytest.mark.parametrize("streaming", [False, True])
def test_statistics_count_what_an_epoch_holds(sources, digits, streaming):
    data = build_data(sources, digits, streaming=streaming, max_epochs=1)
    stats = data.prepare()
    lengths = []
    for batch in data.train_dataloader():
        ends = batch["cu_seqlens"].diff().tolist()
        first = (batch["position_ids"] == 0).flatten().nonzero().flatten().tolist()
        learned = (batch["labels"] != -100).flatten()
        lengths += [n for start, n in zip(first, ends, strict=True) if learned[start : start + n].any()]
    assert len(lengths) == stats.kept and sum(lengths) == stats.tokens
    assert sum(length >= 50 for length in lengths) == stats.long_rows
    assert sum(length for length in lengths if length >= 50) == stats.long_tokens
    assert stats.kept - stats.repeated == 53
    assert f"{stats.repeated:,}" in stats.table() and "in long documents" in stats.table()


def test_the_order_is_resumed_where_it_was_left(sources, digits):
    whole = [batch["input_ids"] for batch in build_data(sources, digits).train_dataloader()]
    resumed = build_data(sources, digits)
    resumed.load_state_dict({"rows_consumed": 6, "batches_processed": 3})
    rest = [batch["input_ids"] for batch in resumed.train_dataloader()]
    assert len(rest) == len(whole) - 3 > 1
    assert all((a == b).all() for a, b in zip(rest, whole[3:], strict=True))
