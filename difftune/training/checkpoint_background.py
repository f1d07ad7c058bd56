"""Checkpoints that are written while the training goes on."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

log = logging.getLogger(__name__)


class BackgroundCheckpointIO(CheckpointIO):
    """Hands checkpoints to another :class:`CheckpointIO`, at once or from a copy on the CPU and in a thread.

    At most one is being written at a time: the next one waits for it. What went wrong with it is raised by
    :meth:`finish`, which says so once.

    Args:
        io: What writes and reads.
    """

    def __init__(self, io: CheckpointIO) -> None:
        self.io = io
        self._thread: ThreadPoolExecutor | None = None
        self._in_flight: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What Lightning collected.
            path: The folder.
            storage_options: ``{"background": True}`` returns as soon as the tensors are copied. None: when it is
                written.

        Raises:
            OSError: As the other one does; of a checkpoint before this one too.
        """
        self.finish()
        if not (storage_options or {}).get("background"):
            self.io.save_checkpoint(checkpoint, path)
            return
        copy = copy_to_cpu(checkpoint)
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight = self._thread.submit(self.io.save_checkpoint, copy, path)

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            OSError: If the last one could not be written.
        """
        future, self._in_flight = self._in_flight, None
        if future is not None:
            future.result()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As the other one."""
        return self.io.load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """As the other one."""
        self.io.remove_checkpoint(path)

    def teardown(self) -> None:
        """Wait for what is being written; a failure is logged."""
        try:
            self.finish()
        # Whatever ends the training, a rank that died for one, is raised where it happens; this is only told.
        except Exception as error:
            log.error("the last checkpoint was NOT saved: %s", error)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def copy_to_cpu(value: Any) -> Any:
    """Copy everything in a checkpoint, tensors to the CPU; those that share their memory share it in the copy too."""
    return _copy(value, {})


def _copy(value: Any, done: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # Two names of one weight are two tensors in a state dict.
        local = getattr(value, "_local_tensor", value)
        key = (local.device, local.data_ptr(), local.dtype, value.shape, value.stride())
        if local.numel() == 0:
            return value.detach().to("cpu", copy=True)
        if key not in done:
            done[key] = value.detach().to("cpu", copy=True)
        return done[key]
    if isinstance(value, dict):
        return {key: _copy(item, done) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item, done) for item in value)
    return value
