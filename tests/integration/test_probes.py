"""The probes on a trained model and during training: through the command line, as a user has them."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from difftune.commands import run
from difftune.config import Config, load_config
from difftune.report.compare import compare_runs
from difftune.report.page import render_report
from difftune.run_folder import RunFolder
from tests.conftest import ROOT

TERSE = "{style: terse, needles: 3, filler: 4, digits: 1}"
NOISE = f"{{kind: attention_noise, num_samples: 1, options: {TERSE}}}"
SUMS = "{path: 'synthetic:arithmetic', name: sums, limit: 4}"
TASKS = (
    "{kind: activations, path: 'synthetic:arithmetic', limit: 20, num_tokens: 200, length: 50}, "
    f"{NOISE}, "
    f"{{kind: quantization, bits: [16, 4], task: {SUMS}}}, "
    f"{{kind: quantization, name: noise4, bits: [4], task: {NOISE}}}"
)
NAMES = {"activations", "attention_noise", "sums_bits", "noise4"}


def small(path: Path, *overrides: str) -> list[str]:
    sizes = [
        "model.hidden_size=16",
        "model.intermediate_size=16",
        "model.initializer_range=0.4",
        "stages=[]",
        "export={}",
        "optim.warmup_steps=0",
    ]
    data = "data.train=[{path: 'synthetic:arithmetic', options: {count: 100}}]"
    tasks = [f"evaluation.tasks=[{TASKS}]", "evaluation.every_fraction=null", "evaluation.max_new_tokens=4"]
    settings = [f"run_dir={path}", "trainer.max_steps=2", "logging.loggers=[jsonl]", "evaluation.batch_size=8"]
    return [*sizes, data, *tasks, *settings, *overrides]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One run of each kind of attention, measured before and after two steps."""
    paths = []
    for kind in ("diff_v1", "diff_v2", "softmax"):
        path = tmp_path_factory.mktemp("runs") / kind
        assert run.fit(load_config(ROOT / "recipes" / "quickstart.yaml", small(path, f"model.attention={kind}"))) == 0
        paths.append(path)
    return paths


def test_the_probes_run_on_a_schedule_for_every_kind_of_attention(runs: list[Path]) -> None:
    for path in runs:
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        figures = {(line["name"], line["step"]): line["value"] for line in lines if line["name"].startswith("eval/")}
        assert {name.split("/")[1] for name, _ in figures} == NAMES
        for step in (0, 2):
            assert figures["eval/activations/logits_top_1", step] >= figures["eval/activations/logits_median", step]
            assert 0 < figures["eval/attention_noise/answer", step] < 1
            assert figures["eval/noise4/answer_4bit", step] != figures["eval/attention_noise/answer", step]


def test_what_the_probes_left_is_compared_and_shown(runs: list[Path]) -> None:
    comparison = compare_runs(runs)
    assert [group.kind for group in comparison.groups] == ["diff_v1", "diff_v2", "softmax"]
    assert {"eval/activations/logits_top_1", "eval/attention_noise/answer", "eval/sums_bits/accuracy_4bit"} <= set(
        comparison.rows
    )
    page = render_report(runs)
    assert page.count('class="map"') == 3 + 3 + 1 and "Outliers of the activations" in page


def evaluation(model: str, *overrides: str) -> Config:
    settings = [f"model.path={model}", "trainer.accelerator=cpu", f"evaluation.tasks=[{TASKS}]", *overrides]
    return load_config(None, [*settings, "evaluation.max_new_tokens=4"], command="evaluate")


def test_the_command_measures_an_export_draws_it_and_does_nothing_twice(runs: list[Path], tmp_path: Path) -> None:
    model = str(RunFolder(runs[0]).path / "export")
    results = run.evaluate(evaluation(model), out=tmp_path)
    assert set(results) == NAMES and all(result["complete"] for result in results.values())
    assert (tmp_path / "figures" / "attention_noise.png").is_file() or importlib.util.find_spec("matplotlib") is None
    again = run.evaluate(evaluation(model), out=tmp_path)
    assert without_times(again) == without_times(results)


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: value for key, value in one.items() if key != "seconds"} for name, one in results.items()}


@pytest.mark.real
def test_the_probes_run_on_smollm2_as_a_differential_transformer(smollm2: Path, tmp_path: Path) -> None:
    prose = TASKS.replace(TERSE, "{style: prose, needles: 2, filler: 10}")
    results = run.evaluate(evaluation(str(smollm2), f"evaluation.tasks=[{prose}]"), out=tmp_path / "out")
    assert set(results) == NAMES and all(result["complete"] for result in results.values())
    # A Llama turned V2 attends as it did: mostly to the first token, and to the context without distinction.
    assert 0 < results["attention_noise"]["answer"] < results["attention_noise"]["noise"] < 1
