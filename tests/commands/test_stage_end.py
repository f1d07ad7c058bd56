import logging

import pytest

from difftune.commands.stage_end import end_of, is_finished, require_training
from difftune.config import load_config
from difftune.run_folder import RunFolder
from tests.training.test_checkpoint_io import save, truncate


@pytest.fixture
def stages():
    overrides = ["tokenizer=digits", "stages=[{name: a, trainer: {max_steps: 6}}, {name: b, trainer: {max_steps: 4}}]"]
    return load_config(None, overrides, command="plan").resolved_stages()


@pytest.fixture
def folder(tmp_path, stages):
    folder = RunFolder(tmp_path / "run")
    for step in (4, 6):
        save(folder.checkpoints("a"), step)
    folder.mark_ended("a", 6, end_of(stages[0]))
    return folder


def test_a_stage_is_passed_over_when_its_end_is_there(folder, stages, caplog):
    assert is_finished(folder, stages, 0) and not is_finished(folder, stages, 1) and not caplog.records


def test_a_stage_whose_last_checkpoint_is_damaged_is_finished_again(folder, stages, caplog):
    truncate(folder.checkpoints("a") / "step-00000006")
    with caplog.at_level(logging.WARNING):
        assert not is_finished(folder, stages, 0)
    assert "the last checkpoint of stage a is damaged: the stage is finished again" in caplog.text
    truncate(folder.checkpoints("a") / "step-00000004")
    with pytest.raises(ValueError, match="no usable checkpoint"):
        is_finished(folder, stages, 0)


def test_where_a_later_stage_has_a_checkpoint_it_is_what_counts(folder, stages):
    truncate(folder.checkpoints("a") / "step-00000006")
    save(folder.checkpoints("b"), 2)
    assert is_finished(folder, stages, 0)


@pytest.mark.parametrize(("steps", "skipped"), [(0, 0), (5, 5)])
def test_a_stage_that_learned_nothing_ends_with_1_and_says_why(steps, skipped, caplog):
    with pytest.raises(SystemExit) as ended:
        require_training("a", steps, skipped)
    assert ended.value.code == 1 and f"stage a trained nothing: all of its {steps} steps were skipped" in caplog.text
    require_training("a", 6, 5)
