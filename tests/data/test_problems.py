import pytest

from difftune.data.problems import load_problems
from tests.conftest import shared_data

SIZES = {
    "asdiv": 2215,
    "carp": 976,
    "college_math": 2818,
    "gsm8k": 1319,
    "math": 5000,
    "mawps": 2065,
    "svamp": 1000,
    "tabmwp": 1000,
}


@pytest.mark.parametrize("name", SIZES)
def test_real_maths_set_is_read_whole(name):
    problems = load_problems(str(shared_data() / "math_eval" / f"{name}.jsonl"))
    assert len(problems) == len({problem.id for problem in problems}) == SIZES[name]
    assert all(problem.question and problem.answer for problem in problems)
    assert problems[0].prompt_messages == [{"role": "user", "content": problems[0].question}]
    assert problems[0].id.startswith(name)


def test_synthetic_problems_are_the_test_half():
    problems = load_problems("synthetic:arithmetic", 50, options={"terms": [2, 2]})
    assert len(problems) == 50
    assert problems[0].id == "arithmetic-test-0"
    assert all("=" not in problem.question for problem in problems)
    left, right = problems[0].question.replace("-", "+-").lstrip("+").split("+")[:2]
    assert int(problems[0].answer) == int(left) + int(right)


def test_limit_takes_a_seeded_subset_in_order(write_jsonl):
    path = write_jsonl([{"question": f"{n}+1", "answer": str(n + 1)} for n in range(100)])
    subset = load_problems(path, 10, seed=1)
    assert [int(problem.id) for problem in subset] == sorted(int(problem.id) for problem in subset)
    assert subset == load_problems(path, 10, seed=1) != load_problems(path, 10, seed=2)
    assert len(load_problems(path, 1000)) == len(load_problems(path)) == 100


def test_row_without_an_answer_is_an_error_that_names_it(write_jsonl):
    path = write_jsonl([{"prompt": "1+1", "completion": "2"}])
    with pytest.raises(ValueError, match="line 1: no final answer to grade against"):
        load_problems(path)


def test_nothing_to_evaluate_on_is_an_error(write_jsonl):
    with pytest.raises(ValueError, match="has no problem to evaluate on"):
        load_problems(write_jsonl([]))
    with pytest.raises(ValueError, match="no such file"):
        load_problems("gone.jsonl")
    with pytest.raises(ValueError, match="limit of problems must be at least 1"):
        load_problems(write_jsonl([{"question": "1", "answer": "1"}]), 0)


def test_gold_answer_of_upstream_gsm8k_is_what_follows_the_mark(write_jsonl):
    path = write_jsonl([{"question": "3 and 4?", "answer": "3+4=<<3+4=7>>7\n#### 7"}])
    assert load_problems(path)[0].answer == "7"


def test_dropped_problems_are_counted_and_nan_is_no_text(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "1+1", "answer": 2}\n{"question": "1+2", "answer": NaN}\n{"question": NaN, "answer": "3"}\n'
        '{"id": NaN, "question": "2+2", "answer": 4.0}\n{"question": "9", "answer": null}\n'
    )
    problems = load_problems(str(path))
    assert [(problem.id, problem.answer) for problem in problems] == [("0", "2"), ("3", "4.0")]
    assert problems.dropped == load_problems(str(path), 1).dropped == {"empty answer": 2, "empty question": 1}
    assert "rows.jsonl: 3 of 5 problems dropped: 2 empty answer, 1 empty question" in caplog.text
    path.write_text('{"question": "1+2", "answer": NaN}\n')
    with pytest.raises(ValueError, match="has no problem to evaluate on: 1 empty answer"):
        load_problems(str(path))


def test_problems_with_other_columns(write_jsonl):
    path = write_jsonl([{"task": "1+1", "gold": "2"}])
    assert load_problems(path, columns={"question": "task", "answer": "gold"})[0].answer == "2"
