import logging
from pathlib import Path

import pytest

from difftune.data.files import data_files, kind_of_file, split_of


@pytest.fixture
def folder(tmp_path):
    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        return tmp_path

    return make


def names(folder: Path, split: str) -> list[str]:
    return [str(file.relative_to(folder)) for file in data_files(folder, split)]


@pytest.mark.parametrize(
    ("name", "split"),
    {
        "training.jsonl": "train",
        "trainSet.jsonl": "train",
        "train-00000-of-00002.parquet": "train",
        "testing.jsonl": "test",
        "test2.jsonl": "test",
        "mathsEval.json": "test",
        "evaluation_of_x.jsonl": "test",
        "held_out.jsonl": "test",
        "hold-out.csv": "test",
        "HELDOUT.JSONL": "test",
        "train_test_split_test.jsonl": "test",
        "test/train.jsonl": "test",
        "x.valid.jsonl": "validation",
        "dev.jsonl": "validation",
        "latest.jsonl": None,
        "contest.jsonl": None,
        "devices.jsonl": None,
        "retrieval.jsonl": None,
        "strain.jsonl": None,
        "data.jsonl": None,
    }.items(),
)
def test_whole_words_say_the_split(name, split):
    assert split_of(Path(name)) == split


def test_what_is_held_out_is_never_trained_on_and_named(folder, caplog):
    path = folder("a.jsonl", "a_test.jsonl", "dev/b.jsonl", "notes.txt", "old.zip", "other/c.jsonl")
    folder("README.md", "dataset_info.json", ".hidden.jsonl", "LICENSE")
    with caplog.at_level(logging.WARNING):
        assert names(path, "train") == ["a.jsonl"]
        assert names(path, "train") == ["a.jsonl"]
    assert len(caplog.messages) == 2
    assert "no data files, or others by a second name: notes.txt, old.zip, other/" in caplog.text
    assert "not of the split train: a_test.jsonl, dev/b.jsonl" in caplog.text
    assert names(path, "test") == ["a_test.jsonl"]
    assert names(path, "validation") == names(path, "dev") == ["dev/b.jsonl"]


def test_a_marked_train_file_leaves_out_the_unmarked(folder):
    path = folder("data/train-0.parquet", "data/test-0.parquet", "extra.jsonl")
    assert names(path, "train") == ["data/train-0.parquet"]
    with pytest.raises(ValueError, match="no file of the split 'validation': found data/test-0"):
        data_files(path, "validation")


def test_only_held_out_files_are_no_training_data(folder):
    with pytest.raises(ValueError, match=r"no file of the split 'train': found eval\.jsonl"):
        data_files(folder("eval.jsonl"), "train")


def test_files_without_a_word_are_of_every_split(folder):
    path = folder("b.JSONL", "a.ndjson", "c.csv.gz")
    assert names(path, "test") == names(path, "train") == ["a.ndjson", "b.JSONL", "c.csv.gz"]


def test_a_folder_of_unread_files_names_them(folder):
    path = folder("a.txt", "b.parquet.gz", "sub/c.jsonl")
    (path / "gone.jsonl").symlink_to(path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no data file .*it holds a.txt, b.parquet.gz, gone.jsonl, sub/"):
        data_files(path, "train")


def test_suffixes_say_the_kind():
    assert kind_of_file(Path("A.JSONL.GZ")) == (".jsonl", "gzip")
    assert kind_of_file(Path("a.b.parquet")) == (".parquet", None)
    assert [kind_of_file(Path(name)) for name in ("a.gz", "a", "a.parquet.zst", "a.tar.gz")] == [None] * 4


def test_a_file_with_two_names_is_read_once(folder, caplog):
    path = folder("b.jsonl")
    (path / "a.jsonl").symlink_to(path / "b.jsonl")
    (path / "loop.jsonl").symlink_to(path / "loop.jsonl")
    assert names(path, "train") == ["a.jsonl"]
    assert "second name: loop.jsonl, b.jsonl" in caplog.text
