"""Several ranks train what one process trains: FSDP2 and DDP over gloo, fp32."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.scale_ranks import SCENARIOS, train

TOLERANCE = 1e-5
ON_TWO = ["fsdp:full", "fsdp:lora", "fsdp:tied", "fsdp:accumulation", "fsdp:diff_v2", "ddp:full", "ddp:accumulation"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks("tests.training.scale_ranks", str(folder), *ON_TWO, ranks=2)
    return folder


@pytest.fixture(scope="module")
def alone():
    done = {}

    def look_up(scenario):
        if scenario not in done:
            done[scenario] = train("auto", 1, **SCENARIOS[scenario])
        return done[scenario]

    return look_up


def assert_same_training(several, one):
    assert (several["loss"] - one["loss"]).abs().max() <= TOLERANCE
    assert (several["norm"] - one["norm"]).abs().max() <= TOLERANCE * one["norm"].max()
    for name, expected in one["parameters"].items():
        assert (several["parameters"][name] - expected).abs().max() <= TOLERANCE, name
    assert several["counted"] == one["counted"]
    assert len(one["loss"]) == len(several["loss"])


@pytest.mark.parametrize("scenario", ON_TWO)
def test_two_ranks_train_what_one_process_trains(two_ranks, alone, scenario):
    name = scenario.partition(":")[2]
    several = torch.load(two_ranks / f"{scenario.replace(':', '-')}-2.pt")
    assert_same_training(several, alone(name))


def test_everything_is_sharded_but_lambda(two_ranks):
    for scenario in ("full", "lora", "tied", "diff_v2"):
        results = torch.load(two_ranks / f"fsdp-{scenario}-2.pt")
        whole = results["parameters"].keys() - set(results["sharded"])
        assert whole and all("lambda_full" in name for name in whole)
        assert not any("lambda_full" in name for name in results["sharded"])


def test_four_ranks_train_what_one_process_trains(tmp_path, alone):
    run_ranks("tests.training.scale_ranks", str(tmp_path), "fsdp:three_steps", ranks=4)
    assert_same_training(torch.load(tmp_path / "fsdp-three_steps-4.pt"), alone("three_steps"))
