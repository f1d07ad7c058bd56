"""A sample of the campaign of wrong inputs; `make test-faults` tries them all."""

import pytest

from tests.bad_inputs import AREAS
from tests.bad_inputs.case import Case, fit
from tests.bad_inputs.runner import import_everything, run_cases

SAMPLE = [case for cases in AREAS.values() for case in cases if not case.copies][::12]


def test_the_campaign_has_what_it_promises() -> None:
    names = [(area, case.name) for area, cases in AREAS.items() for case in cases]
    assert len(names) >= 250 and len(set(names)) == len(names) and min(map(len, AREAS.values())) >= 20


def test_a_sample_of_wrong_inputs_is_refused_and_leaves_nothing_behind() -> None:
    import_everything()
    failed = [verdict for verdict in run_cases(SAMPLE) if verdict.faults]
    assert not failed, "\n".join(f"{verdict.case.name}: {verdict.faults}\n{verdict.output}" for verdict in failed)


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (Case("a right input", ("fit", "--help"), ()), "silent acceptance"),
        (Case("another message", ("fti",), ("no such word",)), "does not say"),
        (Case("a traceback", ("fti", "--debug"), ("fti",)), "traceback"),
        (fit("a file", "seed=-1", says=("seed",), prepare=None), None),
    ],
)
def test_the_campaign_sees_what_it_looks_for(case: Case, fault: str | None) -> None:
    (verdict,) = run_cases([case])
    assert verdict.faults == [] if fault is None else any(fault in found for found in verdict.faults)
