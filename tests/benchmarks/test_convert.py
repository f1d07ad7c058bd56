import pytest

from benchmarks import convert


def test_a_small_conversion_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    reports = []

    def run_child(module, arguments, threads):
        assert module == "benchmarks.convert"
        convert.main(arguments)
        return reports[-1]

    monkeypatch.setattr(convert, "run_child", run_child)
    monkeypatch.setattr(convert, "report", lambda **values: reports.append(values))
    convert.main(["--layers", "1", "2", "--hidden-size", "128", "--shard-gb", "0.002", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert len(reports) == 2 and all(0 <= r["difference"] < 1e-5 and r["total_gb"] > 0 for r in reports)
    assert "| 1 " in printed and "| 2 " in printed
    assert not list(tmp_path.iterdir())
