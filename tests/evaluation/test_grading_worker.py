import pytest

from difftune.evaluation.grading_worker import verdict_of


@pytest.mark.parametrize(
    ("prediction", "gold", "verdict"),
    [
        (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", "correct"),
        (r"\boxed{x+1}", r"\boxed{1+x}", "correct"),
        (r"\boxed{x+1}", r"\boxed{x+2}", "wrong"),
        ("nothing here", r"\boxed{1}", "unparsed"),
        ("", r"\boxed{1}", "unparsed"),
        # The gold answer decides the form, so the two must not change places.
        ("$a^2+b=0$", "$0$", "correct"),
        ("$0$", "$a^2+b=0$", "wrong"),
    ],
)
def test_the_verdict_is_math_verifys(prediction: str, gold: str, verdict: str) -> None:
    assert verdict_of(prediction, gold) == verdict
