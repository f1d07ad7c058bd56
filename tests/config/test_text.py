"""Configs as text: what is printed loads again, and the reference is current."""

from pathlib import Path

import pytest

from difftune.config import load_config
from difftune.config.text import documented_keys, key_list, reference_markdown, to_yaml
from tests.conftest import ROOT

ENOUGH = ["tokenizer=digits", "data.train=[{path: synthetic:arithmetic, options: {level: 2}}]", "trainer.max_steps=10"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["export={}", "optim.lr=3e-7", "trainer.devices=[0, 1]", "trainer.max_time=01:00:00:00"],
        ["model.rope_parameters={rope_type: default, rope_theta: 640000.0}"],
        ["stages=[{name: a, optim: {lr: 0.5}}, {name: b, data: {train: [{path: b.jsonl, limit: 3}]}}]"],
        ["run_dir='a ${b} c: \"d\"'", "logging.project='null'"],
    ],
)
def test_the_printed_config_loads_to_an_equal_one(tmp_path: Path, overrides: list[str]) -> None:
    escaped = [text.replace("${b}", r"\${b}") for text in overrides]
    config = load_config(None, [*ENOUGH, *escaped])
    printed = tmp_path / "config.yaml"
    printed.write_text(to_yaml(config))
    assert load_config(printed) == config
    assert load_config(printed, ["trainer.max_steps=3"]).resolved_stages()[-1].trainer.max_steps == 3


def test_a_printed_stage_shows_only_what_differs() -> None:
    config = load_config(None, [*ENOUGH, "stages=[{name: a, optim: {lr: 0.5}}]"])
    assert to_yaml(config).endswith("stages:\n- name: a\n  optim:\n    lr: 0.5\n")


def test_every_key_is_documented() -> None:
    keys = documented_keys()
    assert len(keys) > 80
    assert not [key.path for key in keys if len(key.meaning) < 10]
    assert {"data.train[].path", "evaluation.tasks[].limit", "trainer.max_steps"} <= {key.path for key in keys}


def test_the_key_list_shows_kind_default_and_range() -> None:
    lines = key_list().splitlines()
    at = lines.index("optim.lr (a number, default 0.0001)")
    assert lines[at + 1] == "    Peak learning rate. Range: greater than 0."
    assert "data.train[].path (text, required)" in lines


def test_the_reference_in_the_docs_is_current() -> None:
    text = (ROOT / "docs" / "reference" / "config.md").read_text()
    assert text == reference_markdown(), "docs/reference/config.md is not current; run `make docs`"


def test_sections_that_may_be_null_show_their_keys() -> None:
    assert "| `adapter.rank` |" in reference_markdown() and "| `export.format` |" in reference_markdown()
