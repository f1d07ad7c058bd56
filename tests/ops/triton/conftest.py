"""The kernels run in Triton's interpreter on the CPU, and compiled where there is a GPU: the same tests, marked `gpu`.

Every buffer that they allocate is full of NaN and stands between two guard bands: what is not written is seen, and so
is what is written beside it.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

BAND = 64
SENTINEL = 77.0


def pytest_ignore_collect(collection_path: Any) -> bool | None:
    """Nothing here without Triton: it does not exist for every platform."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs kernels tests the compiled ones on a machine with a GPU; elsewhere the interpreter must work."""
    import numpy
    import triton

    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    broken = versions[0] < (3, 7) and versions[1] >= (2, 4)
    for item in items:
        if "tests/ops/triton/" in item.path.as_posix() and "device" in getattr(item, "fixturenames", ()):
            if torch.cuda.is_available():
                item.add_marker("gpu")
            elif broken:
                item.add_marker(pytest.mark.skip(reason="Triton before 3.7 does not interpret loops with numpy 2.4"))


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The buffers of this test, each with its bands, which are checked at the end."""
    from difftune.ops.triton import backward, forward

    buffers: list[torch.Tensor] = []

    def empty(*size: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        number = math.prod(shape)
        buffer = torch.full((number + 2 * BAND,), SENTINEL, dtype=dtype, device=device)
        buffer[BAND : BAND + number] = math.nan
        buffers.append(buffer)
        return buffer[BAND : BAND + number].view(shape)

    class GuardedTorch:
        """Torch as the launchers see it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def empty(*size: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
            return empty(*size, dtype=dtype, device=device)

        @staticmethod
        def empty_like(x: torch.Tensor) -> torch.Tensor:
            return empty(x.shape, dtype=x.dtype, device=x.device)

    for module in (forward, backward):
        monkeypatch.setattr(module, "torch", GuardedTorch())
    yield buffers
    for buffer in buffers:
        assert (buffer[:BAND] == SENTINEL).all() and (buffer[-BAND:] == SENTINEL).all(), "written beside a buffer"


def among_nans(x: torch.Tensor, rows: int = 3) -> torch.Tensor:
    """``x`` as a strided view, its rows apart, in memory full of NaN: what is read beside it shows."""
    shape = [size + rows for size in x.shape[:-1]] + [x.shape[-1] + 16]
    around = torch.full(shape, math.nan, dtype=x.dtype, device=x.device)
    inside = around[(*(slice(1, 1 + size) for size in x.shape[:-1]), slice(8, 8 + x.shape[-1]))]
    inside.copy_(x)
    return inside
