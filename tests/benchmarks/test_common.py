import math
from pathlib import Path

import pytest
import torch

from benchmarks.common import (
    PeakMemory,
    interleaved,
    machine,
    ratios,
    require_close,
    run_child,
    spread,
    table,
)
from tests.clock import Clock


def test_machine_names_threads_and_versions() -> None:
    text = machine(3, "transformers", "no-such-package")
    assert "3 threads" in text
    # The wheel of PyPI names its build, as 2.11.0+cu130, in torch and not in its metadata.
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "no-such-package not installed" in text


@pytest.mark.parametrize("wrong", [1.1, float("nan"), float("inf")])
def test_wrong_results_stop_the_benchmark(wrong: float) -> None:
    expected = torch.ones(3)
    require_close("attention", expected + 1e-7, expected, 1e-5)
    with pytest.raises(SystemExit, match="attention is wrong: differs by"):
        require_close("attention", torch.tensor([1.0, wrong, 1.0]), expected, 1e-5)


def test_calls_are_timed_in_turn_after_one_untimed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = Clock(monkeypatch, "benchmarks.common")

    def slow() -> None:
        order.append("slow")
        clock.pass_(0.5)

    seconds = interleaved({"slow": slow, "fast": lambda: order.append("fast")}, rounds=2)
    assert order == ["slow", "fast"] * 3
    assert seconds == {"slow": [0.5, 0.5], "fast": [0, 0]}


def test_ratios_are_within_a_round_and_spread_is_median_and_range() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    # Too short for the clock, or a clock that was set back.
    assert all(map(math.isnan, ratios([2.0, 9.0], [0.0, -0.1])))
    assert spread(ratios([2.0], [0.0])) == "nan (nan-nan)"
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00)"


def test_table_columns_are_aligned() -> None:
    lines = table(["a", "long header"], [["wide cell", "1"]]).splitlines()
    assert lines == ["| a         | long header |", "|-----------|-------------|", "| wide cell | 1           |"]


def test_child_gives_its_values_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_child.py").write_text(
        "import os, sys\nfrom benchmarks.common import report\nprint('noise')\n"
        "report(arguments=sys.argv[1:], threads=os.environ['OMP_NUM_THREADS'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_child("a_child", ["--x"], threads=2) == {"arguments": ["--x"], "threads": "2"}
    (tmp_path / "a_child.py").write_text("raise ValueError('out of luck')")
    with pytest.raises(SystemExit, match=r"(?s)a_child failed with code 1.*out of luck"):
        run_child("a_child", [], threads=1)


def test_peak_memory_counts_what_was_freed_again() -> None:
    memory = PeakMemory()
    block = torch.ones(2**26)
    del block
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux resets the counter")
    assert 0.2 < memory.above_start_gib < 0.5
    assert memory.total_gib > memory.above_start_gib
    assert PeakMemory().above_start_gib < 0.1
