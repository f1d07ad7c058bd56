import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from difftune.data.texts import load_texts
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.needle import NeedleTask, Retrieval
from tests.evaluation.scripted import tiny_model

TOKENIZER = build_tokenizer("bytes")
TEXTS = load_texts("synthetic:prose", characters=3000)
ASKED = re.compile(r"special magic numbers? for ([\w, ]+)\?")
HIDDEN = re.compile(r"\nThe special magic (\w+) number is: (\d{7})\n")


class Retriever(nn.Module):
    """Reads the prompt; `keep` says whether it sees the needle of a city that is asked for."""

    def __init__(self, keep: Callable[[str, str], bool]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig()
        self.keep = keep
        self.batches: list[tuple[int, int]] = []

    def generate(self, input_ids: torch.Tensor, generation_config: GenerationConfig, **unused: Any) -> torch.Tensor:
        self.batches.append(tuple(input_ids.shape))
        rows = []
        for prompt in input_ids:
            text = TOKENIZER.decode(prompt)
            numbers = dict(HIDDEN.findall(text))
            asked = re.findall(r"[A-Z]\w+", ASKED.search(text)[1])
            answer = "; ".join(numbers[city] for city in asked if self.keep(city, text)) or "unknown"
            rows.append([*TOKENIZER(answer, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id])
        width = max(map(len, rows))
        rows = [row + [TOKENIZER.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat((input_ids, torch.tensor(rows)), dim=1)


def task(**changes: Any) -> NeedleTask:
    settings = {"lengths": [600, 900], "needles": 3, "samples_per_cell": 4, "max_new_tokens": 30, "batch_size": 3}
    return NeedleTask("needle", TEXTS, **{**settings, **changes})


def test_a_model_that_always_retrieves_has_one_and_one_that_never_does_zero() -> None:
    always, never = (task().run(Retriever(lambda *_, keep=keep: keep), TOKENIZER) for keep in (True, False))
    assert [task().summarise(samples).accuracy for samples in (always, never)] == [1.0, 0.0]
    result = task().summarise(always)
    assert result.cells == [[1.0, 1.0]] * 5 and result.counts == [[4, 4]] * 5 and result.by_length == [1, 1]
    assert result.metrics()["accuracy_600"] == 1.0 and result.complete and result.metrics()["n"] == 40


def test_the_heat_map_says_where_a_model_is_blind() -> None:
    def first_half(city: str, text: str) -> bool:
        return text.index(f"magic {city} number") < len(text) / 2

    needle = task(depths=[0.0, 1.0], needles=1)
    result = needle.summarise(needle.run(Retriever(first_half), TOKENIZER))
    assert result.cells == [[1.0, 1.0], [0.0, 0.0]] and result.accuracy == 0.5 and result.by_length == [0.5, 0.5]


def test_each_number_that_is_asked_for_counts() -> None:
    asked: list[str] = []

    def every_other(city: str, text: str) -> bool:
        asked.append(city)
        return len(asked) % 2 == 0

    needle = task(queries=2, samples_per_cell=2)
    samples = needle.run(Retriever(every_other), TOKENIZER)
    assert all(len(sample.numbers) == 2 for sample in samples)
    assert needle.summarise(samples).accuracy == 0.5


def test_long_texts_are_fewer_a_batch_and_all_of_a_batch_are_of_one_length() -> None:
    model = Retriever(lambda *_: True)
    needle = task(max_batch_tokens=1300)
    needle.run(model, TOKENIZER)
    assert {width for _, width in model.batches} == {570, 870}
    assert max(rows for rows, width in model.batches if width == 570) == 2
    assert max(rows for rows, width in model.batches if width == 870) == 1


def test_haystacks_are_the_same_whatever_the_ranks_and_batches() -> None:
    needle = task()
    whole = needle.run(Retriever(lambda *_: True), TOKENIZER)
    parts = [task(batch_size=7).run(Retriever(lambda *_: True), TOKENIZER, part=(rank, 2)) for rank in range(2)]
    assert needle.summarise(whole) == needle.summarise(sample for part in parts for sample in part)
    assert len({tuple(sample.numbers.values()) for sample in whole}) == 40
    assert [s.numbers for s in task(seed=1).run(Retriever(lambda *_: True), TOKENIZER)] != [s.numbers for s in whole]


@pytest.mark.parametrize(
    ("lengths", "needles", "queries", "expected"),
    [
        ([4096], 6, 2, [["0.85"], ["0.55"]]),
        ([512, 8192, 65536], 8, 1, [["", "1.00", "0.86"], ["", "0.95", "0.52"]]),
        ([8192], 6, 2, []),
        ([600], 8, 1, []),
    ],
)
def test_the_papers_figures_stand_below_the_lengths_that_it_has(
    lengths: list[int], needles: int, queries: int, expected: list[list[str]]
) -> None:
    (table,) = task(lengths=lengths, needles=needles, queries=queries).summarise([]).tables()
    columns = [list(column.cells)[6:] for column in table.columns]
    assert [list(row) for row in zip(*columns[1:], strict=True)] == expected
    assert all("paper" in str(cell) for cell in columns[0])


def test_a_random_model_finds_nothing() -> None:
    needle = task(samples_per_cell=1, lengths=[600], max_new_tokens=8)
    result = needle.summarise(needle.run(tiny_model(vocab_size=262), TOKENIZER))
    assert result.accuracy == 0 and result.complete


def test_cells_without_time_say_that_they_know_nothing() -> None:
    result = task().summarise([Retrieval(0, 600, 0.0, {"Oslo": "1"}, "1", [True], True)])
    assert not result.complete and result.cells[0][0] == 1.0 and math.isnan(result.cells[4][1])
    figures = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert figures["cells"][4] == [None, None]
    assert len(result.tables()) == 1 and "accuracy 1.000 on 1 haystacks" in str(result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": 4}, r"queries \(4\) of task 'needle' must be between 1 and needles \(3\)"),
        ({"needles": 500}, "and these at most"),
        ({"prompt": "story"}, "prompt of task 'needle' must be one of plain, chat, completion, got 'story'"),
        ({"prompt": "completion", "queries": 2}, "asks for one number: set queries=1"),
        ({"depths": [25]}, "depths between 0 and 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**changes)
