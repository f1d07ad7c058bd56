import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from difftune.shard_files import SHARDS, ShardedTensors, is_sharded


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    return {
        "model.norm.weight": torch.randn(7),
        "model.head.weight": torch.randn(3, 5).bfloat16(),
        "optimizer_0.model.norm.weight.step": torch.tensor(3.0),
    }


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    dcp.save(dict(tensors), checkpoint_id=folder / SHARDS, no_dist=True)
    return folder


def test_tensors_are_read_whole_without_processes(folder, tensors):
    assert is_sharded(folder) and not is_sharded(folder / SHARDS)
    stored = ShardedTensors(folder)
    read = stored.read(stored)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(tensor, read[name]) and tensor.dtype == read[name].dtype for name, tensor in tensors.items())


def test_tensors_are_read_one_by_one(folder, tensors):
    stored = ShardedTensors(folder)
    assert torch.equal(stored["model.norm.weight"], tensors["model.norm.weight"])
    assert stored.read(["model.head.weight"]).keys() == {"model.head.weight"}
    assert len(stored) == 3 and set(stored) == tensors.keys()


def test_shapes_and_dtypes_are_told_without_reading(folder, tensors):
    described = ShardedTensors(folder).described
    assert all(tensor.is_meta for tensor in described.values())
    assert {n: (t.shape, t.dtype) for n, t in described.items()} == {n: (t.shape, t.dtype) for n, t in tensors.items()}


def test_tensors_are_filled_in_place(folder, tensors):
    mine = torch.zeros(7)
    ShardedTensors(folder).read_into({"model.norm.weight": mine})
    assert torch.equal(mine, tensors["model.norm.weight"])


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_metadata_that_would_run_code_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "evil")
    (tmp_path / "evil" / SHARDS / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match=r"is not what .* writes: it asks for posix\.system"):
        ShardedTensors(tmp_path / "evil")
    assert not (tmp_path / "harmed").exists()
