import builtins
import json

import pytest

from difftune.report.data_check import draw_data_check

SOURCE = {"duplicates": 2, "unfinished": 0, "known_wrong": 1, "contaminated": {"gsm8k": 3}}
STAGE = {
    "stage": "traces",
    "seq_len": 50,
    "histogram": {"counts": [3, 1], "edges": [0.0, 40.0, 80.0]},
    "statistics": {"kept": 3, "dropped": {"longer than 50 tokens": 1}},
    "sources": [SOURCE],
}


@pytest.fixture
def check(tmp_path):
    path = tmp_path / "data_check.json"
    path.write_text(json.dumps({"stages": [STAGE, {**STAGE, "stage": "more"}]}))
    return path


def test_a_check_becomes_one_picture(check):
    pytest.importorskip("matplotlib")
    picture = draw_data_check(check)
    assert picture == check.with_suffix(".png") and picture.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_is_no_picture_and_no_error(check, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert draw_data_check(check) is None and not check.with_suffix(".png").exists()
