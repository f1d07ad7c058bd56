"""Two ranks learn from a teacher what one process learns; under FSDP2 the teacher is sharded like the student."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.distill_ranks import SCENARIOS, build_teacher, train

CASES = ["ddp:llama", "fsdp:llama", "fsdp:tied", "fsdp:ours"]
OWN = ["ddp:on_policy", "fsdp:on_policy", "fsdp:on_policy_layers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill_ranks")
    for case in (*CASES, *OWN):
        scenario = case.partition(":")[2]
        build_teacher(**SCENARIOS[scenario]).save_pretrained(folder / f"teacher-{scenario}", max_shard_size="20KB")
    run_ranks("tests.training.distill_ranks", str(folder), *CASES, *OWN, ranks=2)
    return folder


def results(folder, case, rank=0):
    return torch.load(folder / f"{case.replace(':', '-')}-{rank}.pt", weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(folder, case):
    two, one = results(folder, case), train("auto", 1, **SCENARIOS[case.partition(":")[2]])
    assert len(one["loss"]) == 5
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(two["norm"], one["norm"], rtol=1e-4, atol=0)
    for name in ("train/divergence", "train/cross_entropy", "train/label_tokens"):
        assert two["logged"][name] == pytest.approx(one["logged"][name], rel=1e-5)
    # Under FSDP2 each rank has read its shards of it, and computed its buffers.
    assert two["teacher"].keys() == one["teacher"].keys()
    for name, tensor in one["teacher"].items():
        assert torch.equal(two["teacher"][name], tensor), name


def test_the_teacher_is_sharded_where_the_student_is(folder):
    for case in (*CASES, *OWN):
        names = results(folder, case)["sharded"]
        assert (len(names) > 0) == case.startswith("fsdp")
        if case.startswith("fsdp"):
            assert {"model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"} <= set(names)


def test_two_ranks_learn_from_their_own_texts_and_stay_equal(folder):
    first, second = (results(folder, "ddp:on_policy", rank) for rank in (0, 1))
    assert first["logged"]["train/on_policy_tokens"] == second["logged"]["train/on_policy_tokens"]
    for name, parameter in first["parameters"].items():
        assert torch.equal(parameter, second["parameters"][name])
    plain = results(folder, "ddp:llama")["loss"]
    assert torch.equal(first["loss"][0], plain[0]), "the first batch is of the data"
    assert not torch.equal(first["loss"][1:], plain[1:])


@pytest.mark.parametrize("case", OWN[1:])
def test_a_sharded_student_writes_and_learns_what_a_whole_one_does(folder, case):
    sharded, whole = results(folder, case), results(folder, OWN[0])
    torch.testing.assert_close(sharded["loss"], whole["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(sharded["norm"], whole["norm"], rtol=1e-4, atol=0)
