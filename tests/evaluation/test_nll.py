import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from difftune.data.texts import load_texts
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.nll import DocumentNll, NllTask
from difftune.modeling.compat import CACHE
from tests.evaluation.scripted import tiny_model

TOKENIZER = build_tokenizer("digits")


class Sure(nn.Module):
    """Gives the next token of the text `truth` a probability that depends on its position alone, the rest share."""

    def __init__(self, truth: list[int], probability: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.truth, self.probability = truth, probability

    def forward(self, input_ids: torch.Tensor, use_cache: bool, **given: int | None) -> SimpleNamespace:
        past = given[CACHE] or 0
        logits = torch.empty(1, input_ids.shape[1], 102)
        for at in range(input_ids.shape[1]):
            share = self.probability(past + at + 1)
            logits[0, at] = math.log((1 - share) / 101)
            logits[0, at, self.truth[past + at + 1]] = math.log(share)
        return SimpleNamespace(logits=logits, **{CACHE: past + input_ids.shape[1]})


def test_the_curve_is_that_of_a_hand_made_model() -> None:
    text = "abcdefghijklmnopqrstu"
    ids = TOKENIZER(text)["input_ids"]
    task = NllTask("books", [text], length=21, bins=4, chunk_size=6)
    # 1 nat each for the first ten positions, a quarter of a nat for the ten after them.
    model = Sure(ids, lambda position: math.exp(-1 if position <= 10 else -0.25))
    result = task.summarise(task.run(model, TOKENIZER))
    assert result.positions == [5, 10, 15, 20]
    assert result.by_bin == pytest.approx([1, 1, 0.25, 0.25], abs=1e-6)
    assert result.cumulative == pytest.approx([1, 1, 11.25 / 15, 12.5 / 20], abs=1e-6)
    assert result.metrics() == pytest.approx({"nll": 0.625, "nll_first": 1, "nll_last": 0.25, "n": 1}, abs=1e-6)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["spread"] == [None] * 4
    assert "0.6250 nats a token over 20 positions" in str(result)


def test_a_real_model_gives_the_same_whatever_the_chunks_and_ranks() -> None:
    texts = load_texts("synthetic:prose", limit=3, characters=100)
    model = tiny_model()
    results = []
    for chunk_size in (7, 64):
        task = NllTask("books", texts, length=60, bins=6, chunk_size=chunk_size)
        parts = [task.run(model, TOKENIZER, part=(rank, 2)) for rank in range(2)]
        results.append(task.summarise(sample for part in parts for sample in part))
    assert results[0].n == 3 and results[0].complete
    assert results[0].cumulative == pytest.approx(results[1].cumulative, rel=1e-5)
    ids = torch.tensor([TOKENIZER(text)["input_ids"][:60] for text in texts])
    with torch.no_grad():
        logits = model.eval()(ids).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert results[0].metrics()["nll"] == pytest.approx(expected, rel=1e-5)


def test_documents_that_are_too_short_are_left_out_and_counted() -> None:
    task = NllTask("books", ["short", "long enough to be read"], length=10, bins=3)
    result = task.summarise(task.run(tiny_model(), TOKENIZER))
    assert (result.n, result.too_short, result.complete) == (1, 1, True)
    assert "1 too short" in result.row()["documents"]
    only = NllTask("books", ["short"], length=10)
    with pytest.raises(ValueError, match="no document of task 'books' has 10 tokens, the longest has 5: lower length"):
        only.summarise(only.run(tiny_model(), TOKENIZER))


def test_a_document_that_the_time_did_not_allow_is_not_half_counted() -> None:
    task = NllTask("books", ["a" * 40, "b" * 40], length=40, chunk_size=10)
    polls = iter([False] * 7 + [True] * 9)
    result = task.summarise(task.run(tiny_model(), TOKENIZER, should_stop=lambda: next(polls)))
    assert (result.n, result.skipped, result.complete) == (1, 1, False)
    nothing = task.summarise([])
    assert nothing.n == 0 and math.isnan(nothing.metrics()["nll"]) and nothing.row() and nothing.tables()


def test_bins_are_of_equal_size_and_never_empty() -> None:
    assert NllTask("t", ["a"], length=5, bins=64).edges == [1, 2, 3, 4]
    assert NllTask("t", ["a"], length=65536, bins=64).edges[-1] == 65535
    result = NllTask("t", ["a", "b"], length=5, bins=2).summarise(
        [DocumentNll(0, 4, [2.0, 4.0]), DocumentNll(1, 4, [4.0, 4.0])]
    )
    assert result.cumulative == [1.5, 1.75] and result.spread == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"texts": []}, "'books' has no text"), ({"length": 1}, r"length \(1\) of task 'books' must be at least 2")],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NllTask(**{"name": "books", "texts": ["a"], "length": 8, **settings})
