"""A command that is refused leaves no files."""

from pathlib import Path

import pytest

from difftune.config import load_config
from difftune.left_behind import nothing_left_if_refused

KEEP = "checkpoints/*/step-*"


def refuse() -> None:
    """An error of the user's input."""
    load_config(None, ["seed=-1"])


def work(folder: Path) -> None:
    """What a run writes before it trains."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "link").symlink_to(folder / "tokenizer")


def test_a_new_folder_goes_with_those_above_it_that_were_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed"), nothing_left_if_refused(tmp_path / "runs" / "a", KEEP):
        work(tmp_path / "runs" / "a")
        refuse()
    assert list(tmp_path.iterdir()) == []


def test_of_a_folder_that_was_there_only_the_new_files_go(tmp_path: Path) -> None:
    mine = tmp_path / "run" / "cache" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match="seed"), nothing_left_if_refused(tmp_path / "run", KEEP):
        work(tmp_path / "run")
        (tmp_path / "run" / "cache" / "new").write_text("x")
        refuse()
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == ["cache", "mine.txt"]
    assert mine.read_text() == "mine"


def test_what_was_written_anew_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("old")
    with pytest.raises(ValueError, match="seed"), nothing_left_if_refused(tmp_path, KEEP, restore=["config.yaml"]):
        (tmp_path / "config.yaml").write_text("new")
        refuse()
    assert (tmp_path / "config.yaml").read_text() == "old"


def test_training_that_was_done_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed"), nothing_left_if_refused(tmp_path / "run", KEEP):
        work(tmp_path / "run")
        (tmp_path / "run" / "checkpoints" / "main" / "step-1").mkdir(parents=True)
        refuse()
    assert (tmp_path / "run" / "tokenizer" / "vocab.json").is_file()


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_other_ends_leave_what_there_is_to_be_looked_at(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), nothing_left_if_refused(tmp_path / "run", KEEP):
        work(tmp_path / "run")
        raise error
    assert (tmp_path / "run" / "tokenizer").is_dir()
