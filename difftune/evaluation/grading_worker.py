"""The process in which math-verify runs: it may hang or swallow memory, so it is one that can be killed.

Imports nothing of difftune and no torch: it starts in half a second, and its memory limit is its own.
"""

import logging
import os
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path

_POLL_S = 2.0


def main(fd: int, parent: int, memory_bytes: int, timeout_s: float) -> None:
    """Serve requests until the parent closes the connection, or is gone.

    A request is a list of pairs (prediction, gold); for each pair one verdict is sent back as soon as it is known.

    Args:
        fd: Descriptor of the connection to the parent.
        parent: Process id of the parent.
        memory_bytes: Address space that comparisons may take on top of the imported libraries.
        timeout_s: Processor time for one pair; SIGPROF ends the process that takes longer.
    """
    connection = Connection(fd)
    # Its own time limits are signals, which the parent's clock replaces; it would warn about that.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    verdict_of(r"\boxed{1}", r"\boxed{1}")  # imports, and compiles the expressions, before the limit is set
    limit = _address_space("VmSize") + memory_bytes
    _set_limit(resource.RLIMIT_AS, limit)
    # Its default, which ends the process also in the middle of compiled code.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    connection.send("ready")
    while True:
        # A child forked by the parent may hold the other end open: ask who the parent is, besides waiting for the end.
        while not connection.poll(_POLL_S):
            if os.getppid() != parent:
                return
        try:
            pairs = connection.recv()
        except EOFError:
            return
        for prediction, gold in pairs:
            signal.setitimer(signal.ITIMER_PROF, timeout_s)
            verdict = verdict_of(prediction, gold)
            signal.setitimer(signal.ITIMER_PROF, 0)
            # sympy and math-verify swallow a MemoryError, so look whether the limit was all but reached.
            if _address_space("VmPeak") > limit - memory_bytes // 8:
                connection.send("killed")
                return
            connection.send(verdict)


def verdict_of(prediction: str, gold: str) -> str:
    """math-verify's verdict on a pair: "correct", "wrong", or "unparsed" if it finds nothing in the prediction.

    Args:
        prediction: A text with the answer to be judged, usually one box.
        gold: A text with the right answer.
    """
    from math_verify import parse, verify

    answers = parse(prediction, parsing_timeout=None)
    if not answers:
        return "unparsed"
    # The order matters to math-verify: the form of the gold answer decides what is compared.
    right = verify(parse(gold, parsing_timeout=None), answers, timeout_seconds=None)
    return "correct" if right else "wrong"


def _set_limit(kind: int, value: int) -> None:
    """Lower the soft limit, below a hard limit that may exist already."""
    hard = resource.getrlimit(kind)[1]
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (soft, hard))


def _address_space(field: str) -> int:
    """A figure of /proc/self/status in bytes; 0 where there is none (macOS, which enforces no such limit either)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))
