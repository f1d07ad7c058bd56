import threading

import pytest
import torch

from difftune.training.checkpoint_background import BackgroundCheckpointIO, copy_to_cpu


class Disk:
    """Keeps what is saved; to save one takes one permission."""

    def __init__(self):
        self.permissions, self.saved, self.at_once, self.most, self.error = threading.Semaphore(0), {}, 0, 0, None

    def save_checkpoint(self, checkpoint, path):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        assert self.permissions.acquire(timeout=300)
        self.at_once -= 1
        if self.error is not None:
            raise self.error
        self.saved[path] = checkpoint


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def io(disk):
    io = BackgroundCheckpointIO(disk)
    yield io
    disk.permissions.release(9)
    io.teardown()


BACKGROUND = {"background": True}


def test_what_changes_after_the_call_is_not_saved(io, disk):
    weight, counts = torch.zeros(3), [1]
    io.save_checkpoint({"weight": weight, "counts": counts}, "first", BACKGROUND)
    weight += 1
    counts.append(2)
    assert not disk.saved
    disk.permissions.release()
    io.finish()
    assert torch.equal(disk.saved["first"]["weight"], torch.zeros(3)) and disk.saved["first"]["counts"] == [1]


def test_the_next_one_waits_and_one_at_most_is_written(io, disk):
    io.save_checkpoint({}, "first", BACKGROUND)
    threading.Timer(0.2, disk.permissions.release).start()
    io.save_checkpoint({}, "second", BACKGROUND)
    assert list(disk.saved) == ["first"]
    disk.permissions.release()
    io.finish()
    assert list(disk.saved) == ["first", "second"] and disk.most == 1


def test_without_the_option_it_is_written_at_once(io, disk):
    disk.permissions.release()
    io.save_checkpoint({}, "first")
    assert list(disk.saved) == ["first"]


def test_an_error_is_raised_once_and_by_what_comes_next(io, disk):
    disk.permissions.release(2)
    disk.error = OSError(28, "No space left on device")
    io.save_checkpoint({}, "first", BACKGROUND)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({}, "second", BACKGROUND)
    io.finish()
    assert not disk.saved


def test_at_the_end_an_error_is_logged(io, disk, caplog):
    disk.permissions.release(2)
    disk.error = OSError(28, "No space left on device")
    io.save_checkpoint({}, "first", BACKGROUND)
    io.teardown()
    assert "the last checkpoint was NOT saved: [Errno 28] No space left on device" in caplog.text


def test_tied_weights_are_copied_once():
    weight = torch.randn(4, 4)
    copy = copy_to_cpu({"embedding": weight, "head": weight.detach(), "row": weight[0], "other": (weight + 0,)})
    assert copy["embedding"].data_ptr() == copy["head"].data_ptr() != weight.data_ptr()
    assert copy["row"].data_ptr() != copy["embedding"].data_ptr() and isinstance(copy["other"], tuple)
    assert all(torch.equal(copy[name], weight) for name in ("embedding", "head"))
