import math

import pytest
import torch

from difftune.verification.budget import Deviation, deviation, wider


def test_twice_the_plain_error_and_four_units_in_the_last_place_are_allowed():
    truth = torch.tensor([1.0, -8.0], dtype=torch.float64)
    plain = torch.tensor([1.0, -8.0]) + torch.tensor([0.25, 0.0])
    found = deviation("x", torch.tensor([1.0, -8.5]), plain, truth)
    assert found.error == 0.5 and found.plain_error == 0.25
    assert found.budget == 0.5 + 4 * torch.finfo(torch.float32).eps * 8
    assert found.holds and not deviation("x", torch.tensor([1.0, -8.75]), plain, truth).holds


def test_a_scale_replaces_the_largest_value():
    one = torch.ones(1)
    assert deviation("x", one, one, one.double(), scale=1000.0).budget == 4000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_holds(bad):
    one = torch.ones(1)
    found = deviation("x", one * bad, one, one.double())
    assert not found.holds and math.isnan(found.error) and found.share == math.inf


def test_another_shape_never_holds():
    found = deviation("x", torch.ones(2), torch.ones(3), torch.ones(3))
    assert not found.holds and found.name == "x of shape (2,), not (3,),"


def test_nothing_to_compare_holds():
    assert deviation("x", torch.ones(0), torch.ones(0), torch.ones(0)).holds


def test_where_nothing_is_allowed_nothing_holds_but_zero():
    assert Deviation("x", 0.0, 0.0, 0.0).holds and Deviation("x", 0.0, 0.0, 0.0).share == 0
    assert not Deviation("x", 1e-30, 0.0, 0.0).holds and Deviation("x", 1e-30, 0.0, 0.0).share == math.inf


def test_the_truth_is_wider_than_what_is_tested():
    assert [wider(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]
