"""Checkpoints of FSDP2: saved by two ranks; resumed by one, two, four, and by other strategies; bad disks."""

import json
import shutil

import pytest
import torch

from difftune.checkpoints.folders import map_training_weights, read_training_weights
from difftune.training.checkpoint_io import AtomicCheckpointIO, find_damage, find_resumable, list_checkpoints
from tests.ranks import run_ranks
from tests.training.checkpoint_ranks import HALF, SCENARIOS, WHOLE, train

TOLERANCE = 1e-5
WORKER = "tests.training.checkpoint_ranks"
STEP = f"step-{HALF:08d}"
ON_TWO = [
    *(f"straight-fsdp-{scenario}" for scenario in SCENARIOS),
    *(f"resume-fsdp-{scenario}-straight-fsdp-{scenario}" for scenario in SCENARIOS),
    *(f"resume-fsdp-{scenario}-straight-auto-{scenario}" for scenario in SCENARIOS),
    "resume-ddp-full-straight-fsdp-full",
    "background-fsdp",
    "fulldisk-fsdp-1-waiting",
    "fulldisk-fsdp-0-background",
    "fulldisklast-fsdp-1",
]
ON_FOUR = [
    "resume-fsdp-full-straight-fsdp-full",
    "resume-fsdp-tied-straight-fsdp-tied",
    "resume-tensor-full-straight-fsdp-full",
    "straight-tensor-full",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of everything that one and two ranks did, and the curves of uninterrupted runs of one process."""
    folder = tmp_path_factory.mktemp("checkpoints")
    curves = {}
    for name, scenario in SCENARIOS.items():
        own = folder / f"straight-auto-{name}"
        own.mkdir()
        curves[name] = train(own, "auto", **scenario)
    result = run_ranks(WORKER, str(folder), *ON_TWO, ranks=2)
    (folder / "output.txt").write_text(result.output)
    return folder, curves


def curve(folder):
    return json.loads((folder / "curve.json").read_text())


def assert_same(curve, expected):
    assert len(curve) == len(expected)
    assert max(abs(a - b) for a, b in zip(curve, expected, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("saved_by", ["fsdp", "auto"])
def test_two_ranks_resume_what_two_or_one_saved_with_the_same_curve(runs, scenario, saved_by):
    folder, curves = runs
    assert_same(curve(folder / f"resume-fsdp-{scenario}-straight-{saved_by}-{scenario}"), curves[scenario][HALF:])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_one_process_resumes_what_two_saved_with_the_same_curve(runs, tmp_path, scenario):
    folder, curves = runs
    path = folder / f"straight-fsdp-{scenario}" / "checkpoints" / STEP
    assert_same(train(tmp_path, "auto", resume=path, **SCENARIOS[scenario]), curves[scenario][HALF:])


def test_ddp_resumes_what_fsdp_saved_with_the_same_curve(runs):
    folder, curves = runs
    assert_same(curve(folder / "resume-ddp-full-straight-fsdp-full"), curves["full"][HALF:])


@pytest.fixture(scope="module")
def four_ranks(runs, tmp_path_factory):
    folder, _ = runs
    own = tmp_path_factory.mktemp("four")
    for name in {name.split("-", 3)[3] for name in ON_FOUR if name.startswith("resume")}:
        (own / name).symlink_to(folder / name)
    run_ranks(WORKER, str(own), *ON_FOUR, ranks=4)
    return own


@pytest.mark.parametrize("name", [name for name in ON_FOUR if name.startswith("resume")])
def test_four_ranks_resume_what_two_saved_with_the_same_curve(runs, four_ranks, name):
    _, curves = runs
    assert_same(curve(four_ranks / name), curves[name.split("-")[2]][HALF:])


def test_one_process_resumes_what_two_groups_of_two_ranks_saved_that_share_each_layer(runs, four_ranks, tmp_path):
    _, curves = runs
    path = four_ranks / "straight-tensor-full" / "checkpoints" / STEP
    assert_same(train(tmp_path, "auto", resume=path), curves["full"][HALF:])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_sharded_checkpoint_read_whole_equals_that_of_one_process(runs, scenario):
    folder, _ = runs
    several, one = (
        AtomicCheckpointIO().load_checkpoint(folder / f"straight-{strategy}-{scenario}" / "checkpoints" / STEP)
        for strategy in ("fsdp", "auto")
    )
    assert several["state_dict"].keys() == one["state_dict"].keys()
    for name, expected in one["state_dict"].items():
        assert (several["state_dict"][name] - expected).abs().max() <= TOLERANCE, name
    (ours,), (theirs,) = several["optimizer_states"], one["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for name, expected in theirs["state"].items():
        for key, value in expected.items():
            assert (ours["state"][name][key] - value).abs().max() <= TOLERANCE, (name, key)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_weights_of_a_sharded_checkpoint_are_read_as_those_of_one_file(runs, scenario):
    folder, _ = runs
    several, one = (
        read_training_weights(folder / f"straight-{strategy}-{scenario}" / "checkpoints" / STEP)
        for strategy in ("fsdp", "auto")
    )
    assert several.keys() == one.keys()
    assert all((several[name] - tensor).abs().max() <= TOLERANCE for name, tensor in one.items())
    mapped = map_training_weights(folder / f"straight-fsdp-{scenario}" / "checkpoints" / STEP)
    assert mapped.shapes() == {name: tensor.shape for name, tensor in one.items()}


def test_a_damaged_shard_is_refused(runs, tmp_path):
    folder, _ = runs
    path = tmp_path / STEP
    shutil.copytree(folder / "straight-fsdp-full" / "checkpoints" / STEP, path)
    shard = path / "shards" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert find_damage(path) == "the content of shards/__1_0.distcp has changed since it was written"
    with pytest.raises(ValueError, match=r"shards/__1_0\.distcp is not what its manifest\.json says"):
        read_training_weights(path)
    shard.unlink()
    assert find_damage(path) == "shards/__1_0.distcp is missing"
    with pytest.raises(ValueError, match=r"cannot be resumed from: shards/__1_0\.distcp is missing"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_each_rank_writes_its_share_once_and_the_manifest_lists_every_file(runs):
    folder, _ = runs
    path = folder / "straight-fsdp-tied" / "checkpoints" / STEP
    manifest = json.loads((path / "manifest.json").read_text())
    on_disk = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {"manifest.json"}
    assert manifest["files"].keys() == on_disk
    assert {"shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp", "checkpoint.pt"} <= on_disk
    sizes = [(path / "shards" / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 1.6 * min(sizes)
    assert (path / "checkpoint.pt").stat().st_size < 0.2 * sum(sizes)


def test_training_goes_on_while_a_checkpoint_is_written_and_one_is_in_flight_at_most(runs):
    folder, curves = runs
    slow = json.loads((folder / "background-fsdp" / "slow.json").read_text())
    assert slow["meanwhile"] > 0 and slow["most"] == 1
    assert_same(curve(folder / "background-fsdp"), curves["full"])
    paths = list_checkpoints(folder / "background-fsdp" / "checkpoints")
    assert [path.name for path in paths] == [f"step-{step:08d}" for step in range(2, WHOLE + 1, 2)]
    assert all(find_damage(path) is None for path in paths)
    # What a step after the copy did to the weights is not in it.
    background, waiting = (
        AtomicCheckpointIO().load_checkpoint(folder / name / "checkpoints" / STEP)["state_dict"]
        for name in ("background-fsdp", "straight-fsdp-full")
    )
    assert all(torch.equal(background[name], tensor) for name, tensor in waiting.items())


@pytest.mark.parametrize("name", ["fulldisk-fsdp-1-waiting", "fulldisk-fsdp-0-background"])
def test_a_full_disk_on_one_rank_loses_that_checkpoint_alone(runs, name):
    folder, curves = runs
    assert_same(curve(folder / name), curves["full"][:6])
    assert [path.name for path in list_checkpoints(folder / name / "checkpoints")] == ["step-00000006"]
    assert not list((folder / name / "checkpoints").glob(".tmp-*"))
    output = (folder / "output.txt").read_text()
    rank = name.split("-")[2]
    assert f"checkpoint of step 2 NOT saved ([Errno 28] rank {rank} could not save: [Errno 28] No space left" in output


def test_every_rank_raises_if_the_last_checkpoint_cannot_be_saved_on_one(runs):
    folder, _ = runs
    own = folder / "fulldisklast-fsdp-1"
    errors = [(own / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert all(error.startswith("28 [Errno 28] rank 1 could not save") for error in errors)
    assert find_resumable(own / "checkpoints").name == "step-00000002"
