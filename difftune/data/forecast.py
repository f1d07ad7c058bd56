"""What a run over some data will take, from what one micro-batch takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """Tokens, steps, hours and memory of a stage."""

    tokens_an_epoch: int
    """Positions of the rows, padding included."""
    label_tokens_an_epoch: int
    steps: int | None
    """Optimiser steps; None if only time ends the stage."""
    tokens_a_step: int
    """Positions of an optimiser step, over all devices."""
    tokens_per_s: float | None = None
    """Of one device, measured; None where nothing was."""
    peak_memory_gib: float | None = None
    """Of one micro-batch on one device, measured."""
    devices: int = 1
    complete: bool = True
    """False when streaming: what an epoch has is not known."""

    @property
    def epochs(self) -> float | None:
        """Passes over the data."""
        if self.steps is None or not self.complete:
            return None
        return self.steps * self.tokens_a_step / max(1, self.tokens_an_epoch)

    @property
    def hours(self) -> float | None:
        """Of training alone, without evaluations, if devices do not wait for one another."""
        if self.steps is None or not self.tokens_per_s:
            return None
        return self.steps * self.tokens_a_step / (self.tokens_per_s * self.devices) / 3600

    def text(self) -> str:
        """The forecast, for people."""
        lines = []
        if self.complete:
            lines.append(
                f"an epoch has {self.tokens_an_epoch:,} tokens, {self.label_tokens_an_epoch:,} of them learned"
            )
        if self.steps is not None:
            passes = "" if self.epochs is None else f": {self.epochs:.2f} passes over the data"
            lines.append(f"{self.steps:,} steps of {self.tokens_a_step:,} tokens{passes}")
        if self.tokens_per_s is not None:
            hours = (
                "" if self.hours is None else f": {self.hours:.2f} hours on {self.devices} of them, evaluations apart"
            )
            lines.append(f"measured {self.tokens_per_s:,.0f} tokens/s on one device of this machine{hours}")
        if self.peak_memory_gib is not None:
            lines.append(f"peak memory of a step on one micro-batch {self.peak_memory_gib:.2f} GiB")
        return "\n".join(lines)
