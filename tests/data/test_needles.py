import random
import re
from itertools import islice

import pytest

from difftune.data.needles import draw_needles
from difftune.data.synthetic import generate


def rows(count=20, **options):
    return list(islice(draw_needles(random.Random(0), options), count))


@pytest.mark.parametrize("style", ["prose", "terse"])
def test_the_answer_stands_in_the_context_beside_its_key_and_once(style):
    for row in rows(style=style, needles=5, digits=4):
        assert row["context"].count(row["needle"]) == 1 and row["needle"].endswith((row["value"], row["value"] + "."))
        assert row["answer"] == row["lead"] + row["value"] and row["question"] == f"{row['context']}\n{row['query']}"
        key = re.search(r"of (\w+)\?", row["query"])[1] if style == "prose" else row["query"]
        assert key in row["needle"]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("style", ["prose", "terse"])
def test_the_first_answer_stands_at_its_depth(style, depth):
    for row in rows(style=style, depth=depth, needles=6, filler=40):
        before, _, after = row["context"].partition(row["needle"])
        assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.25)
        if depth in (0.0, 1.0):
            assert not (after if depth else before).strip()


def test_as_many_facts_and_queries_as_asked_for():
    for row in rows(needles=6, queries=3):
        assert row["context"].count("special magic number") == 6 and row["answer"].count(",") == 2
        for value in row["answer"].split(","):
            assert value in row["context"]
    assert {row["answer"].count(",") for row in rows(needles=6, queries=[1, 3])} == {0, 1, 2}


def test_as_a_source_train_and_test_differ_and_draws_repeat():
    train = list(generate("needles", "train", {"count": 50, "style": "terse"}))
    test = list(generate("needles", "test", {"count": 50, "style": "terse"}))
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    assert train == list(generate("needles", "train", {"count": 50, "style": "terse"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hay": 3}, "unknown options"),
        ({"style": "verse"}, "prose or terse"),
        ({"needles": 0}, "needles of synthetic:needles must be a whole number, 1 to 48"),
        ({"style": "terse", "needles": 27}, "1 to 26"),
        ({"digits": 1, "needles": 10}, "not 10 different numbers"),
        ({"queries": 5}, "from 1 to needles"),
        ({"queries": [3, 2]}, "fewest, most"),
        ({"depth": 25}, "0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message) if "[" not in message else message):
        rows(**options)
