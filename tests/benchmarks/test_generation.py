import pytest

from benchmarks import generation


def test_a_small_run_prints_speeds_of_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--prompts", "3", "--batch-size", "3", "--new-tokens", "6", "--hidden-size", "64", "--layers", "1"]
    assert generation.main([*size, "--rounds", "1", "--threads", "1"]) == 0, "too small to be judged"
    printed = capsys.readouterr().out
    assert printed.count("| batches ") == printed.count("| one by one ") == 3 and "times one by one" in printed


def test_no_speed_is_printed_where_the_texts_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "without_cache", lambda model, prompts, new: [[9] * new for _ in prompts])
    with pytest.raises(SystemExit, match="write different texts"):
        generation.main(["--prompts", "2", "--new-tokens", "4", "--hidden-size", "64", "--layers", "1"])
    assert "tokens/s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("times", "missed"),
    [
        ({"diff_v1": 7.0, "diff_v2": 5.0, "softmax": 5.01}, []),
        ({"diff_v1": 4.99, "diff_v2": 7.2, "softmax": 1.0}, ["diff_v1", "softmax"]),
        ({"diff_v1": float("nan"), "diff_v2": 7.2}, ["diff_v1"]),
    ],
)
def test_batches_that_are_less_than_five_times_as_fast_miss_the_limit(
    times: dict[str, float], missed: list[str]
) -> None:
    assert [line.split(":")[0] for line in generation.missed_limits(times)] == missed


@pytest.mark.parametrize(("times", "code"), [(4.9, 1), (5.1, 0)])
def test_a_missed_limit_is_said_and_is_the_exit_code(
    times: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "measure", lambda kind, *unused: ([[kind, "batches", "9", ""]], times))
    assert generation.main([]) == code
    assert capsys.readouterr().out.count("times one by one are required") == 3 * code
    for other in (["--batch-size", "8"], ["--prompts", "4"]):
        assert generation.main(other) == 0
        assert "not judged: the limit is that of batches of 16" in capsys.readouterr().out
