import json

import numpy as np
import pytest

from difftune.data.datamodule import SFTDataModule
from difftune.data.sources import Source
from difftune.data.statistics import DataStatistics
from difftune.data.tokenizers import build_tokenizer
from tests.conftest import shared_data

ROWS = [
    {"question": "1+1", "answer": "2"},
    {"question": "1234+1", "answer": "1235", "solution": "4+1=5"},
    {"question": "2+2", "answer": ""},
    {"question": "3+3", "answer": "6"},
    {"question": "1+2+3+4+5+6+7+8+9", "answer": "45"},
]


def second_count(tokenizer, rows: list[tuple[str, str]], seq_len: int) -> dict:
    """The same numbers from the texts, one row at a time, with nothing of the package."""
    counts = {"kept": 0, "tokens": 0, "label_tokens": 0, "longest_row": 0}
    for question, answer in rows:
        size = len(tokenizer(f"<|user|>{question}<|assistant|>{answer}<|eos|>", add_special_tokens=False)["input_ids"])
        counts["longest_row"] = max(counts["longest_row"], size)
        if size <= seq_len:
            counts["kept"] += 1
            counts["tokens"] += size
            counts["label_tokens"] += len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1
    return counts


def test_counts_are_those_of_a_second_count(digits, write_jsonl):
    data = SFTDataModule(
        tokenizer=digits,
        train=[Source(write_jsonl(ROWS), bad_rows="drop")],
        seq_len=30,
        micro_batch_size=2,
        max_epochs=1,
    )
    stats = data.prepare().to_dict()
    texts = [(row["question"], row["answer"]) for row in ROWS if row["answer"]]
    texts[1] = ("1234+1", "4+1=5\n#### 1235")
    expected = second_count(digits, texts, 30)
    assert (
        {name: stats[name] for name in expected}
        == expected
        == {
            "kept": 4,
            "tokens": 7 + 24 + 7 + 22,
            "label_tokens": 2 + 16 + 2 + 3,
            "longest_row": 24,
        }
    )
    assert stats["dropped"] == {"bad row: empty answer": 1}
    assert (stats["rows_read"], stats["truncated"], stats["eos_share"], stats["complete"]) == (5, 0, 1.0, True)
    # 24, 22 + 7 and 7 tokens in rows of 30.
    assert stats["batch_rows"] == 3
    assert stats["padding_fraction"] == pytest.approx(1 - 60 / 90)
    json.dumps(stats)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_counts_are_those_of_the_batches_of_an_epoch(byte_tokenizer, write_jsonl, packing, overlong):
    rng = np.random.default_rng(0)
    rows = [{"prompt": "q" * int(n), "completion": "a" * int(m)} for n, m in rng.integers(1, 40, size=(101, 2))]
    data = SFTDataModule(
        tokenizer=byte_tokenizer,
        train=[Source(write_jsonl(rows))],
        seq_len=48,
        micro_batch_size=4,
        packing=packing,
        overlong=overlong,
        max_epochs=1,
    )
    stats = data.prepare()
    batches = list(data.train_dataloader())
    assert stats.label_tokens == sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert stats.batch_rows == sum(len(batch["input_ids"]) for batch in batches)
    pad = byte_tokenizer.pad_token_id
    padding = sum(int((batch["input_ids"] == pad).sum()) for batch in batches)
    size = sum(batch["input_ids"].numel() for batch in batches)
    assert stats.tokens == size - padding
    assert stats.padding_fraction == pytest.approx(padding / size)
    ends = sum(int((batch["input_ids"] == byte_tokenizer.eos_token_id).sum()) for batch in batches)
    assert stats.eos_share == pytest.approx(ends / stats.kept)
    assert (stats.eos_share < 1) == (overlong == "truncate") == (stats.truncated > 0)
    assert stats.rows_read == stats.kept + sum(stats.dropped.values())


def test_table_shows_every_reason_and_number():
    stats = DataStatistics(1000, {"empty answer": 3}, 997, 5, 12345, 6789, 77, 0.5, 2, 40, 0.125, 64, False)
    table = stats.table()
    for part in (
        "1,000 (first block",
        "dropped: empty answer",
        "997",
        "truncated",
        "12,345",
        "6,789 (55.0%)",
        "77 tokens",
    ):
        assert part in table
    for part in ("seq_len 64", "50.0%", "12.5%", "unknown to the tokenizer"):
        assert part in table


def test_gsm8k_counts_are_those_of_a_second_count(byte_tokenizer):
    path = shared_data() / "gsm8k_train.jsonl"
    data = SFTDataModule(
        tokenizer=byte_tokenizer, train=[Source(str(path), limit=500)], seq_len=700, micro_batch_size=2
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()[:500]]
    texts = []
    for row in rows:
        solution = row["solution"]
        while "<<" in solution:
            before, _, rest = solution.partition("<<")
            solution = before + rest.partition(">>")[2]
        texts.append((row["question"].strip(), f"{solution.strip()}\n#### {row['answer']}"))
    stats = data.prepare().to_dict()
    expected = second_count(byte_tokenizer, texts, 700)
    assert {name: stats[name] for name in expected} == expected
    assert stats["dropped"] == {"longer than 700 tokens": 500 - expected["kept"]}


def test_unknown_tokens_are_counted(tmp_path, write_jsonl):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>", unk_token="<unk>", pad_token="<s>")
    rows = [{"text": "a b a"}, {"text": "c d"}]
    data = SFTDataModule(tokenizer=tokenizer, train=[Source(write_jsonl(rows))], seq_len=8, micro_batch_size=1)
    assert data.prepare().unknown_tokens == 3


def test_further_turns_of_a_row_are_counted(write_jsonl) -> None:
    forgetful = (
        "{% for m in messages %}{% set whole = loop.last or m.role == 'user' %}"
        "{{ '<|' + m.role + '|>' + (m.content if whole else m.content[:1]) + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = build_tokenizer("bytes", chat_template=forgetful)
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    rows = [{"messages": turns}, {"messages": turns[:2]}, {"messages": turns[:4]}]
    data = SFTDataModule(tokenizer=tokenizer, train=[Source(write_jsonl(rows))], seq_len=200, micro_batch_size=1)
    stats = data.prepare()
    assert (stats.rows_read, stats.kept, stats.further_turns) == (3, 6, 3)
    assert "of them further turns of a row" in stats.table()
