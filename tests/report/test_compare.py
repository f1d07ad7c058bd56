import math
import re

import pytest
from rich.console import Console

from difftune.cli import main
from difftune.report.compare import FINAL_LOSS, compare_runs, comparison_table, difference, estimate, t95
from tests.report.runs import write_run


@pytest.fixture
def runs(tmp_path):
    """Three seeds of each kind, with planted accuracies."""
    paths = []
    for kind, accuracies in (("diff_v1", (0.8, 0.9, 1.0)), ("softmax", (0.5, 0.6, 0.4))):
        for seed, accuracy in enumerate(accuracies):
            metrics = {
                "train/loss": [(step, 10 - step / 10) for step in range(0, 101, 5)],
                "eval/needles/accuracy": [(0, 0.0), (100, accuracy)],
                "eval/needles/accuracy_low": [(100, 0.0)],
                "eval/noise/answer_layer_00": [(100, 0.3)],
                "eval/noise/answer": [(100, 0.3 + seed / 10)],
            }
            model = {"attention": kind, "path": None}
            paths.append(str(write_run(tmp_path / f"{kind}-{seed}", metrics, seed=seed, model=model)))
    return paths


def test_the_interval_is_students():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.303 / math.sqrt(3)) and found.n == 3
    assert math.isnan(estimate([1.0]).half) and str(estimate([0.123456])) == "0.1235"
    assert str(estimate([1.0, 1.0])) == "1 ± 0"
    assert (t95(1), t95(30), t95(35), t95(50), t95(1e6), t95(0.5)) == (12.706, 2.042, 2.042, 2.021, 1.980, math.inf)


def test_the_difference_is_welchs():
    # By hand: variances of the means 1/3 and 4/3, degrees of freedom (5/3)^2 / (1/18 + 16/18) = 2.94, so 2.
    found = difference([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    assert found.mean == -4 and found.half == pytest.approx(4.303 * math.sqrt(5 / 3))
    assert difference([1.0, 1.0], [2.0, 2.0]).half == 0


def test_runs_are_grouped_by_recipe_whatever_their_seed(runs):
    comparison = compare_runs(runs)
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [("diff_v1", 3), ("softmax", 3)]
    assert comparison.rows["eval/needles/accuracy"][0].mean == pytest.approx(0.9)
    assert comparison.differences["eval/needles/accuracy"].mean == pytest.approx(0.4)
    # Steps 95 and 100 are the last tenth of 100.
    assert comparison.rows[FINAL_LOSS][0].mean == pytest.approx((0.5 + 0.0) / 2)


def test_details_are_shown_on_demand_only(runs):
    assert list(compare_runs(runs).rows) == [FINAL_LOSS, "eval/needles/accuracy", "eval/noise/answer"]
    assert list(compare_runs(runs, metrics=["noise/*"]).rows) == ["eval/noise/answer_layer_00", "eval/noise/answer"]
    with pytest.raises(ValueError, match="no metric matches nothing; there are eval/needles/accuracy"):
        compare_runs(runs, metrics=["nothing"])


def test_a_group_without_a_metric_has_a_dash_and_one_run_no_interval(runs, tmp_path):
    other = write_run(tmp_path / "other", {"eval/x/accuracy": [(1, 0.25)]}, optim={"lr": 1.0})
    comparison = compare_runs([runs[0], str(other)])
    assert comparison.rows["eval/x/accuracy"][0] is None and comparison.differences == {}
    console = Console(record=True, width=120)
    console.print(comparison_table(comparison))
    shown = console.export_text()
    assert "lr=1.0" in shown and "0.25" in shown and "-" in shown and "±" not in shown.split("metric")[1]


def test_the_command_prints_the_table_and_refuses_a_run_named_twice(runs, capsys):
    assert main(["compare", *runs]) == 0
    shown = capsys.readouterr().out
    assert "diff_v1 (3 runs)" in shown and re.search(r"needles/ .*\n.*  accuracy .*±", shown)
    assert main(["compare", runs[0], runs[0]]) == 2
    assert "named twice" in capsys.readouterr().err
    assert main(["compare"]) == 2 and "compare needs RUN" in capsys.readouterr().err
    assert main(["compare", runs[0], "optim.lr=1"]) == 2 and "reads no recipe" in capsys.readouterr().err


def test_how_answers_look_has_a_row_only_where_runs_differ_in_it(runs, tmp_path, capsys):
    paths = []
    for seed, length in ((0, 2.0), (1, 3.0)):
        figures = {"accuracy": 0.5, "truncated": 1.0, "unparsed_4bit": 0.0, "mean_length": length}
        metrics = {f"eval/sums/{name}": [(10, value)] for name, value in figures.items()}
        paths.append(str(write_run(tmp_path / f"run-{seed}", metrics, seed=seed)))
    comparison = compare_runs(paths)
    assert list(comparison.rows) == ["eval/sums/accuracy", "eval/sums/mean_length"], "accuracy is never left out"
    assert comparison.same == {"eval/sums/truncated": 1.0, "eval/sums/unparsed_4bit": 0.0}
    assert list(compare_runs(paths, metrics=["sums/truncated"]).rows) == ["eval/sums/truncated"]
    assert compare_runs(paths[:1]).same == {}, "of one run nothing is known"
    assert main(["compare", *paths]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The same in all runs: sums/truncated 1, sums/unparsed_4bit 0." in shown and "0.5 ± 0" in shown


def test_names_of_metrics_are_whole_on_a_narrow_terminal(runs):
    console = Console(record=True, width=80)
    console.print(comparison_table(compare_runs(runs)))
    shown = console.export_text()
    assert "…" not in shown and re.search(r"noise/ .*\n.*  answer .*±", shown)
