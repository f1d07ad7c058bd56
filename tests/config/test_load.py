"""Strictness: every unknown key and wrong value is refused, with its place and what would be right."""

from pathlib import Path

import pytest

from difftune.config.load import build_config


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    config, found = build_config(path, overrides)
    assert (config is None) == bool(found)
    return [problem.replace(f"{path}:", "line ") for problem in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer: {max_stepz: 1}", "line 1: unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
        ("modle: {}", "line 1: unknown key 'modle'; did you mean 'model'?"),
        ("max_steps: 1", "line 1: unknown key 'max_steps'; did you mean 'trainer.max_steps'?"),
        (
            "data:\n  train:\n    - path: a\n      fromat: x",
            "line 4: unknown key 'data.train.0.fromat'; did you mean 'data.train.0.format'?",
        ),
        (
            "stages:\n  - name: a\n    trainer:\n      max_epoch: 1",
            "line 4: unknown key 'stages.a.trainer.max_epoch'; did you mean 'stages.a.trainer.max_epochs'?",
        ),
        ("stages: [{optimm: {}}]", "line 1: unknown key 'stages.stage0.optimm'; did you mean 'stages.stage0.optim'?"),
        (
            "optim.lr: 1",
            "line 1: unknown key 'optim.lr'; in a file, keys are nested: write 'optim:' and, indented, 'lr:'",
        ),
        ("export: {qqqqq: 1}", "line 1: unknown key 'export.qqqqq'; known here: format, verify"),
        (
            "stages:\n  - model: {hidden_size: 2}",
            "line 2: 'stages.0.model': 'model' is one for all stages; set it at the top level",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest_one(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [expected]


def test_an_unknown_key_of_the_command_line_is_told_once_although_stages_inherit_it(tmp_path: Path) -> None:
    found = problems(tmp_path, "stages: [{}, {}]", "trainer.max_stepz=1")
    assert found == [
        "command line (trainer.max_stepz=...): unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer: {max_steps: ten}", "trainer.max_steps must be an integer, got 'ten'"),
        ("trainer: {max_steps: '10'}", "trainer.max_steps must be an integer, got '10'"),
        ("trainer: {max_steps: 1.5}", "trainer.max_steps must be an integer, got 1.5"),
        ("trainer: {max_steps: true}", "trainer.max_steps must be an integer, got True"),
        ("trainer: {max_steps: null}", "trainer.max_steps must be an integer, got None"),
        ("trainer: {max_epochs: x}", "trainer.max_epochs must be an integer or null, got 'x'"),
        ("trainer: {devices: 1.5}", "trainer.devices must be an integer, text or a list, got 1.5"),
        ("trainer: {devices: [a]}", "trainer.devices.0 must be an integer, got 'a'"),
        ("optim: {lr: x}", "optim.lr must be a number, got 'x'"),
        ("data: {packing: yes}", "data.packing must be true or false, got 'yes'"),
        ("data: {packing: 1}", "data.packing must be true or false, got 1"),
        ("run_dir: 7", "run_dir must be text, got 7"),
        ("optim: 3", "optim must be a mapping of keys, got 3"),
        ("optim: null", "optim must be a mapping, got None"),
        ("export: [a]", "export must be a mapping of keys, got ['a']"),
        ("data: {train: a.jsonl}", "data.train must be a list, got 'a.jsonl'"),
        ("data: {train: [a.jsonl]}", "data.train.0 must be a mapping of keys, got 'a.jsonl'"),
        ("data: {train: [{limit: 3}]}", "data.train.0.path is missing and has no default"),
        ("model: {rope_parameters: x}", "model.rope_parameters must be a mapping or null, got 'x'"),
        ("stages: {name: a}", "stages must be a list of mappings, one for each stage"),
        ("stages: [a]", "stages must be a list of mappings, one for each stage"),
        ("model: {path: '???'}", "model.path has to be given; add model.path=VALUE to the command"),
    ],
)
def test_a_wrong_type_is_told_with_the_value_and_what_is_expected(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [f"line 1: {expected}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lr: 0}", "optim.lr must be greater than 0, got 0.0"),
        ("optim: {lr: .nan}", "optim.lr must be greater than 0, got nan"),
        ("optim: {betas: [0.9]}", "optim.betas must have 2 items, got [0.9]"),
        ("optim: {betas: [0.9, 1.5]}", "optim.betas.1 must be between 0 and 1, got 1.5"),
        ("data: {seq_len: 1}", "data.seq_len must be at least 2, got 1"),
        ("evaluation: {every_fraction: 2}", "evaluation.every_fraction must be greater than 0 and at most 1, got 2.0"),
        (
            "data: {overlong: cut}",
            "data.overlong must be one of drop, truncate, raise, got 'cut'",
        ),
        (
            "model: {attention: diff_v3}",
            "model.attention must be one of diff_v1, diff_v2, softmax, got 'diff_v3'; did you mean 'diff_v2'?",
        ),
        (
            "logging: {loggers: [jsonl, tensorbord]}",
            "logging.loggers.1 must be one of jsonl, tensorboard, wandb, mlflow, got 'tensorbord'; "
            "did you mean 'tensorboard'?",
        ),
    ],
)
def test_a_value_out_of_range_is_told_with_the_range(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [f"line 1: {expected}"]


def test_interpolations_that_lead_nowhere_are_all_told_beside_the_other_problems(tmp_path: Path) -> None:
    text = "seed: ${sead}\noptim:\n  lr: ${optim.learning_rate}\n  eps: x\n"
    assert problems(tmp_path, text) == [
        "line 1: seed: cannot resolve '${sead}': Interpolation key 'sead' not found",
        "line 3: optim.lr: cannot resolve '${optim.learning_rate}': Interpolation key 'optim.learning_rate' not found",
        "line 4: optim.eps must be a number, got 'x'",
    ]


def test_interpolations_in_a_circle_are_told_once(tmp_path: Path) -> None:
    assert problems(tmp_path, "seed: ${optim.lr}\noptim:\n  lr: ${seed}\n") == [
        "line 1: seed: cannot resolve '${optim.lr}': Recursive interpolation detected"
    ]


def test_an_environment_variable_without_value_or_default_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFFTUNE_TEST_NOWHERE", raising=False)
    (problem,) = problems(tmp_path, "run_dir: ${oc.env:DIFFTUNE_TEST_NOWHERE}")
    assert "line 1: run_dir: cannot resolve" in problem and "DIFFTUNE_TEST_NOWHERE' not found" in problem


def test_an_environment_variable_of_the_wrong_type_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFTUNE_TEST_LENGTH", "long")
    assert problems(tmp_path, "data: {seq_len: '${oc.env:DIFFTUNE_TEST_LENGTH}'}") == [
        "line 1: data.seq_len must be an integer, got 'long'"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.c.seed=1", r"'stages' has no item 'c': it has 2 \(a, b\), counted from 0"),
        ("stages.2.seed=1", "'stages' has no item '2'"),
        ("stages.a={seed: 1}", r"name a key of the stage, as in stages\.a\.optim\.lr=1e-4"),
        ("data.train.0.path=x", r"'data.train' has no item '0': it has 0"),
    ],
)
def test_an_override_that_reaches_nothing_is_an_error(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problems(tmp_path, "stages: [{name: a}, {name: b}]", override)


def test_a_stage_override_needs_stages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the recipe has no stages; leave out 'stages\.a\.'"):
        problems(tmp_path, "seed: 1", "stages.a.seed=1")


def test_an_item_override_applies_where_the_item_is(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages: [{data: {train: [{path: a}, {path: b}]}}, {data: {train: [{path: c}]}}]")
    config, _ = build_config(path, ["data.train.1.limit=3"])
    assert config is not None
    assert [[source.limit for source in stage.data.train] for stage in config.stages] == [[None, 3], [None]]
