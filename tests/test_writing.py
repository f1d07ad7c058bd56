import os
import signal
import subprocess
import sys
import time

import pytest

from difftune.writing import LOCK, foreign_entries, one_writer, write_whole

_HOLD = """
import sys, time
from pathlib import Path
from difftune.writing import one_writer
with one_writer(Path(sys.argv[1]), name="run_dir", what="run", is_ours=lambda: True):
    print("held", flush=True)
    time.sleep(100)
"""


def writer(folder, **options):
    return one_writer(folder, name="run_dir", what="run", **{"is_ours": lambda: False, **options})


@pytest.mark.parametrize("content", ["é\n", b"\x00\xff", ""])
def test_a_file_is_written_whole_with_its_folder(tmp_path, content):
    path = tmp_path / "new" / "file"
    write_whole(path, "old")
    write_whole(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_whole(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_file_and_its_folder_are_flushed_in_that_order(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    write_whole(tmp_path / "file", "x")
    assert len(flushed) == 2 and flushed[0].endswith("-file") and flushed[1] == str(tmp_path)


def test_what_is_behind_a_link_is_written_and_stays_linked(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    write_whole(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == "x"


def test_a_second_process_is_refused_until_the_first_one_dies(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", _HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"run_dir: .* is being written by another"), writer(tmp_path):
            raise AssertionError("both hold it")
        assert (tmp_path / LOCK).exists()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with writer(tmp_path):
        pass


def test_a_process_that_was_forked_does_not_hold_the_folder_after_its_parent(tmp_path):
    code = _HOLD.replace("    time.sleep", "    import os\n    os.fork()\n    time.sleep").replace("100", "20")
    first = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        time.sleep(0.2)
        first.kill()
        first.wait()
        with writer(tmp_path):
            pass
    finally:
        os.killpg(first.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["config.yaml", "thesis.txt", "export/thesis.txt", ".env", "checkpoints/mine"])
def test_a_folder_with_files_of_the_user_is_refused_and_left_as_it_was(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    message = rf"holds files and no run of difftune \({name.split('/')[0]}\)"
    with pytest.raises(ValueError, match=message), writer(tmp_path):
        raise AssertionError("written")
    assert not (tmp_path / LOCK).exists() and (tmp_path / name).read_text() == "mine"


def test_what_a_launcher_or_a_system_leaves_does_not_count(tmp_path):
    for name in ("slurm-1.out", "train.log", ".DS_Store", "cache/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert foreign_entries(tmp_path, ("cache",)) == [] and foreign_entries(tmp_path) == ["cache"]


def test_folders_that_were_made_for_nothing_go_again(tmp_path):
    with writer(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "metrics.jsonl").touch()
    assert (tmp_path / "a" / "b" / "metrics.jsonl").exists()


def test_a_path_that_cannot_be_a_folder_is_named_with_its_key(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir: .*file.*a folder is needed"), writer(tmp_path / "file" / "run"):
        pass
