"""Two programs of the decode kernel fit a multiprocessor, and none spills: counted without a GPU."""

import pytest

from tests.ops.triton.decode_resources import KERNELS
from tests.ops.triton.resources import SHARED_LIMIT, counted_by


@pytest.fixture(scope="module")
def measured():
    return counted_by("tests.ops.triton.decode_resources")


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(KERNELS)), ids=[str(kernel) for kernel in KERNELS])
def test_two_programs_fit_a_multiprocessor_without_spills(measured, index):
    now = measured[index]
    # ptxas falls to 32 registers where a tile is far too large.
    assert now["spill_bytes"] == 0 and now["registers"] > 32
    assert now["products_in_loops"] > 0 and now["copies_in_loops"] > 0
    # 1 KiB of each program is the system's.
    assert 2 * (now["shared_bytes"] + 1024) <= SHARED_LIMIT[KERNELS[index][0]] + 1024
    if now["threads"] == 128:
        assert 2 * now["threads"] * now["registers"] <= 65536
