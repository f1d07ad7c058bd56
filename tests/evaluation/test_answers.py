import time
from decimal import Decimal

import pytest

from difftune.evaluation.answers import Answer, find_answer, normalise, plain_number


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        # Boxes: the last one wins, over every other rule.
        (r"First \boxed{3}. No: \boxed{4}.", "4", "boxed"),
        (r"\boxed{4} #### 5", "4", "boxed"),
        (r"The answer is 5. So \boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\left\{1, \{2\}\right\}}", r"\left\{1, \{2\}\right\}", "boxed"),
        (r"\boxed {7}", "7", "boxed"),
        (r"\fbox{7}", "7", "boxed"),
        (r"\boxed{\boxed{8}}", r"\boxed{8}", "boxed"),
        (r"\boxed{3} and then we get \boxed{", "3", "boxed"),
        (r"\boxed{1} \boxed{}", "1", "boxed"),
        # Boxes that are parts of one answer.
        (r"$\boxed{2}$ and $\boxed{3}$", "2, 3", "boxed"),
        (r"$$\boxed{(3, 3)} \text{ for part (a) and } \boxed{(1, 1)}$$", "(3, 3), (1, 1)", "boxed"),
        (r"\boxed{3}, \boxed{3}", "3", "boxed"),
        (r"\boxed{3} and then \boxed{4}", "4", "boxed"),
        ("\\boxed{3}\n\n\\boxed{4}", "4", "boxed"),
        # GSM8K's mark.
        ("3+4=7\n#### 7", "7", "hash"),
        ("#### 7\nQuestion: how many?", "7", "hash"),
        ("so\n#### $1,234", "$1,234", "hash"),
        ("she buys\n#### surplus", "surplus", "hash"),
        ("#### 5\n#### 6 ####", "6", "hash"),
        ("#### \\begin{array}{l}1\\\\\n2\\end{array}\nBye", "\\begin{array}{l}1\\\\\n2\\end{array}", "hash"),
        ("#### Step 1: add\n3 + 4 = 7, so the answer is 7.", "7", "phrase"),
        # Phrases.
        ("The answer is: 7", "7", "phrase"),
        ("Final answer: $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}", "phrase"),
        ("**Answer:** 3.5", "3.5", "phrase"),
        ("the answer to this question is 9\nDone", "9", "phrase"),
        ("The answer is 5. No. The answer is 6.", "6", "phrase"),
        ("The final answer is\n\n12", "12", "phrase"),
        ("The answer is Mr. Watson.", "Mr. Watson", "phrase"),
        # Nothing but the answer.
        ("42", "42", "whole"),
        (" shortage.\n", "shortage", "whole"),
        ("x = 3", "x = 3", "whole"),
        # Anything else.
        ("12+7=19\n19-15=4", "12+7=19\n19-15=4", "tail"),
        # Thoughts do not count where there is something after them.
        (r"<think>\boxed{1}</think> It is \boxed{2}.", "2", "boxed"),
        (r"<think>\boxed{1}</think>", "1", "boxed"),
        (
            r"<|begin_of_thought|>\boxed{1}<|end_of_thought|> <|begin_of_solution|>the answer is 2<|end_of_solution|>",
            "2",
            "phrase",
        ),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str, rule: str) -> None:
    assert find_answer(text) == Answer(answer, rule)


@pytest.mark.parametrize("text", ["", "  \n\t ", "\u00a0"])
def test_a_blank_text_has_no_answer(text: str) -> None:
    assert find_answer(text) is None


def test_the_tail_begins_at_a_line_and_is_short() -> None:
    text = "\n".join(f"line {n}: {n}+1={n + 1}" for n in range(500))
    found = find_answer(text)
    assert found is not None and found.rule == "tail"
    assert len(found.text) <= 2000 and text.endswith(found.text)
    assert found.text.startswith("line ")


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "\\boxed{1}",
        "\\boxed{1}, ",
        "{",
        "}",
        "#",
        "####",
        "#### a\n",
        "answer ",
        "answer is ",
        "$",
        "**",
        "<think>",
    ],
)
def test_a_looping_model_costs_little(unit: str) -> None:
    text = (unit * 60_000)[:60_000]
    # Of this thread alone, and not of what else the machine does.
    begun = time.thread_time()
    find_answer(text)
    assert time.thread_time() - begun < 2


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" 5 ", "5"),
        ("**5.**", "5"),
        ("$$5$$", "5"),
        (r"\(x^2\).", "x^2"),
        ("$1,234", "1,234"),
        (r"\$5", "5"),
        ("\u2212 3", "- 3"),
        ("+1,000", "1,000"),
        ("1 234 567", "1234567"),
        ("$a$ and $b$", "$a$ and $b$"),
        (r"\left\{x\right.", r"\left\{x\right."),
        ("1, 2, ...", "1, 2, ..."),
        ("", ""),
        ("$$", "$$"),
    ],
)
def test_what_does_not_belong_to_an_answer_is_taken_off(raw: str, clean: str) -> None:
    assert normalise(raw) == clean


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", "7"),
        ("-7", "-7"),
        ("- 3", "-3"),
        ("007", "7"),
        ("1,234,567.5", "1234567.5"),
        (".5", "0.5"),
        ("12,34", None),
        ("0,123", None),
        ("1,2345", None),
        ("1e3", None),
        ("1/2", None),
        ("5%", None),
        ("\u0663", None),
        ("\uff13", None),
        ("", None),
        ("--3", None),
        ("5.", None),
    ],
)
def test_only_unmistakable_numbers_are_plain(text: str, value: str | None) -> None:
    assert plain_number(text) == (None if value is None else Decimal(value))
