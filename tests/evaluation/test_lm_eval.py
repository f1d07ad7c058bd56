import pytest
import torch
from rich.console import Console

from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation import lm_eval
from difftune.evaluation.lm_eval import HarnessResult, HarnessSample, HarnessTask, figure_name
from tests.evaluation.own_task import CHOICES, write_own_task
from tests.evaluation.scripted import tiny_model

TaskManager = pytest.importorskip(
    "lm_eval.tasks", reason="needs the harness: pip install 'difftune[lm-eval]'"
).TaskManager
TOKENIZER = build_tokenizer("digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A task definition of our own: four choices a question, on disk."""
    folder = tmp_path_factory.mktemp("harness")
    write_own_task(folder)
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return HarnessTask("harness", ["own_sums"], batch_size=3, include_path=str(folder))


@pytest.mark.parametrize("kind", ["diff_v1", "softmax"])
def test_the_accuracy_is_that_of_the_likelihoods_computed_by_hand(task, kind):
    model = tiny_model(kind)
    right = []
    with torch.no_grad():
        for n in range(6):
            scores = []
            for choice in CHOICES:
                question, answer = (TOKENIZER(text)["input_ids"] for text in (f"{n}+{n}=", choice))
                logits = model(torch.tensor([question + answer])).logits[0].log_softmax(-1)
                places = range(len(question) - 1, len(question) + len(answer) - 1)
                scores.append(sum(logits[p, t].item() for p, t in zip(places, answer, strict=True)))
            right.append(scores.index(max(scores)) == n % 4)
    state = torch.get_rng_state()
    result = task.summarise(task.run(model, TOKENIZER))
    assert result.complete and result.metrics()["own_sums_acc"] == pytest.approx(sum(right) / 6)
    assert result.samples[0].num_samples == 6 and "own_sums_acc_stderr" in result.metrics()
    assert torch.equal(torch.get_rng_state(), state) and model.training
    console = Console(record=True, width=100)
    console.print(*result.tables(), str(result))
    assert "own_sums_acc" in console.export_text() and result.row()["n"] == "6" and result.to_dict()["n"] == 6


def test_when_the_time_is_over_the_task_is_not_counted(task):
    asked = iter([False])
    samples = task.run(tiny_model(), TOKENIZER, should_stop=lambda: next(asked, True))
    result = task.summarise(samples)
    assert samples == [] and not result.complete and result.tables() == [] and str(result) == "not measured"


def test_a_task_that_was_interrupted_goes_on_after_the_answers_it_had(folder, tmp_path):
    model = tiny_model().eval()

    def run(model, **clock):
        calls = []
        hook = model.register_forward_hook(lambda module, inputs, output: calls.append(len(output.logits)))
        made = HarnessTask("harness", ["own_sums"], batch_size=3, include_path=str(folder), cache=tmp_path / "kept")
        result = made.summarise(made.run(model, TOKENIZER, **clock))
        hook.remove()
        return result, sum(calls)

    with torch.no_grad():
        straight, whole = run(model)
        assert straight.complete and list((tmp_path / "kept").iterdir()) == [], "nothing is left of what is finished"
        polls = iter([False] * 4)
        partial, before = run(model, should_stop=lambda: next(polls, True))
        assert not partial.complete and 0 < before < whole and len(list((tmp_path / "kept").iterdir())) == 1
        other, anew = run(tiny_model("softmax").eval())
        assert other.complete and anew == whole, "another model has other answers"
        again, rest = run(model)
        assert again.metrics() == straight.metrics() and rest <= whole - before + 2
        assert list((tmp_path / "kept").iterdir()) == []


def test_what_the_harness_does_not_know_is_refused(monkeypatch, folder):
    # Its own tasks are more than ten thousand, which would be read here for the sake of a name that is none of them.
    with_defaults = []

    def own_only(include_path, *, include_defaults):
        with_defaults.append(include_defaults)
        return TaskManager(include_path=str(folder), include_defaults=False)

    monkeypatch.setattr(lm_eval, "_task_manager", own_only)
    with pytest.raises(ValueError, match="no task hellaswag"):
        HarnessTask("harness", ["own_sums", "hellaswag"], include_path=str(folder))
    assert with_defaults == [False, True], "the harness's own are looked up where a name is not in the folder"
    HarnessTask("harness", ["own_sums"], include_path=str(folder))
    assert with_defaults == [False, True, False]
    with pytest.raises(ValueError, match="no task hellaswagg"):
        HarnessTask("harness", ["hellaswagg"])
    with pytest.raises(ValueError, match="names no task"):
        HarnessTask("harness", [])


def test_figures_are_named_by_task_metric_and_filter():
    assert figure_name("arc", "acc,none") == "arc_acc" and figure_name("arc", "alias") is None
    assert figure_name("arc", "acc_norm_stderr,none") == "arc_acc_norm_stderr"


def test_the_papers_figures_of_the_same_tasks_are_printed_beneath():
    def printed(*tasks):
        samples = [HarnessSample(n, task, {f"{task}_acc": 0.25}, 4) for n, task in enumerate(tasks)]
        console = Console(record=True, width=100)
        console.print(*HarnessResult(samples, len(tasks)).tables())
        return console.export_text()

    shown = printed("piqa", "boolq", "mmlu")
    assert "boolq" in shown and "arc_easy" not in shown
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if "paper: " in line}
    assert lines["paper: DIFF 3B, 350B tokens"].split("│")[2:4] == [" 0.601 ", " 0.755 "]
    assert lines["paper: StableLM-3B-4E1T, 1T tokens"].split("│")[2].strip() == "-" and len(lines) == 8
    assert "paper" not in printed("mmlu")
