import pytest

from difftune.evaluation.answer_forms import (
    as_latex,
    choice_of,
    clock_time,
    is_words,
    math_form,
    scaled,
    short_form,
    split_unit,
    words_of,
)
from difftune.evaluation.answers import Answer, normalise


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (Answer("x+1", "boxed"), r"\boxed{x+1}"),
        (Answer("yes", "boxed"), r"\boxed{\text{yes}}"),
        (Answer("no", "boxed"), r"\boxed{no}"),
        (Answer("18 dollars", "hash"), r"\boxed{18}"),
        (Answer("18 apples", "hash"), r"\boxed{18\text{ apples}}"),
        (Answer("5 million", "hash"), r"\boxed{5 \cdot 1000000}"),
        (Answer("2 and 3", "boxed"), r"\boxed{2, 3}"),
        (Answer("$5$ apples", "boxed"), "$5$ apples"),
        (Answer("5 apples, since 7-2=5", "phrase"), "The final answer is 5 apples, since 7-2=5"),
        (Answer(r"\sin x + \log y", "phrase"), r"\boxed{\sin x + \log y}"),
        (Answer("a\nb 5.", "tail"), "a\nb 5"),
    ],
)
def test_the_form_for_math_verify(answer: Answer, form: str) -> None:
    assert math_form(normalise(answer.text), answer.rule) == form


def test_words_are_told_from_formulas() -> None:
    assert is_words("Silver Spring") and is_words("They are equal")
    assert not is_words("x+y") and not is_words("3 apples") and not is_words(r"\sin x") and not is_words("log x")


@pytest.mark.parametrize(
    ("code", "latex"),
    [
        ("2*sqrt(x+1)", r"2\cdot \sqrt{x+1}"),
        ("x**(n+1)", "x^{n+1}"),
        ("pi/4", r"\pi /4"),
        ("exp(-x)", "e^{-x}"),
        (r"\sqrt{2}\pi", r"\sqrt{2}\pi"),
        ("sqrt(", "sqrt("),
        ("~3", "3"),
        ("3 to 4", "3:4"),
        ("]2, 5[", "(2, 5)"),
        ("1, 2 and 3", "1, 2, 3"),
    ],
)
def test_code_and_lists_are_written_as_latex(code: str, latex: str) -> None:
    assert as_latex(code) == latex


@pytest.mark.parametrize(
    ("answer", "value"),
    [("9 cm", "9"), ("9km/h", "9"), (r"9\text{ m}^2", "9"), ("9x", "9x"), ("9m", "9m"), (r"9\text{ million}", None)],
)
def test_a_unit_is_told_from_a_factor(answer: str, value: str | None) -> None:
    assert split_unit(answer)[0] == (answer if value is None else value)


def test_what_is_beside_the_number_is_understood() -> None:
    assert scaled("2.5 million") == r"2.5 \cdot 1000000" and scaled("2.5 apples") == "2.5 apples"
    assert clock_time("04:05 P.M.") == clock_time("4:05pm") == "4:05pm" and clock_time("4:05") is None
    assert short_form("Yes, it is") == "Yes" and short_form("twelve (12)") == "12" and short_form("f(2)") == "f(2)"
    assert words_of(r"\text{Blue Whale}") == words_of("blue whale") and words_of("x+y") is None


@pytest.mark.parametrize(
    ("answer", "letter", "rest"),
    [("(B)", "B", ""), ("B) 5", "B", "5"), ("option B", "B", ""), (r"\textbf{(B)}\ 5", "B", "5"), ("B", "B", "")],
)
def test_a_choice_has_a_letter_and_a_text(answer: str, letter: str, rest: str) -> None:
    choice = choice_of(answer)
    assert choice is not None and (choice.letter, choice.rest) == (letter, rest)


@pytest.mark.parametrize("answer", ["Bob", "BC", "b", "B = 3", "Z", "", "B + 1"])
def test_other_answers_are_no_choice(answer: str) -> None:
    assert choice_of(answer) is None
