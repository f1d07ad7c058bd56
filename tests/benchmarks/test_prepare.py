import pytest

from benchmarks import prepare


def test_every_number_of_processes_has_its_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    prepare.main(["--rows", "40", "--characters", "300", "--rounds", "1", "--vocab-size", "300"])
    lines = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [name.strip() for name, _ in lines[2:5]]
    assert names == ["tokenizer alone, 2 threads", "prepare, 1 process", "prepare, 2 processes"]
    assert all(float(speed.split()[0]) >= 0 for _, speed in lines[2:5])
    assert [rows.strip() for rows, _ in lines[7:]] == ["10", "40"]
    assert all(float(peak) > 10 for _, peak in lines[7:])


def test_a_time_below_the_clock_is_not_a_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(prepare, "cpu_seconds", lambda: 0.0)
    prepare.main(["--rows", "8", "--characters", "300", "--rounds", "1", "--vocab-size", "300"])
    assert capsys.readouterr().out.count("too short to tell") == 3
