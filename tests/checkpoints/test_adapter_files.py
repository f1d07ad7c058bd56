import json

import pytest
import torch
from safetensors.torch import load_file

from difftune.checkpoints.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_adapter


def test_views_and_shared_memory_are_written_as_they_are(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "same": whole.detach(), "column": whole[:, 1]}
    folder = write_adapter({"r": 4}, tensors, tmp_path / "adapter", "default", None, False)
    written = load_file(folder / ADAPTER_WEIGHTS)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in tensors.items())
    assert json.loads((folder / ADAPTER_CONFIG).read_text()) == {"r": 4}


def test_what_is_not_finite_is_named_and_nothing_is_written(tmp_path):
    tensors = {"fine": torch.zeros(2), "bad": torch.tensor([0.0, float("nan")])}
    with pytest.raises(ValueError, match="adapter 'default' is not saved: bad and 0 more tensors are not finite"):
        write_adapter({}, tensors, tmp_path / "adapter", "default", None, False)
    assert not list(tmp_path.iterdir())


def test_a_file_that_reads_back_otherwise_is_no_success(tmp_path, monkeypatch):
    def spoil(path):
        return {name: tensor + 1 for name, tensor in load_file(path).items()}

    monkeypatch.setattr("difftune.checkpoints.adapter_files.load_file", spoil)
    with pytest.raises(AssertionError):
        write_adapter({}, {"weight": torch.zeros(2)}, tmp_path / "adapter", "default", None, False)
    assert not (tmp_path / "adapter").exists()
