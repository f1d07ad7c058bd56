import ast
import doctest
import re
import sys
from itertools import islice

import pytest

from difftune.data import synthetic

EASY = {"terms": [2, 3], "operands": [1, 20], "count": 3000}


def rows(split: str = "train", **options) -> list[dict]:
    return list(synthetic.generate("arithmetic", split, {**EASY, **options}))


def value_of(expression: str) -> int:
    """Python's own arithmetic: the second opinion."""
    return eval(compile(ast.parse(expression, mode="eval"), "", "eval"))


@pytest.mark.parametrize("level", synthetic.LEVELS)
def test_answers_and_every_step_are_right(level):
    for row in synthetic.generate("arithmetic", "train", {"level": level, "count": 40}):
        assert int(row["answer"]) == value_of(row["question"])
        steps = row["solution"].split("\n")
        assert len(steps) == len(re.findall(r"[-+*]", row["question"]))
        for step in steps:
            left, right = step.rsplit("=", 1)
            assert value_of(left) == int(right)
        assert steps[-1].endswith("=" + row["answer"])


def test_settings_bound_the_problems():
    seen_terms, seen_numbers = set(), set()
    for row in rows():
        numbers = re.findall(r"\d+", row["question"])
        seen_terms.add(len(numbers))
        seen_numbers |= set(map(int, numbers))
    assert seen_terms == {2, 3}
    assert (min(seen_numbers), max(seen_numbers)) == (1, 20)
    assert {op for row in rows(operators="+*") for op in row["question"] if not op.isdigit()} == {"+", "*"}


def test_rows_are_short_and_levels_grow_harder():
    assert max(len(row["question"] + row["solution"]) for row in rows()) <= 32
    mean = [
        sum(len(row["solution"]) for row in synthetic.generate("arithmetic", "train", {"level": n, "count": 50}))
        for n in synthetic.LEVELS
    ]
    assert mean == sorted(mean)


def test_same_seed_same_rows_and_another_seed_others():
    assert rows() == rows()
    assert rows() != rows(seed=1)
    assert rows(count=10) == rows()[:10]


def test_questions_and_ids_are_unique():
    assert len({row["question"] for row in rows()}) == len({row["id"] for row in rows()}) == EASY["count"]


def as_multiset(question: str) -> tuple[int, ...]:
    """A sum as its signed terms, sorted: what is the same problem in another order is equal."""
    return tuple(sorted(map(int, re.findall(r"[+-]?\d+", question))))


def test_train_and_test_share_no_problem_in_any_order_or_with_any_settings():
    train = {as_multiset(row["question"]) for row in rows(count=20_000)}
    test = {as_multiset(row["question"]) for row in rows("test", count=1000)}
    assert not train & test
    assert not train & {as_multiset(row["question"]) for row in rows("test", seed=5, terms=[3, 3], count=1000)}


def test_canonical_form_is_blind_to_order_and_to_nothing_else():
    canonical = synthetic.canonical_chain
    assert canonical([2, 3, 4], ["*", "+"]) == canonical([4, 3, 2], ["+", "*"])
    assert canonical([9, 2, 3], ["-", "*"]) == canonical([9, 3, 2], ["-", "*"])
    different = [([2, 3], "*"), ([2, 3], "+"), ([2, 3], "-"), ([3, 2], "-"), ([2, 3, 1], "+-"), ([2, 3, 1], "-+")]
    assert len({canonical(numbers, list(operators)) for numbers, operators in different}) == len(different)


def test_a_tenth_of_all_problems_is_test():
    drawn = islice(synthetic._arithmetic(synthetic.random.Random(0), (3, 3), (1, 50), "+-"), 5000)
    share = sum(synthetic.split_of(canonical) == "test" for canonical, _ in drawn) / 5000
    assert 0.08 < share < 0.12


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"found only \d+ different train problems.*500 were asked for"):
        rows(terms=[2, 2], operands=[1, 5], count=500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"term": [2, 3]}, r"unknown options \['term'\].*choose from count, seed, level, terms"),
        ({"terms": 3}, r"terms of synthetic:arithmetic must be \[lowest, highest\], got 3"),
        ({"terms": [1, 3]}, "terms of a synthetic source must be a whole number, at least 2, got 1"),
        ({"operands": [20, 1]}, r"operands of synthetic:arithmetic must be \[lowest, highest\], got \[20, 1\]"),
        ({"operators": "/"}, r'operators of synthetic:arithmetic must be some of "\+-\*", got'),
        ({"level": 9}, "level of synthetic:arithmetic must be one of"),
        ({"count": 0}, "count of a synthetic source must be a whole number, at least 1, got 0"),
        ({"count": 2.5}, "got 2.5"),
    ],
)
def test_wrong_settings_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        rows(**options)


def test_unknown_generator_and_split_are_errors():
    with pytest.raises(ValueError, match="unknown generator 'algebra': choose arithmetic, needles or reasoning_gym"):
        synthetic.generate("algebra", "train", {})
    with pytest.raises(ValueError, match="must be one of train, test, got 'validation'"):
        synthetic.generate("arithmetic", "validation", {})


def test_reasoning_gym_task_is_split_and_repeatable():
    pytest.importorskip("reasoning_gym")
    options = {"count": 50, "max_terms": 3}
    train = list(synthetic.generate("reasoning_gym/chain_sum", "train", options))
    test = list(synthetic.generate("reasoning_gym/chain_sum", "test", options))
    assert train == list(synthetic.generate("reasoning_gym/chain_sum", "train", options))
    assert len(train) == len(test) == 50
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    assert all(int(row["answer"]) == value_of(row["question"].split(":")[1].strip(" =")) for row in train)


def test_unknown_reasoning_gym_task_or_setting_is_an_error():
    pytest.importorskip("reasoning_gym")
    for generator, options in (("reasoning_gym/no_such", {}), ("reasoning_gym/chain_sum", {"colour": 1})):
        with pytest.raises(ValueError, match="reasoning_gym task"):
            next(synthetic.generate(generator, "train", options))


def test_missing_reasoning_gym_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        next(synthetic.generate("reasoning_gym/chain_sum", "train", {}))


def test_examples_of_the_docstrings_hold():
    result = doctest.testmod(synthetic)
    assert result.attempted >= 2 and not result.failed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"terms": [2, 10**9]}, "terms of a synthetic source must be at most 1000, got 1000000000"),
        ({"operands": [1, 10**20]}, "operands of a synthetic source must be at most"),
        ({"count": 10**15}, "count of a synthetic source must be at most"),
    ],
)
def test_settings_beyond_any_use_are_refused_before_work_starts(options, says):
    with pytest.raises(ValueError, match=says):
        list(synthetic.generate("arithmetic", "train", options))
