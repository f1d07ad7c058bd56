import json
import resource
import shutil
import signal

import pytest
import torch

from difftune.training import checkpoint_io
from difftune.training.checkpoint_io import (
    AtomicCheckpointIO,
    find_damage,
    find_resumable,
    list_checkpoints,
    step_of,
)


def content(step, size=1000):
    return {"global_step": step, "state_dict": {"model.w": torch.arange(size) + step}, "callbacks": {}}


def save(folder, step, **extra):
    path = folder / f"step-{step:08d}"
    AtomicCheckpointIO().save_checkpoint({**content(step), **extra}, path)
    return path


def test_what_is_saved_is_loaded_and_described(tmp_path):
    path = save(tmp_path, 7, model_config={"model_type": "difftune", "hidden_size": 8})
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["model.w"], torch.arange(1000) + 7)
    assert step_of(path) == 7
    assert json.loads((path / "config.json").read_text())["hidden_size"] == 8
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint.pt", "config.json", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_an_adapter_s_config_lies_beside_its_weights_and_is_hashed(tmp_path):
    path = save(tmp_path, 7, adapter_config={"peft_type": "LORA"})
    assert json.loads((path / "adapter_config.json").read_text()) == {"peft_type": "LORA"}
    assert not (path / "config.json").exists()
    (path / "adapter_config.json").write_text('{"peft_type": "ROLA"}\n')
    assert find_damage(path) is not None


def test_saving_again_replaces_the_old_one(tmp_path):
    path = save(tmp_path, 7)
    AtomicCheckpointIO().save_checkpoint(content(7, size=10), path)
    assert len(AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["model.w"]) == 10
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def truncate(path):
    (path / "checkpoint.pt").write_bytes((path / "checkpoint.pt").read_bytes()[:-100])


def flip(path):
    data = bytearray((path / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "checkpoint.pt").write_bytes(data)


DAMAGES = {
    "truncated": (truncate, "checkpoint.pt has .* bytes instead of"),
    "flipped bit": (flip, "the content of checkpoint.pt has changed"),
    "missing file": (lambda path: (path / "checkpoint.pt").unlink(), "checkpoint.pt is missing"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "torn manifest": (lambda path: (path / "manifest.json").write_text('{"step": 2, '), "is not readable"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text("{}"), "is not readable"),
    "manifest of nothing": (
        lambda path: (path / "manifest.json").write_text('{"step": 2, "files": {}}'),
        "does not list checkpoint.pt",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(damage, tmp_path, caplog):
    for step in (1, 2, 10):
        save(tmp_path, step)
    hurt, message = DAMAGES[damage]
    newest = tmp_path / "step-00000010"
    assert find_damage(newest) is None
    hurt(newest)
    assert find_resumable(tmp_path) == tmp_path / "step-00000002"
    assert "falling back" in caplog.text and "step-00000010 (" in caplog.text
    with pytest.raises(ValueError, match=f"cannot be resumed from: .*{message}"):
        AtomicCheckpointIO().load_checkpoint(newest)


def test_only_damaged_checkpoints_are_an_error_none_is_a_fresh_start(tmp_path):
    assert find_resumable(tmp_path / "absent") is None
    truncate(save(tmp_path, 3))
    with pytest.raises(ValueError, match="no usable checkpoint: step-00000003"):
        find_resumable(tmp_path)


def test_unfinished_and_set_aside_folders_are_not_checkpoints(tmp_path):
    save(tmp_path, 3)
    for name in (".tmp-step-00000009", "abandoned-step-00000009", "step-9.bak", "best"):
        shutil.copytree(tmp_path / "step-00000003", tmp_path / name)
    assert list_checkpoints(tmp_path) == [tmp_path / "step-00000003"]


@pytest.mark.parametrize("path", ["absent", "a-file"])
def test_what_is_no_checkpoint_is_refused(path, tmp_path):
    (tmp_path / "a-file").write_text("")
    with pytest.raises(ValueError, match=r"does not exist|not a checkpoint folder"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / path)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path = save(tmp_path, 1, evil=tmp_path)
    with pytest.raises(Exception, match=r"weights_only|Weights only|WeightsUnpickler"):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(where, tmp_path, monkeypatch):
    path = save(tmp_path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    if where == "write":
        original, calls = checkpoint_io.HashingFile.__init__, iter(range(1000))

        class FullDisk:
            def write(self, data):
                return full() if next(calls) > 3 else len(data)

        monkeypatch.setattr(checkpoint_io.HashingFile, "__init__", lambda self, file: original(self, FullDisk()))
    elif where == "fsync":
        monkeypatch.setattr(checkpoint_io.os, "fsync", full)
    else:
        monkeypatch.setattr(checkpoint_io.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert find_resumable(tmp_path) == path


def test_a_write_that_the_kernel_refuses_is_an_oserror(tmp_path):
    # A limit on the size of files is a full disk that needs no privileges: write() fails half way.
    path = save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            AtomicCheckpointIO().save_checkpoint(content(2, size=200_000), tmp_path / "step-00000002")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert find_resumable(tmp_path) == path


def test_removing_leaves_nothing(tmp_path):
    AtomicCheckpointIO().remove_checkpoint(save(tmp_path, 1))
    assert list(tmp_path.iterdir()) == []
