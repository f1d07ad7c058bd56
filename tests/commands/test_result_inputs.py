import json
from pathlib import Path
from typing import Any

import pytest

from difftune.builder import build_tasks, build_tokenizer
from difftune.commands.result_inputs import describe_inputs
from difftune.config import load_config
from difftune.data.tokenizers import build_tokenizer as named_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    named_tokenizer("bytes").save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"abc")
    (folder / "config.json").write_text('{"model_type": "difftune"}')
    return folder


def inputs(model: Path, *overrides: str) -> dict[str, Any]:
    config = load_config(None, [f"model.path={model}", *overrides], command="evaluate")
    return json.loads(json.dumps(describe_inputs(config, build_tasks(config.evaluation), build_tokenizer(config))))


def rows(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def changed(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    return {key for key in {*old, *new} if old.get(key) != new.get(key)}


def test_the_same_inputs_are_described_alike_whatever_the_batches(model: Path, tmp_path: Path) -> None:
    problems = rows(tmp_path / "p.jsonl", {"question": "2+2?", "answer": "4"})
    task = f"evaluation.tasks=[{{path: {problems}}}]"
    first = inputs(model, task)
    assert inputs(model, task, "evaluation.batch_size=3") == first
    moved = model.rename(tmp_path / "moved")
    assert changed(first, inputs(moved, task)) == {"model"}


@pytest.mark.parametrize("lines", [[{"question": "2+2?", "answer": "FOUR"}], [{"question": "3+1?", "answer": "4"}], 2])
def test_problems_changed_under_their_path_are_other_inputs(model: Path, tmp_path: Path, lines: Any) -> None:
    one = {"question": "2+2?", "answer": "4"}
    task = f"evaluation.tasks=[{{path: {rows(tmp_path / 'p.jsonl', one)}}}]"
    first = inputs(model, task)
    rows(tmp_path / "p.jsonl", *([one, one] if lines == 2 else lines))
    second = inputs(model, task)
    assert changed(first, second) == {"tasks"} and changed(first["tasks"]["p"], second["tasks"]["p"]) == {"data"}


def test_worked_answers_changed_under_their_path_are_other_inputs(model: Path, tmp_path: Path) -> None:
    problems = rows(tmp_path / "p.jsonl", {"question": "2+2?", "answer": "4"})
    shots = rows(tmp_path / "s.jsonl", {"question": "1+1?", "answer": "2"})
    task = f"evaluation.tasks=[{{path: {problems}, num_shots: 1, shots_path: {shots}}}]"
    first = inputs(model, task)
    rows(tmp_path / "s.jsonl", {"question": "1+1?", "answer": "two"})
    assert changed(first, inputs(model, task)) == {"tasks"}


@pytest.mark.parametrize("kind", ["nll", "activations", "needle"])
def test_a_text_changed_under_its_path_is_another_input(model: Path, tmp_path: Path, kind: str) -> None:
    text = tmp_path / "t.txt"
    text.write_text("The sea was calm. " * 40)
    key = "haystack" if kind == "needle" else "path"
    extra = ", lengths: [64]" if kind == "needle" else ", length: 16"
    task = f"evaluation.tasks=[{{kind: {kind}, {key}: {text}{extra}}}]"
    first = inputs(model, task)
    assert changed(first, inputs(model, task)) == set()
    text.write_text("The sea was wild. " * 40)
    assert changed(first, inputs(model, task)) == {"tasks"}


def test_a_task_that_another_one_runs_counts_and_its_batches_do_not(model: Path, tmp_path: Path) -> None:
    problems = rows(tmp_path / "p.jsonl", {"question": "2+2?", "answer": "4"})
    task = f"evaluation.tasks=[{{kind: quantization, task: {{path: {problems}}}}}]"
    first = inputs(model, task)
    assert inputs(model, task, "evaluation.batch_size=3") == first
    rows(tmp_path / "p.jsonl", {"question": "2+2?", "answer": "5"})
    assert changed(first, inputs(model, task)) == {"tasks"}


def test_a_chat_template_and_a_vocabulary_are_told_apart(model: Path, tmp_path: Path) -> None:
    task = f"evaluation.tasks=[{{path: {rows(tmp_path / 'p.jsonl', {'question': '2+2?', 'answer': '4'})}}}]"
    first = inputs(model, task)
    template = "{% for m in messages %}Q: {{ m.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    assert changed(first, inputs(model, task)) == {"chat template"}
    named_tokenizer("digits").save_pretrained(model)
    assert "tokenizer" in changed(first, inputs(model, task))
    assert changed(first, inputs(model, task, "model.dtype=bfloat16")) >= {"dtype"}
