import pytest

from difftune.evaluation.agreement import StopSign, gather_parts


def test_a_sign_that_is_up_stays_up() -> None:
    told = [False, True, False]
    sign = StopSign(lambda: told.pop(0), 1)
    assert [sign.is_up(), sign.is_up(), sign.is_up()] == [False, True, True]


def test_a_sign_can_be_put_up() -> None:
    sign = StopSign(None, 1)
    assert not sign.is_up()
    sign.put_up()
    assert sign.is_up()


def test_one_process_keeps_its_own() -> None:
    parts = gather_parts([1, 2], True, 0.5, None)
    assert (parts.samples, parts.stopped, parts.seconds) == ([1, 2], True, 0.5)


def test_an_error_is_raised_where_it_came_from() -> None:
    error = KeyError("label")
    with pytest.raises(KeyError) as raised:
        gather_parts([], False, 0.0, error)
    assert raised.value is error
