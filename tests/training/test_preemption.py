import os
import signal
import threading

import pytest

from dpa_jax.training.preemption import Preemption


def test_sigterm_is_noticed_between_steps_and_the_handler_given_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outside"))
    try:
        with Preemption() as preemption:
            assert not preemption.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.requested(2)
            assert preemption.requested(3)
            assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["outside"]
        with Preemption() as again:
            assert not again.requested(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_is_noticed_as_sigterm_is_and_a_second_one_stops_at_once():
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested(1) and preemption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat it
        assert preemption.signal == signal.SIGTERM


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.requested(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_installs_nothing():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work():
        with Preemption() as preemption:
            inside.append((signal.getsignal(signal.SIGTERM), preemption.requested(1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, False)]
