import pytest

from difftune.builder import held_out
from difftune.builder.held_out import held_out_problems
from difftune.config import load_config
from difftune.data.contamination import ProblemIndex
from difftune.data.math_sets import MATH_SETS

QUESTION = "How many apples has Ann if she had five and bought seven?"


def evaluation(tasks):
    return load_config(None, ["model.path=any", f"evaluation.tasks={tasks}"], command="evaluate").evaluation


def files(write_jsonl, *names):
    return [
        write_jsonl([{"question": f"{QUESTION} {name} {n}", "answer": "1"} for n in range(3)], f"{name}.jsonl")
        for name in names
    ]


def test_whole_sets_are_read_whatever_the_limit_and_each_once(write_jsonl):
    (path,) = files(write_jsonl, "mine")
    inner = f"{{kind: quantization, task: {{path: {path}, limit: 1}}}}"
    found = held_out_problems([evaluation(f"[{{path: {path}, limit: 2}}]"), evaluation(f"[{inner}]")])
    assert {name: len(asked) for name, asked in found.questions.items()} == {"mine": 3}
    assert found.unread == found.left_out == {}


def test_generated_problems_are_left_out_unless_they_are_of_the_half_for_training():
    found = held_out_problems([evaluation("[{path: 'synthetic:arithmetic', options: {count: 5}}]")])
    assert found.questions == {} and "generated" in found.left_out["arithmetic"]
    own = held_out_problems([evaluation("[{path: 'synthetic:arithmetic', split: train, options: {count: 5}}]")])
    assert len(own.questions["arithmetic"]) == 5 and own.left_out == {}


def test_what_cannot_be_read_is_told_and_does_not_hide_the_rest(write_jsonl):
    (path,) = files(write_jsonl, "mine")
    found = held_out_problems([evaluation(f"[{{path: missing.jsonl}}, {{path: {path}}}]")])
    assert set(found.questions) == {"mine"} and "no such file" in found.unread["missing"]
    text = found.text(ProblemIndex(found.questions))
    assert text.splitlines()[0] == "looked for in the rows: mine (3 problems)"
    assert "warning     not looked for: missing: missing.jsonl: no such file" in text
    assert held_out_problems([]).text(ProblemIndex({})) == "looked for in the rows: no test set"


@pytest.mark.parametrize("place", ["folder", "beside"])
def test_all_eight_sets_are_read_where_the_recipe_has_them(place, tmp_path, write_jsonl):
    files(write_jsonl, *MATH_SETS)
    task = f"{{path: gsm8k, folder: {tmp_path}}}" if place == "folder" else f"{{path: {tmp_path / 'gsm8k.jsonl'}}}"
    found = held_out_problems([evaluation(f"[{task}]")], all_sets=True)
    assert list(found.questions) == list(MATH_SETS) and found.unread == {}
    assert list(held_out_problems([evaluation(f"[{task}]")]).questions) == ["gsm8k"]


def test_the_hub_is_asked_once_where_there_is_no_network(monkeypatch):
    asked = []

    def unreachable(task, seed, limit):
        asked.append(task.path)
        raise ValueError(f"{task.path}: could not be loaded") from ConnectionError()

    monkeypatch.setattr(held_out.MathTaskConfig, "read", unreachable)
    found = held_out_problems([], all_sets=True)
    # carp is in no hub: what its reading says is where to put the file.
    assert asked == ["gsm8k", "carp"] and set(found.unread) == set(MATH_SETS)
    assert "could not be loaded" in found.unread["gsm8k"] and "no network" in found.unread["math"]


def test_a_set_that_the_hub_does_not_have_says_nothing_of_the_network(monkeypatch):
    asked = []

    def refused(task, seed, limit):
        asked.append(task.path)
        raise ValueError(f"{task.path}: no column answer")

    monkeypatch.setattr(held_out.MathTaskConfig, "read", refused)
    held_out_problems([], all_sets=True)
    assert asked == list(MATH_SETS)
