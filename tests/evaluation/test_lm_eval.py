import json

import pytest
import torch
import yaml
from rich.console import Console

from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation.lm_eval import HarnessTask, figure_name
from tests.evaluation.scripted import tiny_model

pytest.importorskip("lm_eval", reason="needs the harness: pip install 'difftune[lm-eval]'")
TOKENIZER = build_tokenizer("digits")
CHOICES = ["7", "12", "3+4", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A task definition of our own: four choices a question, on disk."""
    folder = tmp_path_factory.mktemp("harness")
    rows = [{"question": f"{n}+{n}=", "choices": CHOICES, "gold": n % 4} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": "own_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "own_sums.yaml").write_text(yaml.safe_dump(definition))
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


def test_what_the_harness_does_not_know_is_refused():
    with pytest.raises(ValueError, match="no task hellaswagg"):
        HarnessTask("harness", ["hellaswagg"])
    with pytest.raises(ValueError, match="names no task"):
        HarnessTask("harness", [])


def test_figures_are_named_by_task_metric_and_filter():
    assert figure_name("arc", "acc,none") == "arc_acc" and figure_name("arc", "alias") is None
    assert figure_name("arc", "acc_norm_stderr,none") == "arc_acc_norm_stderr"
