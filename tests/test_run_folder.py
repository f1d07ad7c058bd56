import json

import pytest

from difftune.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open("model: {hidden_size: 8}\ntokenizer: digits\n", may_go_on=True)
    return folder


def begin(folder, stage="main", step=5):
    path = folder.checkpoints(stage) / f"step-{step:08d}"
    path.mkdir(parents=True)
    return path


def test_opening_writes_config_and_environment(folder):
    assert (folder.path / "config.yaml").read_text().startswith("model:")
    assert json.loads((folder.path / "environment.json").read_text())["packages"]["torch"]


def test_a_folder_without_checkpoints_may_be_opened_again_with_another_model(folder):
    folder.open("model: {hidden_size: 16}\n", may_go_on=False)
    assert "16" in (folder.path / "config.yaml").read_text()


def test_a_folder_with_a_run_goes_on_with_the_same_model_only(folder):
    begin(folder)
    folder.open("model: {hidden_size: 8}\ntokenizer: digits\noptim: {lr: 1}\n", may_go_on=True)
    with pytest.raises(ValueError, match="holds a run with tokenizer=digits, this one has tokenizer=bytes"):
        folder.open("model: {hidden_size: 8}\ntokenizer: bytes\n", may_go_on=True)
    with pytest.raises(ValueError, match="holds a run already, and resume is never"):
        folder.open("model: {hidden_size: 8}\ntokenizer: digits\n", may_go_on=False)


def test_a_stage_has_ended_only_for_the_end_it_was_given(folder):
    assert not folder.has_ended("main", {"max_steps": 5})
    folder.mark_ended("main", 5, {"max_steps": 5})
    assert folder.has_ended("main", {"max_steps": 5}) and not folder.has_ended("main", {"max_steps": 9})


def test_a_named_checkpoint_counts_for_its_own_stage_and_has_to_be_whole(folder):
    path = begin(folder)
    assert folder.resume_point("other", str(path)) is None
    with pytest.raises(ValueError, match=r"resume=.*step-00000005: .*resume=auto finds the newest whole checkpoint"):
        folder.resume_point("main", str(path))


def test_a_stage_that_ended_without_a_checkpoint_is_an_error(folder):
    with pytest.raises(ValueError, match="has no checkpoint, although stage main has ended"):
        folder.last_checkpoint("main")


def test_the_best_checkpoint_is_what_a_stage_came_to(folder):
    (folder.checkpoints("main") / "best").mkdir(parents=True)
    assert folder.finished_checkpoint("main").name == "best"


def test_an_export_is_replaced_unless_it_holds_anything_else(folder, caplog):
    export = folder.path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    folder.list_export()
    folder.clear_export()
    assert [path.name for path in folder.path.glob("export*")].count("export") == 1 and export.is_dir()
    (export / "thesis.txt").write_text("mine")
    folder.clear_export()
    assert not export.exists() and (folder.path / "export-kept-1" / "thesis.txt").read_text() == "mine"
    assert "such as thesis.txt" in caplog.text
    export.mkdir()
    (export / "config.json").write_text("{1}")
    folder.clear_export()
    assert (folder.path / "export-kept-2" / "config.json").read_text() == "{1}"


def test_a_folder_is_a_run_by_its_environment_alone(folder, tmp_path):
    assert folder.is_run() and not RunFolder(tmp_path).is_run()
    (folder.path / "environment.json").write_text('{"mine": 1}')
    assert not folder.is_run()


@pytest.mark.parametrize("resume", ["nevr", "yes", "Never", "", "/nonexistent/step-1", "LOOP", "OTHER", "STAGE"])
def test_resume_is_a_word_that_is_known_or_a_checkpoint_of_the_run(folder, tmp_path, resume):
    path = begin(folder)
    other = begin(RunFolder(tmp_path / "other"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    given = {"LOOP": str(tmp_path / "loop"), "OTHER": str(other), "STAGE": str(path.parent)}.get(resume, resume)
    with pytest.raises(ValueError, match=r"resume must be auto, never, or a checkpoint of this run .*step-00000005"):
        folder.check_resume(given)
    for known in ("auto", "never", str(path)):
        folder.check_resume(known)
