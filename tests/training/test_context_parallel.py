import pytest
import torch

from difftune.training.context_parallel import build_context_group, require_divisible, split_batch
from tests.ranks import run_ranks
from tests.training.context_ranks import KINDS, batch_of, loss_and_gradients, train

# The acceptance of the feature: loss and gradients in float32 equal those of one process.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    run_ranks("tests.training.context_ranks", str(folder), ranks=4)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone():
    """Of one process: computed once for each case."""
    return {(kind, packed): loss_and_gradients(kind, packed) for kind in KINDS for packed in (True, False)}


def off(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_one_process(shared, alone, kind, packed, size):
    actual, expected = shared[size, kind, packed, False], alone[kind, packed]
    assert actual[1] == expected[1] > 60, "every label is counted once"
    assert off(actual[:1], expected[:1]) <= TOLERANCE
    assert off(actual[2:], expected[2:]) <= TOLERANCE


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_recomputed_blocks_and_chunks_change_nothing(shared, alone, packed):
    assert off(shared[2, "diff_v1", packed, True][2:], alone["diff_v1", packed][2:]) <= TOLERANCE


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "plain"])
def test_two_pairs_train_as_one_process_does(shared, strategy, packing):
    """Two data-parallel replicas of two ranks each, with accumulation, clipping and unequal label counts."""
    parameters, logged, counted = shared["train", strategy, packing]
    expected, expected_logged, expected_counted = train(packing)
    assert off(parameters, expected) <= TOLERANCE
    assert logged == pytest.approx(expected_logged, rel=TOLERANCE)
    assert counted["rows"] == expected_counted["rows"]
    if packing:
        assert counted["tokens"] == expected_counted["tokens"]


def test_what_cannot_be_shared_is_refused():
    batch = batch_of(packed=False)
    with pytest.raises(ValueError, match=r"teacher_indices cannot be shared: set trainer\.context_parallel_size=1"):
        split_batch({**batch, "teacher_indices": batch["labels"]}, None)
    with pytest.raises(ValueError, match="padded on the left cannot be shared"):
        split_batch({**batch, "attention_mask": batch["attention_mask"].flip(1)}, None)


def test_tensor_parallel_ranks_cannot_have_different_tokens(shared):
    assert "does not go with tensor parallelism" in shared["tensor parallel"]


def test_processes_must_divide_into_groups():
    require_divisible(2, 4)
    with pytest.raises(ValueError, match=r"context_parallel_size=2 must divide the number of processes, which is 3"):
        require_divisible(2, 3)
    with pytest.raises(ValueError, match="which is 1"):
        build_context_group(2)
