"""A change that makes a kernel spill more registers, or need more memory than a GPU has, fails here, without one."""

import json

import pytest
import triton

from tests.ops.triton.resources import KERNELS, RECORD, SHARED_LIMIT, count, counted_by

NAMES = [f"sm_{arch} {name} {kind} D={D}" for arch, name, kind, D in KERNELS]


@pytest.fixture(scope="module")
def measured():
    return counted_by("tests.ops.triton.resources")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_needs_no_more_than_what_was_recorded(measured, name):
    arch, now = int(name[3:5]), measured[name]
    assert now["shared_bytes"] <= SHARED_LIMIT[arch]
    assert not now["warnings"], "ptxas puts waits between the products"
    # ptxas falls to 32 registers where a tile is far too large.
    assert now["registers"] > 32
    assert (now["hgmma"] > 0) == (arch == 90) and (now["hmma"] > 0) == (arch == 80)
    recorded = json.loads(RECORD.read_text()).get(triton.__version__)
    if recorded is None:
        pytest.skip(f"nothing recorded for Triton {triton.__version__}: python -m tests.ops.triton.resources --record")
    then = recorded[name]
    assert sum(now["spills_in_main_loops"]) <= sum(then["spills_in_main_loops"])
    assert now["spill_bytes"] <= then["spill_bytes"]
    assert now["shared_bytes"] <= then["shared_bytes"]


def test_what_is_recorded_is_what_is_measured():
    recorded = json.loads(RECORD.read_text())
    assert recorded and all(set(kernels) == set(NAMES) for kernels in recorded.values())


def test_instructions_are_counted_whole():
    code = ["LDL.LU R1, [R1]", "LDG.E R2, desc[UR4]", "STL [R1], R2", "HGMMA.64x64x16.F32.BF16 R24", "HMMA.16816.F32"]
    assert count(code, r"LDL\S*|STL\S*") == 2
    assert (count(code, r"HGMMA\S*"), count(code, r"HMMA\S*")) == (1, 1)
