"""A task that counts: item n is measured as n squared."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.table import Table

from difftune.evaluation.task import Clock, ItemTask


@dataclass
class Square:
    index: int
    value: int


@dataclass
class Squares:
    samples: list[Square]
    size: int

    @property
    def complete(self) -> bool:
        return len(self.samples) == self.size

    def metrics(self) -> dict[str, float]:
        return {"sum": float(sum(sample.value for sample in self.samples))}

    def row(self) -> dict[str, str]:
        return {"sum": f"{self.metrics()['sum']:.0f}"}

    def tables(self) -> list[Table]:
        return []

    def to_dict(self) -> dict[str, Any]:
        return self.metrics()

    def __str__(self) -> str:
        return f"sum {self.metrics()['sum']}"


class SquareTask(ItemTask[Square]):
    """Squares of 0 to size - 1, two a block; `act` is called before each block with the number of blocks so far."""

    kind: ClassVar[str] = "squares"
    sample_type: ClassVar[type] = Square

    def __init__(self, size: int = 5, name: str = "squares", act: Callable[[int], None] = lambda count: None) -> None:
        self.name, self.size, self.act = name, size, act
        self.done: list[list[int]] = []
        self.closed = False

    @property
    def num_items(self) -> int:
        return self.size

    def blocks(self, indices: list[int]) -> list[list[int]]:
        return [indices[start : start + 2] for start in range(0, len(indices), 2)]

    def run_block(self, model: Any, tokenizer: Any, indices: list[int], clock: Clock) -> list[Square]:
        self.act(len(self.done))
        assert not model.training
        self.done.append(indices)
        return [Square(index, index * index) for index in indices]

    def summarise(self, samples: Iterable[Square]) -> Squares:
        return Squares(sorted(samples, key=lambda sample: sample.index), self.size)

    def close(self) -> None:
        self.closed = True
