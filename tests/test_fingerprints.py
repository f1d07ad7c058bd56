import os
from pathlib import Path
from types import SimpleNamespace

from difftune.fingerprints import path_hash, value_hash
from tests.evaluation.toy_task import Square


def test_a_folder_is_known_by_its_content_wherever_it_lies_and_whenever_it_was_written(tmp_path: Path) -> None:
    for name in ("a", "moved"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "one.txt").write_text("1")
        (tmp_path / name / "sub" / "two.txt").write_text("2")
    os.utime(tmp_path / "moved" / "one.txt", (0, 0))
    assert path_hash(tmp_path / "a") == path_hash(tmp_path / "moved")
    (tmp_path / "moved" / ".cache").write_text("hidden")
    assert path_hash(tmp_path / "a") == path_hash(tmp_path / "moved")
    stat = (tmp_path / "moved" / "one.txt").stat()
    (tmp_path / "moved" / "one.txt").write_text("3")
    os.utime(tmp_path / "moved" / "one.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path_hash(tmp_path / "a") != path_hash(tmp_path / "moved"), "the same size and time"
    assert path_hash(tmp_path / "a" / "one.txt") != path_hash(tmp_path / "a" / "sub" / "two.txt")


def test_values_are_hashed_by_what_they_hold() -> None:
    value = {"a": [1, 2.5, None], "b": (Square(1, 1), SimpleNamespace(x="y"), Path("p")), "c": {3, 1}}
    same = {"c": {1, 3}, "b": [Square(1, 1), SimpleNamespace(x="y"), "p"], "a": (1, 2.5, None)}
    assert value_hash(value) == value_hash(same)
    assert value_hash(value) != value_hash({**value, "b": (Square(1, 2), SimpleNamespace(x="y"), Path("p"))})
    assert value_hash(value) != value_hash({**value, "b": (Square(1, 1), SimpleNamespace(x="z"), Path("p"))})
    assert value_hash(object()) == value_hash(object()), "no address of anything"
