"""Tasks on SmolLM2-135M as a differential transformer, small; the others are in the tests of many-shot and the probes.

What a task reports is compared with the same figure by hand: another forward, another grader's word, the samples.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from difftune.checkpoints.load import load_model
from difftune.commands import run
from difftune.config import load_config
from difftune.data.texts import load_texts
from difftune.evaluation.grading import grade
from tests.conftest import shared_data
from tests.evaluation.nli_model import save_nli_model
from tests.evaluation.own_task import write_own_task

pytestmark = pytest.mark.real

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Italy": "Rome"}
STORIES = [
    (
        "The town council met on Monday. It voted to build a new bridge over the river, to open in 2031.",
        "A new bridge.",
    ),
    ("Maria Lopez won the race in Geneva yesterday, two minutes ahead of last year's winner.", "Lopez won in Geneva."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tasks read."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"document": document, "summary": summary} for document, summary in STORIES]
    (path / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = [f" {capital}" for capital in CAPITALS.values()]
    questions = [
        {"question": f"The capital of {country} is", "choices": choices, "gold": gold}
        for gold, country in enumerate(CAPITALS)
    ]
    write_own_task(path, questions, "capitals")
    save_nli_model(path / "nli")
    return path


def evaluate(model: Path, out: Path, *tasks: str) -> dict[str, Any]:
    settings = [f"model.path={model}", "trainer.accelerator=cpu", f"evaluation.tasks=[{', '.join(tasks)}]"]
    results = run.evaluate(load_config(None, settings, command="evaluate"), out=out)
    for name, result in results.items():
        print(f"\n{name}: {result['seconds']} s")
        assert result["complete"]
    return results


def samples(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples" / f"{name}.jsonl").read_text().splitlines()]


def test_the_nll_by_position_is_that_of_one_forward(smollm2: Path, tmp_path: Path) -> None:
    task = "{kind: nll, name: prose, path: 'synthetic:prose', limit: 2, length: 192, bins: 2, chunk_size: 50}"
    result = evaluate(smollm2, tmp_path, task)["prose"]
    model, tokenizer = load_model(smollm2).eval(), AutoTokenizer.from_pretrained(smollm2)
    found = []
    for text in load_texts("synthetic:prose", limit=2, characters=8 * 192):
        ids = torch.tensor([tokenizer(text)["input_ids"][:192]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        found.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    expected = torch.stack(found)
    print(f"nll {result['nll']:.4f}, second half {result['nll_last']:.4f}")
    assert result["nll"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert result["cumulative"][0] == pytest.approx(expected[:, :96].mean().item(), rel=1e-4)
    assert result["nll_last"] < result["nll_first"], "what was read helps"


def test_the_needle_is_mostly_found_in_a_short_text(smollm2: Path, tmp_path: Path) -> None:
    cell = (
        "lengths: [256], depths: [0, 1], needles: 1, samples: 2, max_new_tokens: 12, batch_size: 4, prompt: completion"
    )
    result = evaluate(smollm2, tmp_path, f"{{kind: needle, {cell}}}")["needle"]
    kept = samples(tmp_path, "needle")
    by_hand = [any(number in sample["text"] for number in sample["numbers"].values()) for sample in kept]
    print(f"accuracy {result['accuracy']}, " + "; ".join(repr(sample["text"]) for sample in kept))
    assert result["accuracy"] == sum(by_hand) / 4 >= 0.5


def test_problems_of_gsm8k_are_answered_and_graded(smollm2: Path, tmp_path: Path) -> None:
    path = shared_data() / "math_eval" / "gsm8k.jsonl"
    task = f"{{kind: math, path: {path}, limit: 4, max_new_tokens: 96}}"
    result = evaluate(smollm2, tmp_path, task)["gsm8k"]
    kept = samples(tmp_path, "gsm8k")
    by_hand = [grade(sample["text"], sample["gold"]) for sample in kept]
    print(f"accuracy {result['accuracy']}, cut {result['truncated']}, " + "; ".join(s["verdict"] for s in kept))
    assert result["n"] == len(kept) == 4 and result["accuracy"] == sum(by_hand) / 4
    assert result["truncated"] == sum(not sample["finished"] for sample in kept) / 4
    assert all(0 < sample["num_tokens"] <= 96 and len(sample["text"]) > 20 for sample in kept)


def test_the_harness_measures_what_the_likelihoods_say(smollm2: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the harness: pip install 'difftune[lm-eval]'")
    task = f"{{kind: lm_eval, name: harness, tasks: capitals, include_path: {folder}, batch_size: 8}}"
    result = evaluate(smollm2, tmp_path, task)["harness"]
    model, tokenizer = load_model(smollm2).eval(), AutoTokenizer.from_pretrained(smollm2)
    right = 0
    for country, capital in CAPITALS.items():
        scores = {}
        for choice in CAPITALS.values():
            prompt = tokenizer(f"The capital of {country} is")["input_ids"]
            ids = tokenizer(f"The capital of {country} is {choice}")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores[choice] = sum(logits[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
        right += max(scores, key=scores.__getitem__) == capital
    print(f"accuracy {result['capitals_acc']}")
    assert result["n"] == 4 and result["capitals_acc"] == right / 4 >= 0.75


def test_summaries_are_judged_offline_by_two_judges(smollm2: Path, folder: Path, tmp_path: Path) -> None:
    common = f"kind: hallucination, path: {folder}/stories.jsonl, max_new_tokens: 40"
    words = f"{{{common}, name: words, threshold: 0.5}}"
    nli = f"{{{common}, name: entailed, judge: nli, nli_model: {folder}/nli}}"
    results = evaluate(smollm2, tmp_path, words, nli)
    texts = {name: [sample["text"] for sample in samples(tmp_path, name)] for name in results}
    print(f"by words {results['words']['accuracy']}, {texts['words']}")
    assert texts["words"] == texts["entailed"] and all(len(text) > 20 for text in texts["words"])
    assert results["entailed"]["accuracy"] == 1, "the weights of this judge force its answer"
    verdicts = [sample["verdict"] == "true" for sample in samples(tmp_path, "words")]
    assert results["words"]["accuracy"] == sum(verdicts) / 2
