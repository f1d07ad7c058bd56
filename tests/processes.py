"""What the tests ask the system about processes."""

import glob
import os
import time
from pathlib import Path


def children() -> dict[int, str]:
    """Processes that this one has started and not waited for: state by id."""
    found = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            pid, _, rest = Path(path).read_text().partition(" (")
        except OSError:
            continue
        state, parent = rest.rpartition(") ")[2].split()[:2]
        if int(parent) == os.getpid():
            found[int(pid)] = state
    return found


def is_gone(pid: int, patience_s: float = 60.0) -> bool:
    """Whether a process ends; one that was killed ends when it is its turn, and then nobody may have collected it."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False
