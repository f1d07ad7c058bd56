"""Tasks of several kinds in one command and in one training: interrupted, gone on with, in charge of the training."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from difftune.commands import run
from difftune.config import Config, load_config
from difftune.data.tokenizers import build_tokenizer
from difftune.evaluation import generation
from difftune.evaluation.needle import NeedleTask
from tests.conftest import ROOT
from tests.evaluation.judge_server import judge_server
from tests.evaluation.scripted import tiny_model

NEEDLE = "{kind: needle, lengths: [300], depths: [0, 0.5, 1], needles: 1, samples: 4, max_new_tokens: 3}"
NLL = "{kind: nll, name: pages, path: 'synthetic:prose', limit: 2, length: 100, bins: 4}"
MANY = "{kind: many_shot, name: toy, train: TRAIN, test: TRAIN, shots: [2]}"
SUMS = "{path: 'synthetic:arithmetic', name: sums, limit: 6}, {path: 'synthetic:arithmetic', name: more, limit: 4}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    tiny_model(hidden_size=16, max_position_embeddings=512).save_pretrained(path / "model")
    build_tokenizer("digits").save_pretrained(path / "model")
    rows = [{"text": f"{label} {n}", "label": label} for n in range(2) for label in ("up", "down")]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, *tasks: str) -> Config:
    text = ", ".join(tasks).replace("TRAIN", str(folder / "train.jsonl"))
    settings = [f"model.path={folder / 'model'}", "trainer.accelerator=cpu", f"evaluation.tasks=[{text}]"]
    return load_config(None, [*settings, "evaluation.max_new_tokens=4", "evaluation.batch_size=2"], command="evaluate")


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: value for key, value in one.items() if key != "seconds"} for name, one in results.items()}


def test_all_kinds_run_in_one_command_and_maths_has_a_mean(folder: Path, tmp_path: Path) -> None:
    results = run.evaluate(config(folder, NEEDLE, NLL, MANY, SUMS), out=tmp_path)
    assert {name: one["kind"] for name, one in results.items()} == {
        "needle": "needle",
        "pages": "nll",
        "toy": "many_shot",
        "sums": "math",
        "more": "math",
    }
    names = {json.loads(line)["name"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()}
    assert {"eval/needle/accuracy_300", "eval/pages/nll", "eval/toy/accuracy_2", "eval/mean/accuracy"} <= names


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_partial_results_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    straight = run.evaluate(config(folder, NEEDLE, NLL), out=tmp_path / "straight")
    read: list[int] = []
    original = NeedleTask.run_block

    def counting(self: NeedleTask, model: Any, tokenizer: Any, indices: list[int], clock: Any) -> Any:
        if read:
            os.kill(os.getpid(), number)
        read.extend(indices)
        return original(self, model, tokenizer, indices, clock)

    monkeypatch.setattr(NeedleTask, "run_block", counting)
    out = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stopped:
        run.evaluate(config(folder, NEEDLE, NLL), out=out)
    assert stopped.value.code == code
    partial = json.loads((out / "results.json").read_text())["tasks"]
    assert partial.keys() == {"needle"} and not partial["needle"]["complete"]
    before = [json.loads(line)["index"] for line in (out / "samples" / "needle.jsonl").read_text().splitlines()]
    assert 0 < len(before) == partial["needle"]["n"] < 12
    monkeypatch.setattr(NeedleTask, "run_block", original)
    assert figures(run.evaluate(config(folder, NEEDLE, NLL), out=out)) == figures(straight)
    for name in ("needle", "pages"):
        files = [(path / "samples" / f"{name}.jsonl").read_text() for path in (tmp_path / "straight", out)]
        assert files[0] == files[1]


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_the_middle_of_a_block_keeps_what_was_answered_and_a_second_one_ends_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, presses: int
) -> None:
    problems = "{path: 'synthetic:arithmetic', name: sums, limit: 40}"
    straight = run.evaluate(config(folder, problems), out=tmp_path / "straight")
    batches: list[int] = []
    original = generation._generate_batch

    def interrupted(model: Any, prompts: list[list[int]], *settings: Any) -> list[list[int]]:
        batches.append(len(prompts))
        if len(batches) == 11:  # of two; a block has eight of them
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
        return original(model, prompts, *settings)

    monkeypatch.setattr(generation, "_generate_batch", interrupted)
    out = tmp_path / "stopped"
    with pytest.raises(SystemExit if presses == 1 else KeyboardInterrupt):
        run.evaluate(config(folder, problems), out=out)
    partial = json.loads((out / "results.json").read_text())["tasks"]["sums"]
    before = [json.loads(line) for line in (out / "samples" / "sums.jsonl").read_text().splitlines()]
    # Sixteen of the whole block, and, where there was time to grade them, those of the two batches after it.
    assert partial["n"] == len(before) and not partial["complete"]
    assert 20 <= len(before) <= 22 if presses == 1 else len(before) == 16
    monkeypatch.setattr(generation, "_generate_batch", original)
    assert figures(run.evaluate(config(folder, problems), out=out)) == figures(straight)
    after = [json.loads(line) for line in (out / "samples" / "sums.jsonl").read_text().splitlines()]
    assert [sample for sample in after if sample["index"] in {one["index"] for one in before}] == sorted(
        before, key=lambda sample: int(sample["index"])
    )


def fit(folder: Path, run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    tasks = ", ".join([NEEDLE, NLL, MANY, SUMS]).replace("TRAIN", str(folder / "train.jsonl"))
    small = ["model.hidden_size=16", "model.intermediate_size=16", "model.max_position_embeddings=512", "stages=[]"]
    data = "data.train=[{path: 'synthetic:arithmetic', options: {count: 100}}]"
    settings = [f"run_dir={run_dir}", f"evaluation.tasks=[{tasks}]", "evaluation.max_new_tokens=4", "export=null"]
    schedule = ["evaluation.every_fraction=null", "evaluation.every_n_steps=1", "optim.warmup_steps=0"]
    settings += [*small, *schedule, data, "logging.loggers=[jsonl]", "evaluation.batch_size=8"]
    assert run.fit(load_config(ROOT / "recipes" / "quickstart.yaml", [*settings, *overrides])) == 0
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_all_kinds_run_during_training_and_any_of_their_figures_chooses_the_best(folder: Path, tmp_path: Path) -> None:
    best = ["checkpoint.best_metric=eval/pages/nll", "checkpoint.best_mode=min", "trainer.max_steps=2"]
    lines = fit(folder, tmp_path / "run", *best, "optim.lr=1e-2")
    by_name: dict[str, dict[int, float]] = {}
    for line in lines:
        by_name.setdefault(line["name"], {})[line["step"]] = line["value"]
    for name in ("needle/accuracy", "pages/nll", "toy/accuracy", "sums/accuracy", "mean/accuracy"):
        assert set(by_name[f"eval/{name}"]) == {0, 1, 2}
    chosen = json.loads((tmp_path / "run" / "checkpoints" / "main" / "best.json").read_text())
    curve = {step: value for step, value in by_name["eval/pages/nll"].items() if step > 0}
    assert chosen["step"] == min(curve, key=curve.__getitem__) and chosen["metric"] == "eval/pages/nll"
    kinds = {
        json.loads(line)["task"] for line in (tmp_path / "run" / "samples" / "main-2.jsonl").read_text().splitlines()
    }
    assert kinds == {"needle", "pages", "toy", "sums", "more"}


def test_a_training_that_no_longer_gets_better_ends(folder: Path, tmp_path: Path) -> None:
    stop = ["checkpoint.best_metric=eval/needle/accuracy", "evaluation.patience=2", "trainer.max_steps=50"]
    lines = fit(folder, tmp_path / "run", *stop)
    # Nothing is ever found: the evaluation before the first step is the best, those after steps 1 and 2 are in vain.
    assert max(line["step"] for line in lines) == 2
    done = json.loads((tmp_path / "run" / "checkpoints" / "main" / "done.json").read_text())
    assert done["step"] == 2


def test_a_judge_that_cannot_be_reached_ends_evaluate_with_1_and_keeps_the_rest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "stories.jsonl").write_text(json.dumps({"document": "Troy fell.", "summary": "Troy fell."}) + "\n")
    with judge_server() as server:
        url = server.url
    judged = f"{{kind: hallucination, path: {tmp_path}/stories.jsonl, judge: endpoint, url: '{url}', retries: 0, "
    judged += f"cache_dir: {tmp_path / 'cache'}}}"
    with pytest.raises(SystemExit) as ended:
        run.evaluate(config(folder, judged, SUMS), out=tmp_path / "out")
    assert ended.value.code == 1
    assert {"sums", "more"} <= json.loads((tmp_path / "out" / "results.json").read_text())["tasks"].keys()
