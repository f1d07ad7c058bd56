from difftune.verification.budget import Deviation
from difftune.verification.claim import judged, not_tried

GOOD, WORSE = Deviation("a", 1.0, 4.0, 0.0), Deviation("b", 3.0, 4.0, 0.0)


def test_the_figures_are_those_of_the_worst():
    claim = judged("x = y", "z", [GOOD, WORSE])
    assert (claim.state, claim.found) == ("holds", "b differs by 3.0e+00, allowed 4.0e+00")


def test_one_that_fails_is_enough():
    claim = judged("x = y", "z", [GOOD, Deviation("c", 5.0, 4.0, 0.0), WORSE])
    assert (claim.state, claim.found) == ("fails", "c differs by 5.0e+00, allowed 4.0e+00")


def test_what_was_not_tried_neither_holds_nor_fails():
    assert not_tried("x = y", "z", "no GPU").state == "not tried"
