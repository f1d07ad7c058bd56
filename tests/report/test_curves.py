from difftune.report.compare import group_runs
from difftune.report.curves import evaluation_charts, figure, grid, lambda_charts, loss_charts, speed_charts
from difftune.report.runs import load_run
from difftune.report.style import style_of
from tests.report.runs import write_run


def test_there_is_a_chart_for_what_was_logged_and_none_for_what_was_not(tmp_path):
    metrics = {
        "train/loss": [(1, 2.0), (2, 1.0)],
        "lambda/layer_00": [(1, 0.2), (2, 0.3)],
        "lambda/layer_00_std": [(1, 0.2), (2, 0.3)],
        "eval/sums/accuracy": [(0, 0.0), (2, 1.0)],
        "eval/sums/accuracy_low": [(0, 0.0), (2, 1.0)],
        "eval/once/accuracy": [(2, 1.0)],
    }
    groups = group_runs([load_run(write_run(tmp_path / "a", metrics))])
    styles = style_of(groups)
    assert loss_charts(groups, styles).count("<svg") == 1
    assert lambda_charts(groups).count('class="curve"') == 1
    # Neither bounds nor what was measured once.
    assert evaluation_charts(groups, styles).count("<svg") == 1
    assert speed_charts(groups, styles) == ""


def test_an_empty_chart_has_no_title():
    assert figure("", "title") == "" and grid(["", ""]) == "" and "note" in figure("<svg/>", "title", "note")
