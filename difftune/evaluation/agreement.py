"""What ranks that evaluate apart tell one another: when to stop, what came out, what went wrong."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

_POLL_S = 0.5
_numbers = itertools.count()


class StopSign:
    """Whether this rank or any other was told to stop, or has failed, while each works on its own share.

    Ranks that work apart exchange nothing, so the news goes through the store at which the process group met: who has
    it writes it there, the others look twice a second. All ranks create the signs of a process in the same order.

    Args:
        should_stop: Whether this rank was told to. None: it never is.
        world_size: How many ranks there are; of one there is nothing to tell.
    """

    def __init__(self, should_stop: Callable[[], bool] | None, world_size: int) -> None:
        self._should_stop = should_stop
        self._key = f"difftune/stop/{next(_numbers)}"
        # torch has no public name for it.
        self._store = dist.distributed_c10d._get_default_store() if world_size > 1 else None
        self._is_up = False
        self._last_look = 0.0

    def put_up(self) -> None:
        """Stop, all of you."""
        if not self._is_up and self._store is not None:
            self._store.set(self._key, "1")
        self._is_up = True

    def is_up(self) -> bool:
        """Whether to stop; once it is, it stays so."""
        if not self._is_up and self._should_stop is not None and self._should_stop():
            self.put_up()
        if not self._is_up and self._store is not None and time.monotonic() - self._last_look > _POLL_S:
            self._is_up = self._store.check([self._key])
            self._last_look = time.monotonic()
        return self._is_up


def gather_parts(samples: list[Any], stopped: bool, seconds: float, error: Exception | None) -> "Parts":
    """What all ranks have, by rank; all of them wait here for one another. Without a process group: what this one has.

    Args:
        samples: Of this rank.
        stopped: Whether it was told to stop.
        seconds: How long it took.
        error: What it failed with.

    Raises:
        Exception: ``error`` itself where there is one; RuntimeError with its text on the other ranks.
    """
    everyone: list[Any] = [(samples, stopped, seconds, None if error is None else f"{type(error).__name__}: {error}")]
    if dist.is_initialized():
        own, everyone = everyone[0], [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    if error is not None:
        raise error
    for rank, (_, _, _, text) in enumerate(everyone):
        if text is not None:
            raise RuntimeError(f"the evaluation failed on rank {rank}: {text}")
    return Parts(everyone)


class Parts:
    """What all ranks have.

    Args:
        everyone: By rank: samples, whether it was stopped, seconds, nothing.
    """

    def __init__(self, everyone: list[Any]) -> None:
        self.samples: list[Any] = [sample for part, *_ in everyone for sample in part]
        """Those of all ranks."""
        self.stopped = any(stopped for _, stopped, *_ in everyone)
        """Whether any rank was told to stop."""
        self.seconds: float = max(seconds for _, _, seconds, _ in everyone)
        """Of the slowest rank, the same on all."""
