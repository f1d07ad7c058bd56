"""Evaluation of a sharded model, on two ranks over gloo, against one process."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from difftune.evaluation import replicas
from tests.evaluation.replica_ranks import SCENARIOS
from tests.evaluation.scripted import tiny_model
from tests.ranks import run_ranks

WHOLE = ["whole", "diff_v2", "lora", "sampled", "kinds"]
LAYERS = ["layers", "kinds_layers"]
OTHERS = ["unwatched", "patience", "stopped", "stopped_layers", "failing", "failing_layers"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    names = [f"fsdp:{name}" for name in (*WHOLE, *LAYERS, *OTHERS)]
    run_ranks("tests.evaluation.replica_ranks", str(folder), *names, ranks=2)

    def look_up(name):
        return [torch.load(folder / f"fsdp-{name}-{rank}.pt", weights_only=False) for rank in range(2)]

    return look_up


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return lambda name: SCENARIOS[name]("auto", 1, tmp_path_factory.mktemp("alone"))


def same(actual, expected):
    """Whether results are equal but for rounding and the time they took."""
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(same(actual[k], v) for k, v in expected.items())
    if isinstance(expected, list | tuple):
        return len(actual) == len(expected) and all(map(same, actual, expected))
    if isinstance(expected, float):
        return actual == pytest.approx(expected, rel=1e-3, abs=1e-4) or (math.isnan(actual) and math.isnan(expected))
    return actual == expected


@pytest.mark.parametrize("name", [*WHOLE, *LAYERS])
def test_two_ranks_get_the_samples_and_figures_of_one_process(two_ranks, alone, name):
    first, second = two_ranks(name)
    expected = alone(name)
    assert first["samples"].keys() == expected["samples"].keys() and len(expected["samples"]) > 1
    assert same(first["samples"], expected["samples"])
    assert same(first["samples"], second["samples"])
    for (step, metrics, kept), (other_step, others, _) in zip(first["seen"], expected["seen"], strict=True):
        assert step == other_step and kept, "callback_metrics are not those of on_result"
        assert same(
            {name: value for name, value in metrics.items() if not name.endswith("/seconds")},
            {name: value for name, value in others.items() if not name.endswith("/seconds")},
        )
    assert first["seen"] == second["seen"], "the ranks could choose different checkpoints"
    assert first["how"].startswith("layers are gathered" if name in LAYERS else "each rank gathers a whole copy")


def test_the_prompts_of_that_comparison_finish_at_different_lengths(two_ranks):
    lengths = {sample["num_tokens"] for one in two_ranks("whole")[0]["samples"].values() for sample in one["sums"]}
    assert len(lengths) > 2


@pytest.mark.parametrize("name", ["whole", "layers"])
def test_training_goes_on_as_if_it_had_not_been_evaluated(two_ranks, name):
    watched, plain = two_ranks(name)[0], two_ranks("unwatched")[0]
    steps = len(watched["loss"])
    assert steps >= 2 and watched["loss"] == plain["loss"][:steps]
    assert watched["training"] == plain["training"]
    if steps == len(plain["loss"]):
        assert all(torch.equal(p, plain["parameters"][n]) for n, p in watched["parameters"].items())


@pytest.mark.parametrize("name", ["whole", "lora", "layers"])
def test_a_task_gets_plain_weights_that_are_freed_after_it(two_ranks, name):
    for found in two_ranks(name):
        assert found["watched"] == [(True, False, 0)]


def test_an_early_stop_is_the_same_on_all_ranks(two_ranks, alone):
    first, second = two_ranks("patience")
    assert len(first["loss"]) == len(second["loss"]) == len(alone("patience")["loss"]) < 9


@pytest.mark.parametrize("name", ["stopped", "stopped_layers"])
def test_a_rank_that_is_told_to_stop_stops_the_others(two_ranks, name):
    first, second = two_ranks(name)
    assert first["pending"] and second["pending"]
    assert list(first["samples"]) == list(second["samples"]) == [0]
    # 100 blocks a rank and evaluation; the second one was over for both soon after the 106th.
    assert second["blocks"] == 106 and 106 <= first["blocks"] < 200


@pytest.mark.parametrize("name", ["failing", "failing_layers"])
def test_a_rank_that_fails_ends_the_others_with_its_message(two_ranks, name):
    first, second = two_ranks(name)
    assert second["error"] == "KeyError: 'no such label'"
    assert first["error"] == "RuntimeError: the evaluation failed on rank 1: KeyError: 'no such label'"


def test_a_model_that_is_not_sharded_is_evaluated_itself():
    model = tiny_model()
    assert not replicas.is_sharded(model)
    with replicas.plain_weights(model, device=torch.device("cpu"), ranks_per_machine=1) as evaluated:
        assert evaluated.model is model and evaluated.how == ""
        evaluated.finish()
    assert all(parameter.numel() for parameter in model.parameters())


def test_a_copy_is_counted_in_the_dtypes_it_will_have():
    model = tiny_model()
    whole = sum(p.numel() for p in model.parameters())
    lambdas = sum(p.numel() for n, p in model.named_parameters() if "lambda_full" in n)
    assert replicas.replica_bytes(model, torch.device("cpu")) == 4 * whole
    assert replicas.replica_bytes(model, torch.device("cuda")) == 2 * (whole - lambdas) + 4 * lambdas


def test_the_memory_of_a_machine_is_shared_by_its_ranks(monkeypatch):
    cpu = torch.device("cpu")
    assert 0 < replicas.free_bytes(cpu, 1) < 2**50
    monkeypatch.setattr(replicas.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 2**30))
    assert [replicas.free_bytes(cpu, ranks) for ranks in (1, 4)] == [8 * 2**30, 2 * 2**30]


def test_a_twin_shares_nothing_that_an_evaluation_changes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.register_forward_hook(lambda module, arguments, output: output + 1)
    twin = replicas._twin(model, {id(p): p.detach().clone() for p in model.parameters()}, {})
    assert twin[1].weight is twin[0].weight and twin[0].weight is not model[0].weight
    x = torch.ones(1, 2)
    assert torch.equal(twin(x), model(x))
    twin.eval()
    twin[0].register_forward_hook(lambda module, arguments, output: output * 0)
    assert model.training and model[0].training and not torch.equal(twin(x), model(x))


def test_a_hook_of_a_twin_is_noted_nowhere_in_the_module():
    model = nn.Sequential(nn.Linear(2, 2))
    twin = replicas._twin(model, {id(p): p.detach().clone() for p in model.parameters()}, {})
    twin[0].register_forward_pre_hook(lambda *arguments: None, with_kwargs=True)
    twin[0].register_forward_hook(lambda *arguments: None, with_kwargs=True, always_call=True)
    assert not any(vars(model[0])[name] for name in vars(model[0]) if "_hooks" in name)


def test_a_twin_of_a_compiled_module_runs_its_own_weights():
    model = nn.Sequential(nn.Linear(2, 2))
    model.compile(backend="eager")
    model[0].compile(backend="eager")
    twin = replicas._twin(model, {id(p): torch.zeros_like(p) for p in model.parameters()}, {})
    assert torch.equal(twin(torch.ones(1, 2)), torch.zeros(1, 2))
