import json

import pytest

from difftune.data.contamination import ProblemIndex
from difftune.data.datamodule import SFTDataModule
from difftune.data.doctor import examine
from difftune.data.sources import Source
from difftune.data.token_cache import load_tokenized

TURNS = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
GOOD = json.dumps({"messages": TURNS})
BAD = {
    "not valid JSON": '{"messages": ',
    "a row must be a JSON object with named columns": "[1]",
    "column 'messages' must be a list of {role": '{"messages": "x"}',
    "no column 'messages'": '{"text": "x"}',
    "no label to learn": json.dumps({"messages": TURNS[:1]}),
    "the row begins with an assistant turn": json.dumps({"messages": TURNS[1:]}),
    "empty assistant turn": json.dumps({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}),
    "half of a surrogate pair": '{"messages": [{"role": "user", "content": "1"}, '
    '{"role": "assistant", "content": "\\ud83d"}]}',
    "a turn of 'messages' needs role": json.dumps({"messages": [{"role": "wizard", "content": "x"}, TURNS[1]]}),
    "the tokenizer has no token": json.dumps({"messages": [TURNS[0], {"role": "assistant", "content": "世"}]}),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"

    def write(*lines: str) -> str:
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_named_or_dropped_and_counted(reason, file, digits, tmp_path):
    path = file(BAD[reason], GOOD, BAD[reason], GOOD)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: .*data\.bad_rows=drop"):
        load_tokenized(Source(path, format="messages"), digits)
    source = Source(path, format="messages", bad_rows="drop")
    cache = tmp_path / "cache"
    for data in (load_tokenized(source, digits), *(load_tokenized(source, digits, cache) for _ in range(2))):
        (key,) = data.counts.dropped
        assert key.startswith(f"bad row: {reason}")
        assert data.counts.dropped[key] == 2 == len(data)
        assert data.counts.first_bad[key].startswith(f"{path}, line 1: ")
        assert data.row_numbers.tolist() == [2, 4]


def test_a_fault_of_the_tokenizer_is_no_bad_row(file, digits, monkeypatch):
    monkeypatch.setattr(digits, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenized(Source(file(GOOD), bad_rows="drop"), digits)


def test_the_doctor_counts_bad_rows_too(file):
    path = file("{", GOOD, "[]", GOOD)
    report = examine(Source(path, bad_rows="drop"), ProblemIndex({}))
    assert (report.rows, report.kept, sum(report.dropped.values())) == (4, 2, 2)
    assert f"bad row: not valid JSON: {path}, line 1" in report.text()
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        examine(Source(path), ProblemIndex({}))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_stream_passes_bad_rows_and_resumes_behind_them(streaming, file, digits):
    good = [json.dumps({"question": f"{n}+1", "answer": f"{n + 1}"}) for n in range(8)]
    path = file(*good[:3], '{"question": "5+', *good[3:])

    def data() -> SFTDataModule:
        return SFTDataModule(
            tokenizer=digits,
            train=[Source(path, bad_rows="drop")],
            seq_len=16,
            micro_batch_size=1,
            packing=False,
            streaming=streaming,
            seed=3,
            max_epochs=2,
        )

    whole = data()
    assert whole.prepare().dropped == {"bad row: not valid JSON": 1}
    assert f"first bad row: not valid JSON: {path}, line 4: " in whole.prepare().table()
    rows = [batch["input_ids"].tolist() for batch in whole.train_dataloader()]
    assert len(rows) == 16
    resumed = data()
    resumed.load_state_dict({"rows_consumed": 5, "batches_processed": 5})
    assert [batch["input_ids"].tolist() for batch in resumed.train_dataloader()] == rows[5:]


def test_where_all_rows_are_bad_the_first_is_shown(file, digits):
    source = Source(file("{", "["), bad_rows="drop")
    data = SFTDataModule(tokenizer=digits, train=[source], seq_len=16, micro_batch_size=1)
    with pytest.raises(ValueError, match=r"none of the 2 rows .*\n  first bad row: not valid JSON: .*line 1"):
        data.prepare()
