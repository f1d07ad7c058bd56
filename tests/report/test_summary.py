import json

from rich.console import Console

from difftune.report.summary import accuracies, accuracy_table, read_metrics, training_minutes


def write(run_dir, *entries):
    lines = []
    for stage, step, accuracy in entries:
        figures = {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1, "n": 50}
        for name, value in figures.items():
            lines.append({"stage": stage, "step": step, "name": f"eval/sums/{name}", "value": value})
    lines.append({"stage": "a", "step": 1, "name": "train/loss", "value": 2.0})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_first_evaluation_and_the_last_of_each_stage_are_chosen(tmp_path):
    write(tmp_path, ("a", 0, 0.1), ("a", 5, 0.2), ("a", 10, 0.3), ("b", 0, 0.3), ("b", 7, 0.9))
    rows = [(row["when"], row["step"], row["accuracy"]) for row in accuracies(tmp_path)]
    assert rows == [("before training", 0, 0.1), ("after a", 10, 0.3), ("after b", 7, 0.9)]


def test_the_table_shows_accuracy_and_interval(tmp_path):
    write(tmp_path, ("a", 0, 0.1), ("a", 5, 0.25))
    console = Console(width=100, record=True)
    console.print(accuracy_table(tmp_path))
    shown = console.export_text()
    assert "after a" in shown and "0.250" in shown and "0.150 to 0.350" in shown and "50" in shown


def test_tasks_without_an_accuracy_and_means_without_an_interval_have_their_place(tmp_path):
    values = {"eval/books/nll": 2.5, "eval/books/n": 8, "eval/mean/accuracy": 0.125}
    lines = [{"stage": "a", "step": 5, "name": name, "value": value} for name, value in values.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    console = Console(width=100, record=True)
    console.print(accuracy_table(tmp_path))
    shown = console.export_text()
    assert "2.5000 nats" in shown and "0.125" in shown and "None" not in shown


def test_a_run_without_evaluations_has_no_table(tmp_path):
    write(tmp_path)
    assert accuracy_table(tmp_path) is None and accuracy_table(tmp_path / "absent") is None


def test_minutes_of_training_are_step_times_summed_over_the_steps(tmp_path):
    logged = [("a", 1, 6.0), ("a", 11, 3.0), ("b", 20, 6.0)]
    lines = [{"stage": a, "step": b, "name": "perf/step_time_s", "value": c} for a, b, c in logged]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_minutes(tmp_path) == {"a": (1 * 6.0 + 10 * 3.0) / 60, "b": 2.0}


def test_half_a_line_of_a_run_in_progress_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"name": "a"}\n{"name": ')
    assert read_metrics(tmp_path) == [{"name": "a"}]
