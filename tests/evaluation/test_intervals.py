import math

import pytest

from difftune.evaluation.intervals import wilson_interval


@pytest.mark.parametrize("n", [1, 2, 17, 200, 5000])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.9, 1.0])
def test_wilson_is_where_the_score_test_is_on_the_edge(n: int, share: float) -> None:
    """The interval holds every p at which |share - p| <= z sqrt(p (1 - p) / n): found here by bisection."""
    z = 1.959963984540054

    def inside(p: float) -> bool:
        return abs(share - p) <= z * math.sqrt(p * (1 - p) / n) + 1e-15

    def edge(outer: float) -> float:
        inner = share
        for _ in range(100):
            middle = (outer + inner) / 2
            outer, inner = (outer, middle) if inside(middle) else (middle, inner)
        return inner

    low, high = wilson_interval(share, n)
    assert low == pytest.approx(edge(0.0), abs=1e-9)
    assert high == pytest.approx(edge(1.0), abs=1e-9)


def test_the_interval_of_nothing_is_everything() -> None:
    assert wilson_interval(float("nan"), 0) == (0.0, 1.0)


def test_none_and_all_right_touch_the_ends_and_have_a_width() -> None:
    assert wilson_interval(0.0, 200)[0] == 0.0 < wilson_interval(0.0, 200)[1]
    assert wilson_interval(1.0, 200)[0] < wilson_interval(1.0, 200)[1] == 1.0
