"""Reading YAML with places, base chains, and overrides on trees."""

from pathlib import Path

import pytest

from difftune.config.tree import (
    apply_override,
    make_node,
    merge,
    nearest,
    parse_override,
    parse_value,
    read_recipe,
    read_tree,
)


def tree_of(tmp_path: Path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_tree(path)


def test_every_value_knows_the_line_of_its_key(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "a: 1\n\nb:\n  c:\n    - x\n    - y: 2\n")
    path = tmp_path / "recipe.yaml"
    assert tree.plain() == {"a": 1, "b": {"c": ["x", {"y": 2}]}}
    b = tree.value["b"]
    assert [tree.value["a"].where, b.where, b.value["c"].where] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert b.value["c"].value[1].value["y"].where == f"{path}:6"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1_000", 1000),
        ("-3", -3),
        ("0x10", 16),
        (".5", 0.5),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("007", "007"),
        ("bf16-mixed", "bf16-mixed"),
        ("'5'", "5"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_scalars_are_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "x: &shared {a: 1, b: 2}\ny:\n  <<: *shared\n  b: 3\n")
    assert tree.plain()["y"] == {"a": 1, "b": 3}


def test_an_empty_file_is_an_empty_recipe(tmp_path: Path) -> None:
    assert tree_of(tmp_path, "# nothing\n").plain() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"recipe\.yaml:3: not valid YAML: expected ',' or '\]'"),
        ("a: 1\n  b: 2\n", r"recipe\.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("- a\n- b\n", r"recipe\.yaml:1: a recipe is a mapping of keys, got list"),
        ("a: 1\nb: 2\na: 3\n", r"recipe\.yaml:3: key 'a' stands twice in the same mapping"),
        ("a: !!python/object:os.system x\n", r"not valid YAML: could not determine a constructor"),
    ],
)
def test_a_broken_recipe_is_an_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_of(tmp_path, text)


def test_a_binary_file_is_not_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\x80\x81\xff\x00")
    with pytest.raises(ValueError, match=r"weights\.yaml: not a text file in UTF-8"):
        read_tree(path)


def test_base_recipes_come_lowest_first(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("a: 1\n")
    (tmp_path / "high.yaml").write_text("base: low.yaml\na: 2\n")
    assert [tree.plain() for tree in read_recipe(tmp_path / "high.yaml")] == [{"a": 1}, {"a": 2}]


def test_bases_that_go_in_a_circle_are_shown(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(ValueError, match=r"circle: b\.yaml -> c\.yaml -> b\.yaml$"):
        read_recipe(tmp_path / "a.yaml")


def test_a_base_that_is_missing_or_no_path_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1\nbase: gone.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"a\.yaml:2: base recipe not found: .*gone\.yaml"):
        read_recipe(path)
    path.write_text("base: [x.yaml]\n")
    with pytest.raises(ValueError, match=r"a\.yaml:1: base must be the path of a recipe, got \['x\.yaml'\]"):
        read_recipe(path)


def test_merging_replaces_lists_and_leaves_its_arguments_alone() -> None:
    lower, upper = make_node({"a": {"x": 1, "y": [1, 2]}}, "low"), make_node({"a": {"y": [3]}, "b": None}, "high")
    merged = merge(lower, upper)
    assert merged.plain() == {"a": {"x": 1, "y": [3]}, "b": None}
    merged.value["a"].value["x"].value = 9
    assert lower.plain() == {"a": {"x": 1, "y": [1, 2]}}
    assert merged.value["a"].value["y"].where == "high"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=2", {"a": {"b": 2}, "items": [{"name": "p", "n": 1}, {"n": 2}]}),
        ("a={c: 3}", {"a": {"b": 1, "c": 3}, "items": [{"name": "p", "n": 1}, {"n": 2}]}),
        (
            "new.deep.key=x=y",
            {"a": {"b": 1}, "items": [{"name": "p", "n": 1}, {"n": 2}], "new": {"deep": {"key": "x=y"}}},
        ),
        ("items.1.n=5", {"a": {"b": 1}, "items": [{"name": "p", "n": 1}, {"n": 5}]}),
        ("items.p.n=5", {"a": {"b": 1}, "items": [{"name": "p", "n": 5}, {"n": 2}]}),
        ("items.*.n=5", {"a": {"b": 1}, "items": [{"name": "p", "n": 5}, {"n": 5}]}),
        ("items.0={m: 1}", {"a": {"b": 1}, "items": [{"name": "p", "n": 1, "m": 1}, {"n": 2}]}),
        ("items=[]", {"a": {"b": 1}, "items": []}),
    ],
)
def test_overrides_reach_keys_and_items(override: str, expected: dict) -> None:
    tree = make_node({"a": {"b": 1}, "items": [{"name": "p", "n": 1}, {"n": 2}]}, "file")
    apply_override(tree, parse_override(override))
    assert tree.plain() == expected


def test_an_item_that_is_not_there_is_an_error_that_lists_the_items() -> None:
    tree = make_node({"items": [{"name": "p"}, {"name": "q"}]}, "file")
    for key in ("2", "r"):
        with pytest.raises(LookupError, match=rf"'items' has no item '{key}': it has 2 \(p, q\), counted from 0"):
            apply_override(tree, parse_override(f"items.{key}.n=1"))


def test_a_key_beneath_a_plain_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="'a' is the value 1 and has no key 'b'"):
        apply_override(make_node({"a": 1}, "file"), parse_override("a.b=2"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=3", "expected key=value with a dotted key, got '=3'"),
        ("a..b=3", "expected key=value with a dotted key, got 'a..b=3'"),
        ("a.b=", "'a.b=' has no value; write a.b=null for none"),
        ("a=[1", r"the value of 'a=\[1' is not valid YAML; quote it"),
    ],
)
def test_a_malformed_override_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_override(text)


def test_nearest_offers_only_what_is_near() -> None:
    assert nearest("max_stepz", ["max_steps", "max_epochs"]) == "; did you mean 'max_steps'?"
    assert nearest("zzz", ["max_steps"]) == ""
