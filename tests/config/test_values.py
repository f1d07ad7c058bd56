"""Numbers, texts and paths against the constraints of their field."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from difftune.config import load_config
from difftune.config.field import LARGEST
from difftune.config.recipe import Config
from difftune.config.values import ValueProblem, check_value
from difftune.tasks import KINDS


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"a": [1, {"b": v}]}])
def test_a_number_is_finite_wherever_it_stands(value: float, wrap: typing.Any) -> None:
    with pytest.raises(ValueProblem, match="finite"):
        check_value(wrap(value), {})


def test_a_whole_number_has_a_bound_even_where_its_field_has_none() -> None:
    assert check_value(LARGEST, {}) == LARGEST
    for value, constraints in ((LARGEST + 1, {}), (-LARGEST - 1, {}), (11, {"low": 1, "most": 10})):
        with pytest.raises(ValueProblem, match=f"at most .*got {value}"):
            check_value(value, constraints)


def test_a_path_loses_its_tilde_and_a_text_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert check_value("~/x", {"is_path": True}) == str(Path("/somewhere/x"))
    assert check_value("~/x", {}) == "~/x" and check_value("", {}) == ""
    for text in ("a\0", "\ud83d"):
        with pytest.raises(ValueProblem, match="take it out"):
            check_value({"prefix": text}, {})


def text_fields(target: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[typing.Any]]]:
    for field in dataclasses.fields(target):
        hint = typing.get_type_hints(target)[field.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        inner = next((o for h in (hint, *typing.get_args(hint)) for o in (h,) if dataclasses.is_dataclass(o)), None)
        if inner is not None and not hasattr(inner, "variants") and field.name != "stages":
            yield from text_fields(inner, f"{prefix}{field.name}.")
        elif str in options and "choices" not in field.metadata:
            yield prefix + field.name, field


def test_every_key_with_the_name_of_a_path_is_read_as_one() -> None:
    named = ("path", "_dir", "folder", "teacher", "tokenizer", "resume", "haystack", "nli_model")
    fields = [*text_fields(Config), *(found for kind in KINDS.values() for found in text_fields(kind))]
    keys = [key for key, field in fields if key.endswith(named) and key != "loggers"]
    assert {"run_dir", "model.path", "data.cache_dir", "data.train.path", "tokenizer", "resume"} <= set(keys)
    assert not [key for key, field in fields if key in keys and not field.metadata.get("is_path")]


def test_tilde_reaches_every_path_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["run_dir=~/run", "tokenizer=~/tok", "data.cache_dir=~/cache", "data.train=[{path: ~/rows.jsonl}]"]
    config = load_config(None, [*overrides, "evaluation.tasks=[{path: ~/p.jsonl}]", "trainer.max_steps=1"])
    found = [config.run_dir, config.tokenizer, config.data.cache_dir, config.data.train[0].path]
    assert [*found, config.evaluation.tasks[0].path] == [  # type: ignore[attr-defined]
        str(tmp_path / name) for name in ("run", "tok", "cache", "rows.jsonl", "p.jsonl")
    ]
