import json
from pathlib import Path

import pytest
import yaml

from difftune.report.compare import compare_runs
from difftune.report.runs import differing_keys, load_run, load_runs
from tests.report.runs import write_metrics, write_run


def test_steps_go_on_over_the_stages(tmp_path):
    path = write_run(tmp_path / "a", {"train/loss": [(1, 3.0), (10, 2.0)]}, stage="answers")
    write_metrics(path, {"train/loss": [(1, 1.5), (5, None)]}, stage="traces")
    run = load_run(path)
    assert [(p.step, p.value, p.stage) for p in run.series["train/loss"]] == [
        (1, 3.0, "answers"), (10, 2.0, "answers"), (11, 1.5, "traces"), (15, None, "traces"),
    ]  # fmt: skip
    assert run.stages == ["answers", "traces"] and run.last("train/loss") is None and run.last("x") is None
    assert (run.name, run.seed, run.environment["cpu_count"]) == ("a", 0, 2)


def test_a_line_that_is_being_written_is_left_for_the_next_look(tmp_path):
    path = write_run(tmp_path / "a", {"train/loss": [(1, 3.0)]})
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "to')
    assert len(load_run(path).series["train/loss"]) == 1


@pytest.mark.parametrize(
    ("model", "export", "kind"),
    [
        ({"attention": "diff_v2"}, None, "diff_v2"),
        ({"attention": None, "path": None}, None, "diff_v1"),
        ({"attention": None, "path": "x"}, {"model_type": "difftune", "attention": "softmax"}, "softmax"),
        ({"attention": None, "path": "x"}, {"model_type": "diffllama"}, "diff_v1"),
        ({"attention": None, "path": "x"}, None, ""),
    ],
)
def test_the_kind_of_attention_is_found_in_the_recipe_or_the_export(tmp_path, model, export, kind):
    path = write_run(tmp_path / "a", {"train/loss": [(1, 3.0)]}, model=model)
    if export:
        (path / "export").mkdir()
        (path / "export" / "config.json").write_text(json.dumps(export))
    assert load_run(path).kind == kind


def test_runs_of_one_recipe_differ_in_nothing_but_seed_and_place(tmp_path):
    a, b = (load_run(write_run(tmp_path / str(n), {"train/loss": [(1, 3.0)]}, seed=n)) for n in (0, 1))
    c = load_run(write_run(tmp_path / "c", {"train/loss": [(1, 3.0)]}, optim={"lr": 0.002}))
    assert differing_keys([a, b]) == {} and differing_keys([a, c]) == {"optim.lr": [0.001, 0.002]}


def test_samples_are_those_of_the_last_evaluation(tmp_path):
    path = write_run(tmp_path / "a", {"train/loss": [(1, 3.0)]}, stage="answers")
    write_metrics(path, {"train/loss": [(1, 3.0)]}, stage="traces")
    (path / "samples").mkdir()
    for name in ("answers-900", "traces-20", "traces-100"):
        (path / "samples" / f"{name}.jsonl").write_text(json.dumps({"task": "sums", "text": name}) + "\n")
    assert load_run(path).samples() == [{"task": "sums", "text": "traces-100"}]


def test_a_folder_of_results_is_a_run_too(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"model": "m", "tasks": {"sums": {"limit": 3}}}))
    write_metrics(tmp_path, {"eval/sums/accuracy": [(0, 0.5)]}, stage="evaluate")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "sums.jsonl").write_text(json.dumps({"index": 0}) + "\n")
    run = load_run(tmp_path)
    assert run.last("eval/sums/accuracy") == 0.5 and run.kind == "" and run.samples() == [{"task": "sums", "index": 0}]
    assert run.recipe() == {"model": "m", "tasks.sums.limit": 3}


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_run(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no metrics.jsonl.*run_dir"):
        load_run(tmp_path)
    write_metrics(tmp_path, {"x": [(0, 0.5)]})
    with pytest.raises(ValueError, match=r"neither config\.yaml nor settings.json"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {}}))
    assert load_run(tmp_path).samples() == []


def write_results(path, task, model="models/a", **settings):
    path.mkdir()
    (path / "settings.json").write_text(json.dumps({"model": model, "tasks": {task: {"kind": "math"}}, **settings}))
    write_metrics(path, {f"eval/{task}/accuracy": [(0, 0.5)]}, "evaluate")
    (path / "samples").mkdir()
    (path / "samples" / f"{task}.jsonl").write_text(json.dumps({"text": task}) + "\n")
    return path


def test_folders_of_results_of_one_model_are_one_run(tmp_path):
    paths = [write_results(tmp_path / name, name) for name in ("sums", "books")]
    (run,) = load_runs(paths)
    assert set(run.series) == {"eval/sums/accuracy", "eval/books/accuracy"}
    assert {sample["task"] for sample in run.samples()} == {"sums", "books"}
    assert set(run.settings["tasks"]) == {"sums", "books"}
    (group,) = compare_runs(paths).groups
    assert len(group.runs) == 1


def test_results_of_other_models_or_settings_or_of_the_same_task_stay_apart(tmp_path):
    first = write_results(tmp_path / "a", "sums")
    assert len(load_runs([first, write_results(tmp_path / "b", "books", model="models/b")])) == 2
    assert len(load_runs([first, write_results(tmp_path / "c", "books", dtype="bfloat16")])) == 2
    assert len(load_runs([first, write_results(tmp_path / "d", "sums")])) == 2
    assert len(load_runs([first, write_run(tmp_path / "e", {"train/loss": [(1, 3.0)]})])) == 2


def test_steps_before_a_stage_are_known(tmp_path):
    path = write_run(tmp_path / "a", {"train/loss": [(1, 3.0), (10, 2.0)]}, stage="answers")
    write_metrics(path, {"train/loss": [(1, 1.5), (5, None)]}, stage="traces")
    write_metrics(path, {"train/loss": [(2, 1.5)]}, stage="last")
    assert load_run(path).stage_starts == {"answers": 0, "traces": 10, "last": 15}


@pytest.mark.parametrize("content", ["hello\n", "1\n", "{}\n", "[" * 10**5 + "\n", '{"step": "a"}\n'])
def test_metrics_that_are_none_are_named_with_their_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: .*take the line out"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"- a\n"),
        ("config.yaml", b"a: {"),
        ("config.yaml", b"a: !!python/name:os.system\n"),
        ("config.yaml", b"\xff\xfe"),
        ("environment.json", b"{"),
        ("environment.json", b"3"),
        ("settings.json", b"[" * 10**5),
    ],
)
def test_files_of_a_run_that_are_damaged_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    metric = {"step": 1, "tokens": 1, "name": "train/loss", "value": 1.0, "stage": "main", "time": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metric) + "\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} (is damaged|must hold a mapping)"):
        load_run(tmp_path)
