import logging
import os
import signal
from itertools import islice, pairwise
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from difftune.data import datamodule, tokenized
from difftune.data.datamodule import SFTDataModule
from difftune.data.problems import load_problems
from difftune.data.sources import Source
from tests.conftest import shared_data

EASY = {"terms": [2, 3], "operands": [1, 20], "count": 120}


def build(tokenizer, **changed) -> SFTDataModule:
    settings = {
        "train": [Source("synthetic:arithmetic", options=EASY)],
        "seq_len": 80,
        "micro_batch_size": 4,
        "seed": 1,
        **changed,
    }
    return SFTDataModule(tokenizer=tokenizer, **settings)


def first(data: SFTDataModule, count: int) -> list[dict[str, torch.Tensor]]:
    return list(islice(data.train_dataloader(), count))


def equal(left: list, right: list) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def on_rank(rank: int, world_size: int, processed: int = 0) -> SimpleNamespace:
    """As much of a Trainer as the data module looks at."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=processed))
    return SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


def test_batch_has_the_agreed_form(digits):
    batch = first(build(digits), 1)[0]
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items() if name != "cu_seqlens"} == {
        name: ((4, 80), torch.int64) for name in ("input_ids", "labels", "position_ids")
    }
    borders = batch["cu_seqlens"]
    assert borders.dtype == torch.int32 and borders[0] == 0 and borders[-1] == 320


def test_packed_documents_are_whole_apart_and_begin_unlearned(digits):
    data = build(digits, max_epochs=1)
    texts = []
    for batch in data.train_dataloader():
        ids, labels, positions = (batch[name].flatten() for name in ("input_ids", "labels", "position_ids"))
        borders = batch["cu_seqlens"].tolist()
        assert (torch.diff(batch["cu_seqlens"]) > 0).all()
        for start, end in pairwise(borders):
            assert positions[start:end].tolist() == list(range(end - start))
            assert labels[start] == -100
            learned = labels[start:end] != -100
            assert torch.equal(labels[start:end][learned], ids[start:end][learned])
            text = digits.decode(ids[start:end].tolist())
            if "<|pad|>" in text:
                assert set(text) == set("<|pad|>") and not learned.any()
                continue
            prompt, answer = text.split("<|assistant|>")
            assert prompt.startswith("<|user|>") and answer.endswith("<|eos|>")
            assert digits.decode(labels[start:end][learned].tolist()) == answer
            texts.append(text)
    assert len(set(texts)) == len(texts) == EASY["count"]


def test_unpacked_batches_hold_the_same_documents(digits):
    data = build(digits, max_epochs=1, packing=False)
    batches = list(data.train_dataloader())
    assert set(batches[0]) == {"input_ids", "labels", "position_ids", "attention_mask"}
    rows = [
        row[mask.bool()].tolist()
        for b in batches
        for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert len({digits.decode(row) for row in rows}) == EASY["count"] == len(rows)
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == data.stats.label_tokens


@pytest.fixture
def small_blocks(monkeypatch) -> int:
    """Streams in pieces of 32 rows and blocks of 64, so that a small set has several."""
    for module in (tokenized, datamodule):
        monkeypatch.setattr(module, "PIECE_ROWS", 32)
    monkeypatch.setattr(datamodule, "STREAM_BLOCK_ROWS", 64)
    return 64


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [True, False])
def test_resume_gives_exactly_the_remaining_batches(digits, small_blocks, workers, streaming, packing):
    settings = {"max_epochs": 2, "streaming": streaming, "packing": packing, "num_workers": workers}
    whole = list(build(digits, **{**settings, "num_workers": 0}).train_dataloader())
    for done in (1, len(whole) // 2 + 1, len(whole)):
        stopped = build(digits, **settings)
        stopped.prepare()
        stopped.trainer = on_rank(0, 1, processed=done)
        resumed = build(digits, **settings)
        resumed.load_state_dict(stopped.state_dict())
        assert equal(list(resumed.train_dataloader()), whole[done:])


def test_position_survives_two_resumes_and_a_change_of_ranks(digits):
    whole = first(build(digits, micro_batch_size=1), 60)
    data = build(digits, micro_batch_size=3)
    data.trainer = on_rank(0, 2, processed=5)
    state = data.state_dict()
    assert state == {"rows_consumed": 30, "batches_processed": 5}
    again = build(digits, micro_batch_size=4)
    again.load_state_dict(state)
    again.trainer = on_rank(0, 1, processed=8)
    assert again.state_dict()["rows_consumed"] == 30 + 3 * 4
    last = build(digits, micro_batch_size=1)
    last.load_state_dict(again.state_dict())
    assert equal(first(last, 18), whole[42:])


def test_ranks_share_each_global_batch(digits):
    alone = first(build(digits, micro_batch_size=4), 10)
    ranks = []
    for rank in range(2):
        data = build(digits, micro_batch_size=2)
        data.trainer = on_rank(rank, 2)
        ranks.append(first(data, 10))
    for whole, left, right in zip(alone, *ranks, strict=True):
        assert torch.equal(whole["input_ids"][0::2], left["input_ids"])
        assert torch.equal(whole["labels"][1::2], right["labels"])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(digits, workers):
    before = torch.get_rng_state()
    first(build(digits, num_workers=workers), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_cache_hit_gives_identical_batches(digits, tmp_path, monkeypatch):
    plain = first(build(digits), 20)
    first_time = first(build(digits, cache_dir=tmp_path), 20)
    monkeypatch.setattr("difftune.data.tokenized.encode_examples", lambda *_: pytest.fail("tokenised again"))
    cached = first(build(digits, cache_dir=tmp_path, num_workers=1), 20)
    assert equal(plain, first_time) and equal(plain, cached)


def test_stream_is_endless_unless_told_otherwise(digits):
    data = build(digits)
    rows = data.prepare().batch_rows
    assert data.total_batches() is None and data.total_steps() is None
    assert len(first(data, rows)) == rows  # four epochs of four rows a batch


def test_total_batches_are_those_of_the_stream(digits):
    for size, epochs in ((4, 1), (7, 2), (5, 3)):
        data = build(digits, micro_batch_size=size, max_epochs=epochs, accumulate_grad_batches=4)
        batches = len(list(data.train_dataloader()))
        assert data.total_batches() == batches
        assert data.total_steps() == -(-batches // 4)
        assert data.total_batches(world_size=2) == -(-data.stats.batch_rows * epochs // (2 * size))


def test_several_sources_are_mixed(digits, write_jsonl):
    other = Source(write_jsonl([{"prompt": f"q{n}", "completion": "a"} for n in range(60)]))
    for streaming in (False, True):
        data = build(digits, train=[Source("synthetic:arithmetic", options=EASY), other], streaming=streaming)
        texts = [digits.decode(batch["input_ids"].flatten().tolist()) for batch in first(data, 3)]
        assert all("q" in text and "+" in text for text in texts)
        assert data.stats.kept == 180


def test_streaming_covers_every_row_once_an_epoch(digits, small_blocks):
    data = build(digits, streaming=True, packing=False, max_epochs=1)
    rows = [row.tolist() for batch in data.train_dataloader() for row in batch["input_ids"]]
    texts = [digits.decode(row).replace("<|pad|>", "") for row in rows]
    resident = build(digits, packing=False, max_epochs=1)
    expected = [
        digits.decode(row.tolist()).replace("<|pad|>", "")
        for b in resident.train_dataloader()
        for row in b["input_ids"]
    ]
    assert texts != expected and sorted(texts) == sorted(expected)
    assert not data.stats.complete and data.stats.rows_read == small_blocks
    assert data.total_batches() is None


def test_sample_is_a_row_of_the_stream_with_its_mask(digits):
    data = build(digits)
    runs = data.sample(2)
    row = first(data, 1)[0]
    text = digits.decode(row["input_ids"][2].tolist()).split("<|pad|>")[0]
    assert "".join(run for run, _ in runs) == text
    assert [learned for _, learned in runs] == [False, True] * (len(runs) // 2)
    assert all(run.endswith("<|assistant|>") != learned for run, learned in runs)
    with pytest.raises(ValueError, match="there is no row 9999"):
        build(digits, max_epochs=1).sample(9999)


def test_sample_decodes_characters_of_several_bytes(byte_tokenizer, write_jsonl):
    data = build(byte_tokenizer, train=[Source(write_jsonl([{"prompt": "世", "completion": "界é"}]))])
    assert data.sample(0) == [("<|user|>世<|assistant|>", False), ("界é<|eos|>", True)]


def test_held_out_problems_are_not_seen_and_training_problems_are(digits):
    data = build(digits, train=[Source("synthetic:arithmetic", options={**EASY, "count": 5000})])
    test = load_problems("synthetic:arithmetic", 200, options={"terms": [2, 3], "operands": [1, 20]})
    train = load_problems("synthetic:arithmetic", 20, split="train", options={"terms": [2, 3], "operands": [1, 20]})
    assert data.seen(test) == []
    assert data.seen(train) == train


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": []}, "train has no source"),
        ({"overlong": "cut"}, "overlong must be one of drop, truncate, raise, got 'cut'"),
        ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"max_epochs": 0}, "max_epochs must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ],
)
def test_wrong_settings_are_errors(digits, changed, message):
    with pytest.raises(ValueError, match=message):
        build(digits, **changed)


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_left_to_learn_is_an_error_with_the_reasons(digits, streaming):
    with pytest.raises(ValueError, match="none of the 120 rows read is left to learn: 120 longer than 5 tokens"):
        build(digits, seq_len=5, streaming=streaming).prepare()


@pytest.mark.parametrize("streaming", [False, True])
def test_row_without_label_stops_the_run_and_is_named(digits, write_jsonl, streaming):
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}] * 2
    path = write_jsonl([*rows, {"messages": rows[0]["messages"][:1]}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: no label to learn"):
        build(digits, train=[Source(path)], streaming=streaming).prepare()


def test_large_loss_to_the_length_limit_is_a_warning(digits, caplog):
    with caplog.at_level(logging.WARNING):
        stats = build(digits, seq_len=32).prepare()
    assert f"{stats.dropped['longer than 32 tokens']} of 120 rows are lost" in caplog.text


class Recorder(pl.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[dict] = []

    def training_step(self, batch, batch_index):
        self.seen.append({name: tensor.clone() for name, tensor in batch.items()})
        return self.weight * batch["labels"].float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(digits, tmp_path, steps: int, resume=None, **changed) -> Recorder:
    model = Recorder()
    saving = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=steps,
        logger=False,
        callbacks=[saving],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, build(digits, **changed), ckpt_path=resume)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_resumes_where_it_stopped_also_twice_and_across_epochs(digits, tmp_path):
    epoch = build(digits, max_epochs=1).total_batches()
    steps = 3 * epoch + 2
    whole = fit(digits, tmp_path / "whole", steps).seen
    assert len(whole) == steps and equal(whole, first(build(digits), steps))
    for stop in (3, epoch, epoch + 1):
        fit(digits, tmp_path / f"a{stop}", stop)
        middle = fit(digits, tmp_path / f"b{stop}", 2 * epoch, resume=tmp_path / f"a{stop}" / f"step={stop}.ckpt").seen
        last = fit(digits, tmp_path / f"c{stop}", steps, resume=tmp_path / f"b{stop}" / f"step={2 * epoch}.ckpt").seen
        assert equal(whole[:stop] + middle + last, whole)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_stops_at_the_end_of_a_finite_stream(digits, tmp_path):
    model = fit(digits, tmp_path, -1, max_epochs=2)
    assert len(model.seen) == build(digits, max_epochs=2).total_batches()


def test_trainer_that_would_begin_anew_is_refused(digits):
    trainer = pl.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, barebones=False)
    with pytest.raises(ValueError, match="give the Trainer max_epochs=1, got 3"):
        trainer.fit(Recorder(), build(digits, max_epochs=2))


def test_real_gsm8k_is_masked_and_packed(byte_tokenizer):
    path = shared_data() / "gsm8k_train.jsonl"
    data = build(byte_tokenizer, train=[Source(str(path), limit=300)], seq_len=1500, max_epochs=1)
    for batch in data.train_dataloader():
        learned = byte_tokenizer.decode(batch["labels"][batch["labels"] != -100].tolist())
        assert learned.count("<|eos|>") == learned.count("\n#### ") > 0
        assert "<|user|>" not in learned and "<<" not in learned
    assert data.stats.kept + sum(data.stats.dropped.values()) == 300


def test_ctrl_c_leaves_the_processes_that_make_batches_alone(digits):
    loader = build(digits, num_workers=1).train_dataloader()
    batches = iter(loader)
    next(batches)
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert sum(1 for _ in islice(batches, 20)) == 20
