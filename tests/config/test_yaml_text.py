"""YAML within bounds: plain values, no circles, no depth that ends Python."""

import time
from pathlib import Path

import pytest

from difftune.config.tree import parse_value
from difftune.config.yaml_text import MAX_DEPTH, MAX_VALUES, read_yaml, read_yaml_file


def value_of(text: str) -> object:
    node = read_yaml(text, "r.yaml")
    return None if node is None else node.plain()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a {x: *a}", "itself"),
        ("a: &a [*a]", "itself"),
        ("a: &a {<<: *a}", "itself"),
        ("a: &a {b: [{<<: *a}]}", "itself"),
        ("a: " + "[" * 5000, "deep"),
        ("a: " + "[" * 5000 + "]" * 5000, "deep"),
        ("a: " + "{b: " * 5000, "deep"),
        ("- " * 5000, "deep"),
        ("a: !!python/object/apply:os.getcwd []", "!!python/object/apply:os.getcwd"),
        ("a: !!set {b}", "!!set"),
        ("a: !!timestamp 2001-01-01", "!!timestamp"),
        ("a: !own 3", "!own"),
        ("a: !!int three", "'three'"),
        ("a: !!bool 3", "'3'"),
        ("a: !!float ' '", "!!float"),
        ("a: " + "9" * 5000, "5000 digits"),
        ("a: 1e" + "9" * 100, "digits"),
        ("a: {[b]: 1}", "key must be a text"),
        ("? {a: 1}\n: 2", "key must be a text"),
        ("~: 1", "key must be a text"),
        ("a: {<<: 3}", "merges a mapping"),
        ("a: {<<: [3]}", "merges a mapping"),
        ("a: 1\n--- \nb: 2", "one document"),
        ("a:\n\tb: 1", "tab"),
        ("a: \x07", "U+0007"),
        ("a: {b: 1, b: 2}", "twice"),
    ],
)
def test_what_no_recipe_holds_is_one_message_with_its_line(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^r\.yaml(:\d+)?: ") as caught:
        read_yaml(text, "r.yaml")
    assert says in str(caught.value) and len(str(caught.value)) < 300


def test_aliases_that_multiply_and_very_many_keys_end_soon() -> None:
    bomb = "a0: &a0 [1]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(12))
    started = time.monotonic()
    for text in (bomb, "a: [" + "1, " * 3 * MAX_VALUES + "1]"):
        with pytest.raises(ValueError, match=f"more than {MAX_VALUES:,} values"):
            read_yaml(text, "r.yaml")
    assert time.monotonic() - started < 60


def test_what_is_within_the_bounds_is_read() -> None:
    deep = value_of("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        assert isinstance(deep, list)
        (deep,) = deep
    assert deep == []
    assert value_of("a: &a {x: 1}\nb: *a\nc: {<<: [*a, {y: 2, x: 3}], z: 4}") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2, "z": 4},
    }
    assert value_of("a: !!str 3\nb: !!int '4'\n1: c") == {"a": "3", "b": 4, "1": "c"}
    assert parse_value("{a: [1e-4, x]}") == {"a": [1e-4, "x"]} and parse_value(" # nothing") is None


def test_a_file_is_a_file_in_utf_8_of_a_sensible_size(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("#" * 2**21)
    (tmp_path / "utf16.yaml").write_bytes("a: 1".encode("utf-16"))
    for path, says in (
        (tmp_path, "not a file"),
        (tmp_path / "large.yaml", "2.0 MiB"),
        (tmp_path / "utf16.yaml", "UTF-8"),
    ):
        with pytest.raises(ValueError, match=says):
            read_yaml_file(path)
    with pytest.raises(FileNotFoundError, match="not found"):
        read_yaml_file(tmp_path / "none.yaml")
