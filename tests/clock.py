"""A clock that goes on only when a test says so: what depends on time can be said exactly."""

from types import SimpleNamespace

import pytest


class Clock:
    """Stands in for the module `time` in the modules that are named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: str, a_look: float = 0.0) -> None:
        """Start at 1000 seconds; every look at it takes so many."""
        self.now, self.a_look = 1000.0, a_look
        ours = SimpleNamespace(monotonic=self.look, perf_counter=self.look, time=self.look, sleep=self.pass_)
        for module in modules:
            monkeypatch.setattr(f"{module}.time", ours)

    def look(self) -> float:
        """What time it is."""
        self.now += self.a_look
        return self.now

    def pass_(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
