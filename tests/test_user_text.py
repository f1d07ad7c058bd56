"""Paths and numbers as users write them."""

from pathlib import Path

import pytest

from difftune.user_text import TextError, expand_path, finite_number


def test_the_home_folder_is_replaced_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere/ann")
    assert expand_path("~/run") == str(Path("/somewhere/ann/run"))
    assert expand_path("~") == str(Path("/somewhere/ann"))
    for text in ("run", "owner/name", "synthetic:arithmetic", "a~b", "./~/x", "http://localhost/v1"):
        assert expand_path(text) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (" \t", "is empty"),
        ("a\0b", "NUL"),
        ("a\ud800", "surrogate"),
        ("x/" + "a" * 256, "256"),
        ("\u00e9" * 128, "255 bytes"),
        ("/".join(["a" * 200] * 30), "4096"),
        ("~no-such-user-of-this-machine/x", "~no-such-user-of-this-machine/x"),
    ],
)
def test_what_cannot_be_a_path_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(TextError) as caught:
        expand_path(text)
    assert says in str(caught.value) and len(str(caught.value)) < 300


def test_numbers_are_finite() -> None:
    assert finite_number("-2.5") == -2.5
    for text in ("nan", "inf", "-Infinity", "1e999", "x", "", "1+2j", "1,5"):
        with pytest.raises(TextError, match="must be a"):
            finite_number(text)
