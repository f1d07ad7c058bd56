# ruff: noqa: RUF001
import pytest

from difftune.evaluation.answer_text import (
    plain_digits,
    plain_spaces,
    plain_unicode,
    until_turn_end,
    without_currency,
    without_markdown,
)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("x + 1", "x + 1"),
        ("2½", r"2\frac{1}{2}"),
        ("√(a+b)", r"\sqrt{a+b}"),
        ("∛5", r"\sqrt[3]{5}"),
        ("x¹²y₀", "x^{12}y_{0}"),
        ("eˣ", "e^{x}"),
        ("１２，５", "12,5"),
        ("3\u200b4", "34"),
        ("π", r"\pi "),
        ("共12个", "共 12 个"),
        ("\ud800", "\ud800"),
    ],
)
def test_unicode_is_written_as_latex(text: str, plain: str) -> None:
    assert plain_unicode(text) == plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"10\,000", "10000"),
        ("1'000'000", "1000000"),
        ("10\u00a0000", "10000"),
        ("1.234,5", "1234.5"),
        ("12\u00a0345,5", "12345.5"),
        ("1.234.567", "1234567"),
        ("0{,}5", "0.5"),
        ("1{,}500", "1500"),
        (r"0.1\overline{6}", r"\frac{15}{90}"),
        ("2 3/4", r"2\frac{3}{4}"),
        ("1e-3", r"1\cdot 10^{-3}"),
        # Which may mean something else.
        ("1.234", "1.234"),
        ("3,5", "3,5"),
        (r"1\,00", r"1\,00"),
        ("f'000", "f'000"),
        ("2 4/3", "2 4/3"),
        ("2e", "2e"),
    ],
)
def test_digits_have_one_spelling(text: str, plain: str) -> None:
    assert plain_digits(text) == plain


def test_spaces_are_common_ones() -> None:
    assert plain_spaces("a\u2009b\u00a0c d") == "a b c d"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("**7**", "7"),
        ("7**", "7"),
        ("`x_1`", "x_1"),
        ("__7__", "7"),
        ("## **7** km", "7 km"),
        ("2**3", "2**3"),
        ("a*b*c", "a*b*c"),
        ("x^*", "x^*"),
        ("-7", "-7"),
        ("***", ""),
    ],
)
def test_markdown_is_taken_off(text: str, plain: str) -> None:
    assert without_markdown(text) == plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [("€5", "5"), ("5 €", "5"), ("US$5", "5"), ("-$5", "-5"), ("5 USD", "5"), ("$x$", "$x$"), ("$5$", "$5$")],
)
def test_currency_is_taken_off_an_amount(text: str, plain: str) -> None:
    assert without_currency(text) == plain


@pytest.mark.parametrize(
    ("text", "before"),
    [("5</s>6", "5"), ("</s>6", "6"), ("a<|im_end|>\n<|im_start|>b", "a"), ("a", "a"), ("", "")],
)
def test_a_text_ends_with_its_turn(text: str, before: str) -> None:
    assert until_turn_end(text) == before
