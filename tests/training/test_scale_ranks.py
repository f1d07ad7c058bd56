"""Several ranks train what one process trains: FSDP2, DDP and tensor parallelism over gloo, fp32."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.scale_ranks import SCENARIOS, train

TOLERANCE = 1e-5
TWENTY_STEPS = ["full", "lora", "tied", "accumulation"]
FEW_STEPS = ["diff_v2", "recomputed", "recomputed_lora", "kept_gathered", "offloaded", "three_steps"]
TENSOR = ["tensor", "tensor_diff_v2", "tensor_softmax"]
SKIPPING = ["nan_on_one_rank", "no_labels"]
FSDP = [*TWENTY_STEPS, *FEW_STEPS, *TENSOR, *SKIPPING, "patience", "bfloat16", "bfloat16_weights"]
DDP = [*TWENTY_STEPS, *SKIPPING, "patience"]
SAME = [f"fsdp:{name}" for name in (*TWENTY_STEPS, *FEW_STEPS, *TENSOR, *SKIPPING)] + [f"ddp:{name}" for name in DDP]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    names = [*(f"fsdp:{name}" for name in FSDP), *(f"ddp:{name}" for name in DDP)]
    run_ranks("tests.training.scale_ranks", str(folder), *names, ranks=2)
    return lambda strategy, name: torch.load(folder / f"{strategy}-{name}-2.pt")


@pytest.fixture(scope="module")
def alone():
    done = {}

    def look_up(scenario):
        if scenario not in done:
            done[scenario] = train("auto", 1, **SCENARIOS[scenario])
        return done[scenario]

    return look_up


def assert_same_training(several, one):
    assert torch.allclose(several["loss"], one["loss"], rtol=0, atol=TOLERANCE, equal_nan=True)
    scale = one["norm"].nan_to_num().max().item()
    assert torch.allclose(several["norm"], one["norm"], rtol=0, atol=TOLERANCE * scale, equal_nan=True)
    for name, expected in one["parameters"].items():
        assert (several["parameters"][name] - expected).abs().max() <= TOLERANCE, name
    assert all(counted == one["counted"][0] for counted in several["counted"])


@pytest.mark.parametrize("scenario", SAME)
def test_two_ranks_train_what_one_process_trains(two_ranks, alone, scenario):
    strategy, _, name = scenario.partition(":")
    assert_same_training(two_ranks(strategy, name), alone(name))


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", SKIPPING)
def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all(two_ranks, strategy, name):
    results = two_ranks(strategy, name)
    skipped = [counted[-1] for counted in results["counted"]]
    assert skipped == [1, 1]
    assert results["loss"].isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_patience_ends_all_ranks_at_the_step_where_it_ends_one(two_ranks, alone, strategy):
    results = two_ranks(strategy, "patience")
    one = alone("patience")["counted"][0]
    assert 2 < one[0] < 20
    assert results["counted"] == [one, one]


def test_everything_is_sharded_but_lambda(two_ranks):
    for scenario in ("full", "lora", "tied", "diff_v2"):
        results = two_ranks("fsdp", scenario)
        whole = results["parameters"].keys() - set(results["sharded"])
        assert whole and all("lambda_full" in name for name in whole)
        assert not any("lambda_full" in name for name in results["sharded"])


def test_layers_compute_in_the_dtype_asked_for_and_parameters_stay(two_ranks, alone):
    results, expected = two_ranks("fsdp", "bfloat16"), alone("three_steps")
    assert {parameter.dtype for parameter in results["parameters"].values()} == {torch.float32}
    difference = (results["loss"] - expected["loss"]).abs().max()
    # bfloat16 has 8 bits: a relative error of 2^-9 a value, of which a loss of 3.4 sums many.
    assert 0 < difference < 2**-9 * 3.4


def test_bfloat16_weights_train_beside_lora_and_lambda_in_float32(two_ranks, alone):
    results, expected = two_ranks("fsdp", "bfloat16_weights"), alone("bfloat16_weights")
    assert (results["loss"] - expected["loss"]).abs().max() <= 1e-4
    dtypes = {name: parameter.dtype for name, parameter in results["parameters"].items()}
    assert all((dtypes[n] == torch.float32) == ("lora_" in n or "lambda_full" in n) for n in dtypes)


def test_four_ranks_train_what_one_process_trains(tmp_path, alone):
    names = ["three_steps", "tied_three_steps", "tensor", "tensor_diff_v2", "tensor_skeleton"]
    run_ranks("tests.training.scale_ranks", str(tmp_path), *(f"fsdp:{name}" for name in names), ranks=4)
    for name in names:
        assert_same_training(torch.load(tmp_path / f"fsdp-{name}-4.pt"), alone(name))
