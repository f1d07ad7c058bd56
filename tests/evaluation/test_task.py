import time

import pytest
import torch
from torch import nn

from difftune.evaluation.task import Clock, ItemTask, evaluation_mode, share, without_nan
from tests.evaluation.toy_task import Square, SquareTask

MODEL = nn.Linear(1, 1)


def indices(samples: list[Square]) -> list[int]:
    return sorted(sample.index for sample in samples)


def test_the_parts_of_all_ranks_are_the_whole() -> None:
    parts = [indices(SquareTask(7).run(MODEL, None, part=(rank, 3))) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]


def test_items_that_were_done_are_kept_and_not_done_again() -> None:
    task = SquareTask(6)
    samples = task.run(MODEL, None, done=[Square(1, 100), Square(2, 200), Square(3, 300)])
    assert task.done == [[0], [4, 5]], "the blocks are those of an uninterrupted run"
    assert indices(samples) == [0, 1, 2, 3, 4, 5]
    assert {sample.index: sample.value for sample in samples}[2] == 200


def test_samples_come_block_by_block_and_nothing_begins_when_the_time_is_over() -> None:
    blocks: list[list[int]] = []
    task = SquareTask(9)
    samples = task.run(
        MODEL, None, on_block=lambda new: blocks.append(indices(new)), should_stop=lambda: len(blocks) == 2
    )
    assert blocks == [[0, 1], [2, 3]] and indices(samples) == [0, 1, 2, 3]
    assert not task.summarise(samples).complete
    assert SquareTask(3).run(MODEL, None, deadline=time.monotonic() - 1) == []


def test_modes_come_back_module_by_module_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model.train()
    model[0].eval()
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, False, True]


def test_the_order_by_default_is_drawn_and_always_the_same() -> None:
    blocks = ItemTask().blocks(list(range(50)))
    assert sorted(index for (index,) in blocks) == list(range(50)) and blocks != [[index] for index in range(50)]
    assert blocks == ItemTask().blocks(list(range(50)))


def test_a_clock_that_rang_stays_so() -> None:
    answers = iter([False, True, False])
    clock = Clock(lambda: next(answers), None)
    assert [clock.is_over() for _ in range(3)] == [False, True, True]


def test_nan_is_a_dash_for_readers_and_null_for_machines() -> None:
    assert (share(0.25), share(float("nan"))) == ("0.250", "-")
    assert without_nan({"a": float("nan"), "b": [1], "c": 0.5}) == {"a": None, "b": [1], "c": 0.5}
