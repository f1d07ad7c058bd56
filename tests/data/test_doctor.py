r"""Every planted fault in rows with the columns of open-r1/OpenThoughts-114k-math (and a clean set for comparison)."""

import pytest

from difftune.data.contamination import ProblemIndex
from difftune.data.doctor import examine, refuse_faults
from difftune.data.sources import Source

PROMPT = r"Return your final response within \boxed{}. "
OPENTHOUGHTS = (
    "<|begin_of_thought|>\n\n{thought}\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\n{solution}\n\n<|end_of_solution|>"
)
TEST_PROBLEM = "A train leaves at noon and travels 60 miles an hour for 3 hours. How many miles does it travel in all?"


def make_row(n, **changes):
    question = f"Ann has {n} pens and buys {2 * n} more of them at the shop. How many does she have?"
    thought, solution = f"Start from {n}. Add {2 * n}, that makes {3 * n}.", rf"She has $\boxed{{{3 * n}}}$ pens."
    return {
        "source": "cn_k12",
        "problem": question,
        "solution": rf"We have ${n}+{2 * n}=\boxed{{{3 * n}}}$.",
        "messages": [
            {"content": PROMPT + question, "role": "user"},
            {"content": rf"We have ${n}+{2 * n}=\boxed{{{3 * n}}}$.", "role": "assistant"},
        ],
        "system": "Your role as an assistant involves thoroughly exploring questions",
        "conversations": [
            {"from": "user", "value": PROMPT + question},
            {"from": "assistant", "value": OPENTHOUGHTS.format(thought=thought, solution=solution)},
        ],
        "generated_token_count": 40 + n,
        "correct": True,
        **changes,
    }


def conversation(n, answer):
    return [{"from": "user", "value": f"Question number {n}?"}, {"from": "assistant", "value": answer}]


def as_messages(n, answer):
    return {
        "messages": [{"role": "user", "content": f"Question number {n}?"}, {"role": "assistant", "content": answer}]
    }


@pytest.fixture
def look(write_jsonl):
    def examined(rows, format="auto", problems=None, **options):
        return examine(Source(write_jsonl(rows), format=format), ProblemIndex(problems or {}), **options)

    return examined


def kinds(report, is_error=None):
    return {f.kind for f in report.findings() if is_error is None or f.is_error == is_error}


def test_a_sound_set_has_no_finding_and_says_what_it_learns(look):
    report = look([make_row(n) for n in range(1, 50)])
    assert report.findings() == [] and report.kept == 49
    refuse_faults([report])
    assert dict(report.delimiters) == {"<think>": 49}
    shown = report.text()
    assert "openthoughts (by its columns conversations, correct|problem)" in shown and "the R1 trace" in shown
    assert "<think> Start from 1. Add 2, that makes 3. </think>" in shown


@pytest.mark.parametrize("wrong", ["numina", "messages"])
def test_the_reference_solution_where_the_trace_is_meant_is_refused(wrong, look):
    report = look([make_row(n) for n in range(1, 50)], wrong)
    assert "wrong_column" in kinds(report, is_error=True)
    with pytest.raises(
        ValueError, match=r"49 of 49 learned answers have no reasoning trace.*\(conversations\).*set form"
    ):
        refuse_faults([report])


def test_a_copy_that_lost_the_conversations_is_refused(look):
    """What is left counts R1's tokens, and the answer is NuminaMath's."""
    rows = [{k: v for k, v in make_row(n).items() if k not in ("conversations", "system")} for n in range(1, 50)]
    report = look(rows, "numina")
    assert "wrong_column" in kinds(report, is_error=True) and report.trace_elsewhere == {"generated_token_count": 49}


def test_numinamath_itself_is_no_fault(look):
    rows = [{k: make_row(n)[k] for k in ("source", "problem", "solution", "messages")} for n in range(1, 9)]
    assert look(rows).findings() == []


def test_answers_that_the_data_call_wrong_are_dropped_or_refused(look):
    rows = [make_row(n, correct=n % 3 != 0) for n in range(1, 50)]
    dropped = look(rows)
    assert dropped.dropped == {"answer not verified as correct": 16} and dropped.findings() == []
    traces = [{**as_messages(n, f"<think>\n{n}\n</think>\n\n{n}"), "correct": n % 3 != 0} for n in range(1, 50)]
    report = look(traces, "messages")
    assert report.known_wrong == 16 and kinds(report, is_error=True) == {"known_wrong"}


def test_delimiters_are_brought_to_one_form_or_refused(look):
    thought, solution = "Start from 1.", "So 3."
    answers = [
        OPENTHOUGHTS.format(thought=thought, solution=solution),
        f"<think>\n{thought}\n</think>\n\n{solution}",
        f"{thought}\n</think>\n\n{solution}",
    ]
    normalised = look([make_row(n, conversations=conversation(n, answers[n % 3])) for n in range(1, 31)])
    assert dict(normalised.delimiters) == {"<think>": 30} and normalised.findings() == []
    raw = look([as_messages(n, answers[n % 3]) for n in range(1, 31)])
    assert kinds(raw, is_error=True) == {"mixed_delimiters"}
    with pytest.raises(ValueError, match="traces are delimited in 3 ways"):
        refuse_faults([raw])


@pytest.mark.parametrize("cut", ["<think>\nStart from 1. Then", "<think>\nStart from 1.\n</think>\n\n"])
def test_traces_that_were_cut_are_dropped_or_refused(cut, look):
    whole = "<think>\nStart from 1.\n</think>\n\nSo 3."
    dropped = look([make_row(n, conversations=conversation(n, cut if n % 5 == 0 else whole)) for n in range(1, 51)])
    assert dropped.dropped == {"no complete reasoning trace": 10} and kinds(dropped) == {"incomplete_dropped"}
    learned = look([as_messages(n, cut if n % 5 == 0 else whole) for n in range(1, 51)])
    assert learned.unfinished == 10 and kinds(learned, is_error=True) == {"truncated_traces"}
    few = look([as_messages(n, cut if n == 7 else whole) for n in range(1, 201)])
    assert kinds(few, is_error=False) == {"truncated_traces"}
    refuse_faults([few])


def test_duplicate_rows_are_counted_and_other_answers_to_a_question_are_not(look):
    rows = [make_row(n) for n in range(1, 30)]
    report = look([*rows, *rows[:7]])
    assert report.duplicates == 7 and kinds(report) == {"duplicates"}
    other = make_row(
        3, conversations=[rows[2]["conversations"][0], {"from": "assistant", "value": "<think>a</think>b"}]
    )
    report = look([*rows, other])
    assert (report.duplicates, report.same_question) == (0, 1) and report.findings() == []


def test_problems_of_the_test_sets_are_found(look):
    asked = {"value": PROMPT + TEST_PROBLEM, "from": "user"}
    rows = [make_row(n) for n in range(1, 30)]
    rows[4] = make_row(5, conversations=[asked, rows[4]["conversations"][1]])
    report = look(rows, problems={"gsm8k": [TEST_PROBLEM], "math": ["Find all real x such that x squared is two."]})
    assert dict(report.contaminated) == {"gsm8k": 1} and kinds(report) == {"contamination"}
    assert "1 rows hold a problem of the test set gsm8k" in report.text()


def test_a_limit_looks_at_the_first_rows_only(look):
    report = look([make_row(n) for n in range(1, 50)], limit=10)
    assert report.rows == 10


def test_an_empty_source_is_an_error(look):
    with pytest.raises(ValueError, match="has no row"):
        look([])


def test_a_report_is_plain_values(look):
    import json

    report = look([make_row(n) for n in range(1, 20)], "numina")
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["kind"] == "wrong_column"
