import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

from lt_train.runtime.interruption import Interrupted, end_at_sigterm, raising_interrupted, sigterm_held


@pytest.fixture(autouse=True)
def ctrl_c_is_not_ignored() -> Iterator[None]:
    """A shell ignores it in background jobs, and they hand that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_raises_past_every_except_exception() -> None:
    def library() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except (Exception, KeyboardInterrupt):
            pytest.fail("a library took the signal for an error of its own")

    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$") as stopped, raising_interrupted():
        library()
    assert stopped.value.exit_code == 143


def test_ctrl_c_twice_ends_a_cleanup_that_takes_long() -> None:
    with pytest.raises(Interrupted) as stopped, raising_interrupted():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
    assert isinstance(stopped.value.__context__, Interrupted)


def test_a_second_sigterm_does_not_end_the_cleanup_after_the_first() -> None:
    cleaned = False
    with pytest.raises(Interrupted), raising_interrupted():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned = True
    assert cleaned


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_an_object_is_destroyed_is_not_lost(number: int) -> None:
    """Python drops every exception there."""

    class Destroyed:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with pytest.raises(Interrupted) as stopped, raising_interrupted():
        Destroyed()
        time.sleep(5)
    assert stopped.value.number == number


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with raising_interrupted():
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with raising_interrupted():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def _begin_late_and_wait(ready) -> None:
    time.sleep(0.2)
    end_at_sigterm()
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("early", [True, False], ids=["before it began", "while it waits"])
def test_a_forked_process_ends_at_sigterm_whenever_it_comes(early: bool) -> None:
    forking = multiprocessing.get_context("fork")
    ready = forking.Event()
    with raising_interrupted():
        with sigterm_held():
            process = forking.Process(target=_begin_late_and_wait, args=(ready,))
            process.start()
        if not early:
            assert ready.wait(10)
        os.kill(process.pid, signal.SIGTERM)
        process.join(10)
        assert process.exitcode == -signal.SIGTERM
        with pytest.raises(Interrupted):  # and the process that forked is still stopped by one
            signal.raise_signal(signal.SIGTERM)
