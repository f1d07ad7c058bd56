"""Attention logits in few bits: what is left of a model's ability, whatever the task that measures it.

The logits of every map are rounded, just before the softmax, to 2^(bits - 1) - 1 levels on either side of 0:

    step = max |z| / (2^(bits - 1) - 1),    z' = step * round(z / step)

the maximum being taken, at every forward anew, over the logits that some query may see, of a row (one query), a head,
or the tensor (all heads of one map, layer and sequence). While a text is generated, one query at a time, the three
are of that query's logits only. Nothing else is rounded.

Source:
    Ye et al., "Differential Transformer", arXiv:2410.05258, section 3.7 and Fig. 8 (dynamic absmax quantisation after
    training; the granularity is not stated).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from difftune.evaluation.attention_calls import attention_calls
from difftune.evaluation.task import Clock, ItemTask, Result, Task

NOT_QUANTIZED = 16
"""So many bits stand for the model as it is, as in the paper."""
GRANULARITIES = ("tensor", "head", "row")
PAPER = {
    "diff_v1": {16: 66.2, 8: 66.3, 6: 66.0, 4: 58.8},
    "softmax": {16: 63.4, 8: 62.7, 6: 58.9, 4: 33.9},
}
"""HellaSwag accuracy in per cent by bits, 3B models, read from the paper's Fig. 8."""


def quantize_logits(
    logits: torch.Tensor, visible: torch.Tensor, *, bits: int, granularity: str = "tensor"
) -> torch.Tensor:
    """Round logits to few bits.

    Args:
        logits: ``(B, N, T, S)``.
        visible: Bool, ``(B or 1, 1, T, S)``: the others do not count for the maximum.
        bits: 2 to 15, or 16: as they are.
        granularity: What shares a step: "tensor" (all heads of a sequence), "head" or "row".

    Returns:
        Same shape and dtype. Hidden logits come back rounded and clamped to the largest visible one.

    Raises:
        ValueError: If bits or granularity are out of range.

    Example:
        >>> z = torch.tensor([[[[7.0, 2.4, -0.4]]]])
        >>> quantize_logits(z, torch.ones(1, 1, 1, 3, dtype=torch.bool), bits=4)
        tensor([[[[7., 2., -0.]]]])
    """
    check_bits(bits)
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if bits == NOT_QUANTIZED:
        return logits
    levels = 2 ** (bits - 1) - 1
    axes = {"tensor": (1, 2, 3), "head": (2, 3), "row": (3,)}[granularity]
    absmax = logits.abs().masked_fill(~visible, 0.0).amax(dim=axes, keepdim=True)
    # Where all logits are 0, or nothing is visible, any step will do.
    step = (absmax / levels).masked_fill(absmax == 0, 1.0)
    return (logits / step).round().clamp(-levels, levels) * step


def check_bits(bits: int) -> None:
    """Raise ValueError unless it is a number of bits that can be rounded to."""
    if not 2 <= bits <= NOT_QUANTIZED:
        raise ValueError(f"bits must be 2 to 15, or 16 for the model as it is, got {bits}")


@contextmanager
def quantized_attention(model: nn.Module, *, bits: int, granularity: str = "tensor") -> Iterator[None]:
    """Round the attention logits of a model for a while; its attention is then computed by the reference.

    Args:
        model: Of ours, or with ours inside.
        bits: 2 to 15, or 16: nothing is changed.
        granularity: See `quantize_logits`.

    Raises:
        ValueError: If bits or granularity are out of range, or the model has no attention of ours.
    """
    check_bits(bits)

    def change(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return quantize_logits(logits, visible, bits=bits, granularity=granularity)

    quiet = bits == NOT_QUANTIZED
    with nullcontext() if quiet else attention_calls(model, lambda call: call.reference(change)):
        yield


@dataclass(frozen=True)
class QuantizedSample:
    """A sample of the inner task, and the bits that it was measured with."""

    index: int
    """Place of the item in this task: that of the inner task, after all items of the bits before."""
    bits: int
    """Bits of the attention logits."""
    sample: dict[str, Any]
    """What the inner task has of it."""


@dataclass(frozen=True)
class QuantizedResult:
    """The results of the inner task, by bits."""

    samples: list[QuantizedSample] = field(repr=False)
    """All samples, in order."""
    by_bits: dict[int, Result]
    """The inner task's results, as far as something was measured."""
    bits: tuple[int, ...]
    """What was asked for."""

    @property
    def complete(self) -> bool:
        """Whether the inner task is complete with all bits."""
        return set(self.by_bits) == set(self.bits) and all(result.complete for result in self.by_bits.values())

    def metrics(self) -> dict[str, float]:
        """The inner task's figures, such as `accuracy_4bit`."""
        return {
            f"{name}_{bits}bit": value
            for bits, result in self.by_bits.items()
            for name, value in result.metrics().items()
        }

    def __str__(self) -> str:
        """One line for the terminal."""
        return "; ".join(f"{bits} bits: {result}" for bits, result in self.by_bits.items()) or "not measured"

    def to_dict(self) -> dict[str, Any]:
        """The inner results by bits, ready for JSON."""
        return {"bits": {str(bits): result.to_dict() for bits, result in self.by_bits.items()}}

    def row(self) -> dict[str, str]:
        """The inner task's first figure, by bits."""
        firsts = {bits: next(iter(result.row().items())) for bits, result in self.by_bits.items()}
        return {f"{name}, {bits} bits": value for bits, (name, value) in firsts.items()}

    def tables(self) -> list[Table]:
        """The inner task's row for each number of bits."""
        if not self.by_bits:
            return []
        table = Table(title="by bits of the attention logits", title_justify="left")
        for column in ("bits", *next(iter(self.by_bits.values())).row()):
            table.add_column(column, justify="right")
        for bits, result in self.by_bits.items():
            table.add_row("not rounded" if bits == NOT_QUANTIZED else str(bits), *result.row().values())
        return [table]


@dataclass
class QuantizationTask(ItemTask[QuantizedSample]):
    """Another task, measured with attention logits of several numbers of bits.

    Raises:
        ValueError: If a number of bits or the granularity is out of range.
    """

    name: str
    """Names the task in metrics and samples."""
    inner: Task[Any]
    """What is measured."""
    bits: Sequence[int] = (16, 8, 6, 4)
    """Bits of the attention logits, one after the other; 16: as they are."""
    granularity: str = "tensor"
    """See `quantize_logits`."""

    kind: ClassVar[str] = "quantization"
    sample_type: ClassVar[type] = QuantizedSample

    def __post_init__(self) -> None:
        for bits in self.bits:
            check_bits(bits)
        if not self.bits or len(set(self.bits)) < len(self.bits):
            raise ValueError(f"bits of task {self.name!r} must be different numbers, got {list(self.bits)}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}")

    @property
    def num_items(self) -> int:
        """The items of the inner task, for each number of bits."""
        return self.inner.num_items * len(self.bits)

    def blocks(self, indices: list[int]) -> Iterable[list[int]]:
        """The inner task's blocks, for one number of bits after the other."""
        assert isinstance(self.inner, ItemTask), "checked when the task is built"
        size = self.inner.num_items
        for place in range(len(self.bits)):
            mine = [index - place * size for index in indices if index // size == place]
            for block in self.inner.blocks(mine):
                yield [index + place * size for index in block]

    def run_block(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, indices: list[int], clock: Clock
    ) -> list[QuantizedSample]:
        """A block of the inner task under rounded logits."""
        assert isinstance(self.inner, ItemTask)
        size = self.inner.num_items
        place = indices[0] // size
        bits = self.bits[place]
        with quantized_attention(model, bits=bits, granularity=self.granularity):
            samples = self.inner.run_block(model, tokenizer, [index - place * size for index in indices], clock)
        self.failure = self.inner.failure
        return [QuantizedSample(one.index + place * size, bits, dataclasses.asdict(one)) for one in samples]

    def summarise(self, samples: Iterable[QuantizedSample]) -> QuantizedResult:
        """The inner task's result for each number of bits."""
        samples = sorted(samples, key=lambda sample: sample.index)
        by_bits = {}
        for bits in self.bits:
            inner = [self.inner.sample_type(**sample.sample) for sample in samples if sample.bits == bits]
            if inner:
                by_bits[bits] = self.inner.summarise(inner)
        return QuantizedResult(samples, by_bits, tuple(self.bits))

    def close(self) -> None:
        """Let go of what the inner task holds."""
        self.inner.close()
