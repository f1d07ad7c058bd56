from types import SimpleNamespace

import pytest

from benchmarks import convert


def test_a_small_conversion_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    reports = []

    def run_child(module, arguments, threads, timeout_s):
        assert module == "benchmarks.convert"
        convert.main(arguments)
        return reports[-1]

    monkeypatch.setattr(convert, "run_child", run_child)
    monkeypatch.setattr(convert, "report", lambda **values: reports.append(values))
    convert.main(["--layers", "1", "2", "--hidden-size", "128", "--shard-gb", "0.002", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert len(reports) == 2 and all(0 <= r["difference"] < 1e-5 and r["total_gb"] > 0 for r in reports)
    assert all(r["total_gb"] >= r["writing_gb"] and r["total_gb"] >= r["comparing_gb"] for r in reports)
    assert "| 1 " in printed and "| 2 " in printed
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda folder: SimpleNamespace(free=20e9))
    with pytest.raises(SystemExit, match=r"has 20\.0 GB free, needed are 29\.\d: a source of 13\.5, a result of 14\.6"):
        convert.main(["--layers", "32", "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())
