import json

import pytest

from benchmarks import gpu


def test_the_command_runs_every_part_and_writes_one_file(tmp_path, capsys):
    assert gpu.main(["--toy", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("toy-*.json")
    found = json.loads(file.read_text())
    assert {"device", "torch", "commit"} <= set(found["environment"])
    assert [(name, part["code"]) for name, part in found["parts"].items()] == [
        ("tests", 0),
        ("attention", 0),
        ("step", 0),
    ]
    assert {result["pass"] for result in found["parts"]["attention"]["found"]["results"]} == {
        "fwd",
        "fwd+bwd",
        "decode",
    }
    assert len(found["parts"]["step"]["found"]["results"]) >= 3
    assert "DiffLlama" in capsys.readouterr().out


def test_speed_is_not_measured_while_a_test_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TOY_TESTS", ["-c", "print('1 failed'); raise SystemExit(1)"])
    assert gpu.main(["--toy", "--out", str(tmp_path)]) == 1
    (file,) = tmp_path.glob("*.json")
    parts = json.loads(file.read_text())["parts"]
    assert parts["tests"]["last_lines"] == ["1 failed"]
    assert parts["attention"] == parts["step"] == {"skipped": "a test fails: no speed of a wrong result"}


def test_without_time_all_is_skipped_and_said(tmp_path, capsys):
    assert gpu.main(["--toy", "--out", str(tmp_path), "--budget-s", "5"]) == 0
    assert capsys.readouterr().out.count("skipped, no time left") == 3
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_part_that_hangs_is_stopped():
    code, text = gpu.run_part(["-c", "print('begun', flush=True); import time; time.sleep(3600)"], 5.0, toy=True)
    assert (code, text.strip()) == (gpu.OUT_OF_TIME, "begun")


def test_without_a_gpu_the_trial_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_has_cuda", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here; `--toy` tries the command"):
        gpu.main(["--out", str(tmp_path)])


def test_without_pytest_speed_is_measured_and_the_file_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "_has", lambda package: package != "pytest")
    monkeypatch.setattr(gpu, "run_part", lambda command, timeout_s, toy: (0, "measured"))
    assert gpu.main(["--toy", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    parts = json.loads(file.read_text())["parts"]
    assert parts["tests"] == {
        "skipped": "pytest is not installed; attention is compared with the equation before it is timed"
    }
    assert parts["attention"]["last_lines"] == parts["step"]["last_lines"] == ["measured"]
    assert "tests: skipped, pytest is not installed" in capsys.readouterr().out


def test_a_python_without_torch_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_has", lambda package: package != "torch")
    with pytest.raises(SystemExit, match=r"has no torch; name one that has: make gpu PYTHON=\.\.\."):
        gpu.main(["--out", str(tmp_path)])
