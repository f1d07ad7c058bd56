"""A signal that raises comes out as what it raised, whatever compiled code made of it on its way."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What was raised in each block that is open now, the outermost first.
_raised_in: list[list[BaseException]] = []


@contextmanager
def raising(number: int, error: Callable[[], BaseException]) -> Iterator[None]:
    """While the block runs, the signal raises the error; the block then ends with it and with nothing else.

    A handler runs wherever Python is called, also from compiled code, which may replace what it raises by an error of
    its own: while safetensors reads a tensor, torch 2.13 makes a ValueError on a shape of one interruption in five.
    What runs when an object is freed loses it altogether, and the work goes on: what cannot be taken back begins with
    :func:`raise_pending`.

    Where the signal has a handler of somebody else, or is ignored, or in a thread, which gets no signals, nothing
    changes.

    Args:
        number: Of the signal.
        error: Makes what is raised.

    Raises:
        BaseException: What ``error`` makes, if the signal came.

    Example:
        >>> with raising(signal.SIGTERM, lambda: SystemExit(143)):
        ...     pass
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(number)
    if not is_main or before not in (signal.SIG_DFL, signal.default_int_handler):
        yield
        return
    raised: list[BaseException] = []

    def leave(signum: int, frame: FrameType | None) -> None:
        raised.append(error())
        raise raised[-1]

    signal.signal(number, leave)
    _raised_in.append(raised)
    try:
        yield
    except BaseException as caught:
        if not raised or caught is raised[-1]:
            raise
        raise raised[-1] from caught
    else:
        if raised:
            raise raised[-1]  # something in the block caught it: the process was to end nevertheless
    finally:
        _raised_in.pop()
        signal.signal(number, before)


def raise_pending() -> None:
    """Raise what a signal has raised in a block of :func:`raising` around this one, if it was lost on its way.

    Raises:
        BaseException: What ``error`` made.
    """
    for raised in _raised_in:
        if raised:
            raise raised[-1]
