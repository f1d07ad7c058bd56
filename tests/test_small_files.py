"""The small files of a run, whole and damaged."""

from pathlib import Path

import pytest

from difftune.small_files import read_json_mapping, read_whole_lines, read_yaml_mapping


def test_whole_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"x": [1]}')
    assert read_json_mapping(tmp_path / "a") == read_yaml_mapping(tmp_path / "a") == {"x": [1]}


@pytest.mark.parametrize("read", [read_json_mapping, read_yaml_mapping])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 10**4, b"!!python/name:os.system"])
def test_damaged_files_are_named_with_a_remedy(tmp_path: Path, read, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=r"/a (is damaged|must hold a mapping).*put a copy in its place"):
        read(tmp_path / "a")


def test_torn_lines_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_whole_lines(path) == []
    path.write_bytes(b'{"a": 1}\n\x00\x00\n{"a":\n[1]\n{"a": 2}\n{"a": 3}')
    assert read_whole_lines(path) == [{"a": 1}, {"a": 2}]
