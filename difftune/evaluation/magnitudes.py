"""Exact order statistics of more numbers than can be kept: the largest by merging, the median by counting twice.

The bit pattern of a non-negative float32, read as an integer, grows with its value. The first pass over the numbers
counts them by the upper 16 bits; the second one counts those that share the median's upper bits by their lower 16.
That is the median to the last bit, from 98,304 counters.
"""

import torch

KEPT = 100
_HIGH, _LOW = 1 << 15, 1 << 16


class Magnitudes:
    """Largest magnitudes and the median of a stream that can be read twice."""

    def __init__(self) -> None:
        self.count = 0
        self.top = torch.empty(0)
        """The largest magnitudes, at most `KEPT`, falling."""
        self._by_high = torch.zeros(_HIGH, dtype=torch.int64)
        self._by_low: torch.Tensor | None = None
        self._bin, self._rank = 0, 0

    def add(self, values: torch.Tensor) -> None:
        """First pass: take in some numbers, of any shape, sign and floating type."""
        assert self._by_low is None, "the first pass has ended"
        magnitudes = values.detach().float().abs().flatten()
        largest = magnitudes.topk(min(KEPT, magnitudes.numel())).values.cpu()
        merged = torch.cat((self.top, largest))
        self.top = merged.topk(min(KEPT, merged.numel())).values
        self._by_high += torch.bincount(_bits(magnitudes) >> 16, minlength=_HIGH).cpu()
        self.count += magnitudes.numel()

    def end_first_pass(self) -> None:
        """Find where the median lies; of an even count, the lower of the two in the middle."""
        assert self.count, "nothing was counted"
        rank = (self.count - 1) // 2
        cumulated = self._by_high.cumsum(0)
        self._bin = int(torch.searchsorted(cumulated, rank, right=True))
        self._rank = rank - (int(cumulated[self._bin - 1]) if self._bin else 0)
        self._by_low = torch.zeros(_LOW, dtype=torch.int64)

    def add_again(self, values: torch.Tensor) -> None:
        """Second pass: the same numbers, in any order."""
        assert self._by_low is not None, "the first pass has not ended"
        bits = _bits(values.detach().float().abs().flatten())
        self._by_low += torch.bincount(bits[bits >> 16 == self._bin] & (_LOW - 1), minlength=_LOW).cpu()

    def median(self) -> float:
        """The median magnitude.

        Raises:
            RuntimeError: If the second pass did not bring the numbers of the first.
        """
        assert self._by_low is not None, "the first pass has not ended"
        if int(self._by_low.sum()) != int(self._by_high[self._bin]):
            raise RuntimeError(
                "the second pass over the activations did not bring the same numbers as the first: the forward of this "
                "model is not deterministic here; run it on the CPU"
            )
        low = int(torch.searchsorted(self._by_low.cumsum(0), self._rank, right=True))
        return torch.tensor(self._bin << 16 | low, dtype=torch.int32).view(torch.float32).item()

    def figures(self) -> dict[str, float]:
        """`top_1, top_2, top_3, top_10, top_100`, as far as there are so many numbers, and `median`."""
        ranks = [rank for rank in (1, 2, 3, 10, KEPT) if rank <= self.count]
        return {**{f"top_{rank}": self.top[rank - 1].item() for rank in ranks}, "median": self.median()}


def _bits(magnitudes: torch.Tensor) -> torch.Tensor:
    return magnitudes.view(torch.int32)
