"""The initial values of a fresh model one tensor at a time, bitwise those of the whole model.

Initialisation draws from one random stream, so a value depends on everything that was drawn before it. The model is
therefore built without memory while its operations are written down; then those that draw are run again, each on a
tensor of its own that is let go at once, unless it is what a parameter begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_CREATES = (torch.ops.aten.zeros.default, torch.ops.aten.ones.default, torch.ops.aten.full.default)


class _Step(NamedTuple):
    """An operation that gave a tensor values."""

    function: Any
    tensor: torch.Tensor
    arguments: tuple[Any, ...]

    @property
    def storage(self) -> int:
        return self.tensor.untyped_storage()._cdata

    @property
    def draws(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.function.tags

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the storage keeps an earlier value."""
        return self.tensor.untyped_storage().nbytes() == self.tensor.nbytes


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            assert not kwargs, f"{func} is not known to initialise anything"
            self.steps.append(_Step(func, args[0], args[1:]))
        elif func in _CREATES:
            self.steps.append(_Step(func, result, args[1:2] if func is torch.ops.aten.full.default else ()))
        return result


def initial_values(build: Callable[[], nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the parameters of ``build()`` would be, from the random state of now on; one is in memory at a time.

    Args:
        build: Builds a model on the CPU, whose parameters are created by torch and set in place. It is called once, and
            what it returns has no values.

    Yields:
        Name and value of each parameter, in the order in which they are drawn; of a shared one the first name.

    Example:
        >>> values = dict(initial_values(lambda: nn.Linear(2, 3)))
        >>> {name: tuple(value.shape) for name, value in values.items()}
        {'weight': (3, 2), 'bias': (3,)}
    """
    with FakeTensorMode(), _Recorder() as recorder:
        model = build()
    steps = recorder.steps
    names = {parameter.untyped_storage()._cdata: name for name, parameter in model.named_parameters()}
    begins: dict[int, int] = {}
    ends: dict[int, list[_Step]] = {}
    for index, step in enumerate(steps):
        if step.is_whole:
            begins[step.storage], ends[step.storage] = index, []
        elif step.storage in ends:
            ends[step.storage].append(step)
    for index, step in enumerate(steps):
        is_initial = step.storage in names and begins.get(step.storage) == index
        if not is_initial and not step.draws:
            continue
        shape, stride = step.tensor.shape, step.tensor.stride()
        value = torch.empty_strided(shape, stride, dtype=step.tensor.dtype)
        _repeat(step, value)
        if not is_initial:
            continue
        for later in ends[step.storage]:
            part = later.tensor
            assert not later.draws, "a part of a parameter is drawn apart"
            _repeat(later, value.as_strided(part.shape, part.stride(), part.storage_offset()))
        yield names[step.storage], value


def _repeat(step: _Step, target: torch.Tensor) -> None:
    with torch.no_grad():
        if step.function in _CREATES:
            constants = {torch.ops.aten.zeros.default: 0, torch.ops.aten.ones.default: 1}
            target.fill_(step.arguments[0] if step.arguments else constants[step.function])
        else:
            step.function(target, *step.arguments)
