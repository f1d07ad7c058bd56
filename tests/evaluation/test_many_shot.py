import json
import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from difftune.data.labelled import LabelledText
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.demonstrations import Template, arrange, select
from difftune.evaluation.many_shot import ManyShotTask
from difftune.modeling.compat import CACHE
from tests.evaluation.scripted import tiny_model

TOKENIZER = build_tokenizer("digits")
CLASSES = ("bird", "bird song", "cat")
TRAIN = [LabelledText(f"{label} {n}", label) for n in range(6) for label in CLASSES]
TEST = [LabelledText(f"{label} {n}", label) for n in range(60, 64) for label in CLASSES]


class Ids:
    """A cache that keeps the tokens themselves."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def crop(self, tokens_to_remove: int) -> None:
        assert tokens_to_remove < 0
        del self.ids[tokens_to_remove:]


class Classifier(nn.Module):
    """Writes the label that `rule` makes of the demonstrations and the text that is asked for."""

    def __init__(self, rule: Callable[[list[tuple[str, str]], str], str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rule, self.read = rule, 0

    def forward(
        self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int, **given: Ids | None
    ) -> SimpleNamespace:
        cache = given[CACHE] or Ids()
        logits = torch.zeros(len(input_ids), logits_to_keep, 102)
        for row, new in enumerate(input_ids.tolist()):
            for kept in range(logits_to_keep):
                end = len(new) - logits_to_keep + kept + 1
                token = self.next_token([*cache.ids, *new[:end]])
                if token is not None:
                    logits[row, kept, token] = 9.0
        cache.ids = [*cache.ids, *input_ids[0].tolist()]
        self.read += input_ids.numel()
        return SimpleNamespace(logits=logits, **{CACHE: cache})

    def next_token(self, ids: list[int]) -> int | None:
        *shown, asked = TOKENIZER.decode(ids).split("\n==\n")
        pairs = [tuple(one.removeprefix("Question: ").split("\nType: ")) for one in shown]
        text, found, written = asked.removeprefix("Question: ").partition("\nType:")
        answer = f" {self.rule(pairs, text)}\n" if found else ""
        if not answer.startswith(written) or answer == written:
            return None
        return int(TOKENIZER(answer[len(written)], add_special_tokens=False)["input_ids"][0])


def task(**changes: Any) -> ManyShotTask:
    return ManyShotTask(**{"name": "toy", "train": TRAIN, "test": TEST, "shots": [3, 9], "chunk_size": 50, **changes})


def kind_of(pairs: list[tuple[str, str]], text: str) -> str:
    return text.rpartition(" ")[0]


def last_shown(pairs: list[tuple[str, str]], text: str) -> str:
    return pairs[-1][1]


def run(model: nn.Module, **changes: Any) -> Any:
    many = task(**changes)
    return many.summarise(many.run(model, TOKENIZER))


def test_a_model_that_knows_has_one_and_one_that_never_does_zero() -> None:
    right = run(Classifier(kind_of))
    assert (right.metrics()["accuracy_3"], right.metrics()["accuracy_9"], right.complete) == (1.0, 1.0, True)
    assert right.chance == pytest.approx(1 / 3) and right.metrics()["n"] == 12
    wrong = run(Classifier(lambda pairs, text: CLASSES[(CLASSES.index(kind_of(pairs, text)) + 1) % 3]))
    assert wrong.metrics()["accuracy"] == 0.0


def test_a_model_that_repeats_the_last_demonstration_is_as_good_as_guessing_in_every_order() -> None:
    result = run(Classifier(last_shown), orders=6)
    assert result.metrics()["accuracy"] == pytest.approx(1 / 3) and result.metrics()["margin"] == 0.0


@pytest.mark.parametrize("order", ["random", "alternating"])
def test_the_margin_is_that_of_a_model_whose_answers_hang_on_the_order(order: str) -> None:
    def if_last_is_a_cat(pairs: list[tuple[str, str]], text: str) -> str:
        return kind_of(pairs, text) if pairs[-1][1] == "cat" else "bird song"

    many = task(shots=[6], orders=10, order=order)
    result = many.summarise(many.run(Classifier(if_last_is_a_cat), TOKENIZER))
    last = [arrange(select(TRAIN, 6, 0), order, seed)[-1].label for seed in range(10)]
    expected = [1.0 if label == "cat" else pytest.approx(1 / 3) for label in last]
    assert result.by_shots[0].accuracies == expected and len(set(last)) > 1
    assert result.metrics()["margin"] == result.metrics()["margin_6"] == pytest.approx(2 / 3)
    assert result.metrics()["best"] - result.metrics()["worst"] == pytest.approx(2 / 3)
    assert result.metrics()["accuracy"] == pytest.approx(sum(1 if label == "cat" else 1 / 3 for label in last) / 10)
    assert len(result.tables()) == 1


def test_the_papers_margins_stand_below_those_of_its_sets() -> None:
    (table,) = run(Classifier(kind_of), name="trec", shots=[3], orders=2, order="alternating").tables()
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [list(row[1:5]) for row in rows[1:]] == [
        ["0.899", "0.967", "0.833", "0.134"], ["0.659", "0.867", "0.300", "0.567"],
    ]  # fmt: skip
    assert "DIFF" in rows[1][0] and "Transformer" in rows[2][0]
    assert len(run(Classifier(kind_of), shots=[3], orders=2).tables()[0].rows) == 1


def test_demonstrations_are_read_once_for_all_examples() -> None:
    model = Classifier(kind_of)
    many = task(shots=[18], test=TEST[:10])
    many.run(model, TOKENIZER)
    template = Template(TOKENIZER, "Question:", "Type:")
    shown = len(template.demonstrations(TRAIN))
    each = max(len(template.query(e.text)) + 60 for e in TEST[:10])
    assert shown < model.read < shown + 10 * each < 2 * shown + 10 * each
    assert many._reader is None, "the weights may have changed at the next call"


def test_a_real_model_chooses_what_scoring_without_the_cache_chooses() -> None:
    model = tiny_model().double().eval()
    many = task(shots=[6], test=TEST[:3])
    template = Template(TOKENIZER, many.text_prefix, many.label_prefix)
    prefix = template.demonstrations(arrange(select(TRAIN, 6, 0), "random", 0))
    for sample in sorted(many.run(model, TOKENIZER), key=lambda sample: sample.index):
        scores = {}
        for label in CLASSES:
            ids = torch.tensor([[*prefix, *template.query(sample.text), *template.answer(label)]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            begin = ids.shape[1] - len(template.answer(label))
            scores[label] = sum(float(logits[at - 1, ids[0, at]]) for at in range(begin, ids.shape[1]))
        assert sample.predicted == max(scores, key=scores.__getitem__)
        assert sample.log_likelihood == pytest.approx(scores[sample.predicted], abs=1e-4)


def test_ranks_and_resumed_runs_give_the_same() -> None:
    many = task(orders=2)
    whole = many.run(tiny_model(), TOKENIZER)
    parts = [many.run(tiny_model(), TOKENIZER, part=(rank, 2)) for rank in range(2)]
    assert many.summarise(sample for part in parts for sample in part) == many.summarise(whole)
    model = Classifier(kind_of)
    again = many.run(model, TOKENIZER, done=[sample for sample in whole if sample.index != 40])
    assert sorted(sample.index for sample in again) == list(range(48))
    assert next(sample for sample in again if sample.index == 40).predicted == kind_of([], TEST[40 % 12].text)


def test_a_prompt_that_is_too_long_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(Classifier(kind_of), max_tokens=200)
    assert "9 demonstrations have" in caplog.text and "beyond max_tokens (200): left out" in caplog.text
    assert [shot.shots for shot in result.by_shots] == [3] and result.complete


def test_an_order_that_the_time_cut_is_left_out() -> None:
    many = task(shots=[3])
    samples = many.run(Classifier(kind_of), TOKENIZER)
    result = many.summarise(samples[:-1])
    assert not result.complete and math.isnan(result.metrics()["accuracy"]) and result.row()["accuracy"] == "-"
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["accuracy"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": [19]}, "19 demonstrations cannot be drawn: there are 18"),
        ({"order": "sorted"}, "order of task 'toy' must be one of random, alternating, got 'sorted'"),
        ({"test": []}, "needs test examples"),
        ({"test": [LabelledText("x", "dog")]}, "'dog' is a label of the test but of no demonstration"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**changes)
