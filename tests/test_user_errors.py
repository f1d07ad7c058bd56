"""Which errors are the user's, and what is said of them."""

import errno
import os
from pathlib import Path

import pytest

from difftune.config import load_config
from difftune.user_errors import is_user_error, message_of, naming


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOENT, "spelling"),
        (errno.EISDIR, "a file is needed"),
        (errno.ENOTDIR, "a folder is needed"),
        (errno.EEXIST, "a folder is needed"),
        (errno.EACCES, "rights"),
        (errno.EROFS, "another disk"),
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "quota"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.ELOOP, "links"),
    ],
)
def test_what_a_file_system_refuses_names_the_path_and_a_remedy(number: int, remedy: str) -> None:
    error = OSError(number, os.strerror(number), "my/[bold]path")
    assert is_user_error(error)
    assert "my/[bold]path" in message_of(error) and os.strerror(number) in message_of(error)
    assert remedy in message_of(error)


def test_what_a_program_did_wrong_is_not_the_users() -> None:
    assert not is_user_error(OSError(errno.EBADF, "Bad file descriptor"))
    assert not is_user_error(RuntimeError("x"))
    try:
        int("x")
    except ValueError as error:
        assert not is_user_error(error)
    with pytest.raises(ValueError) as caught:
        load_config(None, ["seed=-1"])
    assert is_user_error(caught.value) and message_of(caught.value) == str(caught.value)


def test_the_key_that_named_a_path_begins_the_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"^run_dir: .*file.* a folder is needed"), naming("run_dir"):
        (tmp_path / "file" / "below").mkdir()
    with pytest.raises(OSError, match="descriptor"), naming("run_dir"):
        os.close(10**6)
