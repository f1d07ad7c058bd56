import pytest

from benchmarks import generation


def test_a_small_run_prints_speeds_of_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--prompts", "3", "--batch-size", "3", "--new-tokens", "6", "--hidden-size", "64", "--layers", "1"]
    generation.main([*size, "--rounds", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    assert printed.count("| batches ") == printed.count("| one by one ") == 3 and "times one by one" in printed


def test_no_speed_is_printed_where_the_texts_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "without_cache", lambda model, prompts, new: [[9] * new for _ in prompts])
    with pytest.raises(SystemExit, match="write different texts"):
        generation.main(["--prompts", "2", "--new-tokens", "4", "--hidden-size", "64", "--layers", "1"])
    assert "tokens/s" not in capsys.readouterr().out
