import json

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.toy import ToyData, build_module, build_trainer, parameters


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks("tests.training.two_ranks", str(folder))
    return folder, torch.load(folder / "results.pt")


def test_two_ranks_equal_one_with_unequal_label_counts(results):
    folder, vectors = results
    module = build_module(double=True)
    start = parameters(module.model)
    build_trainer(max_steps=9, accumulate_grad_batches=2).fit(module, ToyData())
    alone = parameters(module.model)
    assert (vectors["plain"] - alone).norm() < 1e-9 * (alone - start).norm()
    lines = [json.loads(line) for line in (folder / "plain/metrics.jsonl").read_text().splitlines()]
    last = {line["name"]: line for line in lines}
    for name in ("train/loss", "train/grad_norm", "train/label_tokens"):
        assert last[name]["value"] == pytest.approx(module.logged[name], rel=1e-9)
    assert last["train/loss"]["tokens"] == module.tokens_seen


def test_two_ranks_resume_bitwise_each_with_its_own_random_state(results):
    folder, vectors = results
    assert torch.equal(vectors["straight"], vectors["resumed"])
    path = folder / "dropout/checkpoints/step-00000006/checkpoint.pt"
    first, second = torch.load(path, weights_only=True)["callbacks"]["Checkpointing"]["rng"]
    assert not torch.equal(first["torch"], second["torch"])


def test_two_ranks_write_each_metric_once(results):
    folder, _ = results
    lines = [json.loads(line) for line in (folder / "dropout/metrics.jsonl").read_text().splitlines()]
    keys = [(line["step"], line["name"]) for line in lines]
    assert len(keys) == len(set(keys))
    assert {step for step, _ in keys} == {1, 5, 9}
