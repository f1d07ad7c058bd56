import os
import signal
import threading
from contextlib import suppress

import pytest

from difftune.interruption import raise_pending, raising
from difftune.training.preemption import Preemption


@pytest.fixture(autouse=True)
def plain_handlers() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_that_the_interruption_was_turned_into_is_the_interruption_again() -> None:
    with pytest.raises(SystemExit) as raised, raising(signal.SIGTERM, lambda: SystemExit(143)):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            raise ValueError("could not determine the shape") from None
    assert raised.value.code == 143
    assert str(raised.value.__cause__) == "could not determine the shape"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interruption_that_was_caught_is_raised_at_the_end() -> None:
    went_on = False
    with pytest.raises(KeyboardInterrupt), raising(signal.SIGINT, KeyboardInterrupt):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            went_on = True
    assert went_on
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_cannot_be_taken_back_does_not_begin_after_an_interruption_that_was_lost() -> None:
    begun = False
    with (
        pytest.raises(SystemExit),
        raising(signal.SIGTERM, lambda: SystemExit(143)),
        raising(signal.SIGINT, KeyboardInterrupt),
    ):
        raise_pending()
        with suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        raise_pending()
        begun = True
    assert not begun
    raise_pending()


def test_a_second_ctrl_c_of_an_orderly_stop_is_known_too() -> None:
    with pytest.raises(KeyboardInterrupt), raising(signal.SIGINT, KeyboardInterrupt), Preemption((signal.SIGINT,)):
        os.kill(os.getpid(), signal.SIGINT)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None


def test_without_a_signal_an_error_stays_what_it_is() -> None:
    with pytest.raises(KeyError, match="mine") as raised, raising(signal.SIGTERM, lambda: SystemExit(143)):
        raise KeyError("mine")
    assert raised.value.__cause__ is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_in_a_thread_nothing_changes() -> None:
    found = []

    def work() -> None:
        with raising(signal.SIGTERM, lambda: SystemExit(143)):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with raising(signal.SIGINT, KeyboardInterrupt):
            inside = signal.getsignal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert inside == signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
