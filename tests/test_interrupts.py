"""Signals held back while something must not be left half done."""

import signal
import threading

import pytest

from flatmin._interrupts import held

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def _handlers():
    """Both interrupt, as in the command; afterwards nothing has changed them."""
    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    after = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGTERM, before[1])
    assert after == (before[0], signal.default_int_handler)


@BOTH
def test_it_acts_at_the_end_of_the_block(number):
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        signal.raise_signal(number)
        done.append(True)
    assert done


@BOTH
def test_it_acts_where_it_is_asked_for_and_once(number):
    with held() as signals:
        signals.check()
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signals.check()
        signals.check()


def test_an_error_of_the_block_gives_way_to_it():
    with pytest.raises(KeyboardInterrupt), held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError


def test_a_block_within_a_block_leaves_it_to_the_outer():
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        with held():
            signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done


def test_what_the_program_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held() as signals:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            signals.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing():
    found = []

    def run():
        with held():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_one_that_comes_while_it_lets_go_leaves_no_handler_behind(monkeypatch):
    real = signal.signal

    def late(number, handler):
        real(number, handler)
        if handler is signal.default_int_handler and number == signal.SIGINT:
            monkeypatch.setattr(signal, "signal", real)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), held():
        monkeypatch.setattr(signal, "signal", late)
