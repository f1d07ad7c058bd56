from difftune.report.compare import group_runs
from difftune.report.curves import (
    evaluation_charts,
    figure,
    grid,
    lambda_charts,
    legend_item,
    loss_charts,
    speed_charts,
    stage_marks,
)
from difftune.report.runs import load_run
from difftune.report.style import style_of
from tests.report.runs import write_metrics, write_run


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


def test_stages_are_marked_where_all_runs_have_them_at_the_same_step(tmp_path):
    runs = []
    for name, steps in (("a", 10), ("b", 10), ("c", 20)):
        path = write_run(tmp_path / name, {"train/loss": [(1, 3.0), (steps, 2.0)]}, stage="answers")
        write_metrics(path, {"train/loss": [(1, 1.5), (5, 1.0)]}, stage="traces")
        runs.append(load_run(path))
    assert stage_marks(group_runs(runs[:2])) == [(10.0, "traces")]
    assert stage_marks(group_runs(runs)) == []
    groups = group_runs(runs[:1])
    page = loss_charts(groups, style_of(groups))
    assert 'class="mark"' in page and ">traces<" in page and "the loss jumps" in page


def test_a_legend_says_what_a_stroke_stands_for():
    item = legend_item("V1 <b>", "#123", "6 4", "3 runs")
    assert 'stroke="#123"' in item and 'stroke-dasharray="6 4"' in item and "V1 &lt;b&gt;" in item and "3 runs" in item
    assert "dasharray" not in legend_item("V1", "#123")
