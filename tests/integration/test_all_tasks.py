"""All nine kinds of task in one command, on the model of the quickstart recipe: of two steps, and as trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from difftune.commands import run
from difftune.config import load_config
from tests.conftest import ROOT
from tests.evaluation.nli_model import save_nli_model
from tests.evaluation.own_task import write_own_task

pytest.importorskip("lm_eval", reason="needs the harness: pip install 'difftune[lm-eval]'")

QUICKSTART = ROOT / "runs" / "quickstart" / "export"
FACTS = "{style: terse, needles: 3, filler: 4, digits: 1}"
SUMS = "{kind: math, name: sums, path: 'synthetic:arithmetic', limit: 4}"
TASKS = f"""[
  {SUMS},
  {{kind: needle, lengths: [250], depths: [0, 1], needles: 1, samples: 1, max_new_tokens: 4}},
  {{kind: many_shot, train: FOLDER/labels.jsonl, test: FOLDER/labels.jsonl, shots: [2]}},
  {{kind: nll, path: 'synthetic:prose', name: prose, limit: 2, length: 100, bins: 4}},
  {{kind: hallucination, name: words, path: FOLDER/stories.jsonl, limit: 2}},
  {{kind: hallucination, name: entailed, path: FOLDER/stories.jsonl, limit: 2, judge: nli, nli_model: FOLDER/nli}},
  {{kind: activations, path: 'synthetic:arithmetic', limit: 20, num_tokens: 100, length: 50}},
  {{kind: quantization, name: bits, bits: [16, 4], task: {SUMS}}},
  {{kind: attention_noise, num_samples: 1, options: {FACTS}}},
  {{kind: lm_eval, name: harness, tasks: own_sums, include_path: FOLDER}},
]"""
KINDS = {
    "math", "needle", "many_shot", "nll", "hallucination", "activations", "quantization", "attention_noise", "lm_eval"
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tasks read."""
    path = tmp_path_factory.mktemp("tasks")
    labels = [{"text": f"{label} {n}", "label": label} for n in range(2) for label in ("up", "down")]
    stories = [{"document": f"Story {n} of Troy.", "summary": "Troy."} for n in range(2)]
    for name, rows in (("labels", labels), ("stories", stories)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_nli_model(path / "nli")
    write_own_task(path)
    return path


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the quickstart recipe, narrow and after two steps."""
    run_dir = tmp_path_factory.mktemp("run") / "quickstart"
    sizes = ["model.hidden_size=16", "model.intermediate_size=16", "model.initializer_range=0.4"]
    data = "data.train=[{path: 'synthetic:arithmetic', options: {count: 100}}]"
    short = ["stages=[]", data, "trainer.max_steps=2", "optim.warmup_steps=0", "logging.loggers=[jsonl]"]
    settings = [f"run_dir={run_dir}", "evaluation.tasks=[]", "evaluation.every_fraction=null", *sizes, *short]
    assert run.fit(load_config(ROOT / "recipes" / "quickstart.yaml", settings)) == 0
    return run_dir / "export"


def check(model: Path, folder: Path, out: Path) -> None:
    settings = [f"model.path={model}", "trainer.accelerator=cpu", "evaluation.max_new_tokens=4"]
    tasks = " ".join(TASKS.replace("FOLDER", str(folder)).split())
    results: dict[str, Any] = run.evaluate(
        load_config(None, [*settings, f"evaluation.tasks={tasks}"], command="evaluate"), out=out
    )
    assert {result["kind"] for result in results.values()} == KINDS
    assert all(result["complete"] for result in results.values())
    kept = {path.stem for path in (out / "samples").iterdir()}
    assert kept == set(results), "every task leaves its samples"
    assert results["bits"]["bits"]["16"]["accuracy"] == results["sums"]["accuracy"]
    assert results["entailed"]["accuracy"] == 1, "the judge finds everything entailed"
    assert results["words"]["judge"] != results["entailed"]["judge"]
    assert 0 <= results["harness"]["own_sums_acc"] <= 1 and results["harness"]["n"] == 6


def test_every_kind_of_task_runs_on_the_quickstart_model_of_two_steps(
    stand_in: Path, folder: Path, tmp_path: Path
) -> None:
    check(stand_in, folder, tmp_path)


@pytest.mark.skipif(not QUICKSTART.is_dir(), reason="`make quickstart` has not been run here")
def test_every_kind_of_task_runs_on_what_make_quickstart_left(folder: Path, tmp_path: Path) -> None:
    check(QUICKSTART, folder, tmp_path)
