"""Orders to stop are noticed, and a hang is named and ended."""

import os
import signal
import threading
import time

import pytest

from drgrpo.run.guard import Stopper, Watchdog


@pytest.fixture(autouse=True)
def handlers():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_is_noticed_once_and_then_acts_as_usual(number):
    stopper = Stopper()
    assert stopper.asked() is None
    os.kill(os.getpid(), number)
    assert stopper.asked() == number.name
    assert signal.getsignal(number) == signal.SIG_DFL


def test_the_time_limit():
    stopper = Stopper(max_hours=0.02 / 3600)
    assert stopper.asked() is None
    time.sleep(0.03)
    assert "--max-hours" in stopper.asked()
    assert Stopper(max_hours=0).asked() is None


def test_a_hang_is_named_by_rank_and_phase_and_ended(capfd):
    ended = threading.Event()
    watchdog = Watchdog(
        rank=3,
        minutes=0.2 / 60,
        exit=lambda status: ended.set() or setattr(watchdog, "status", status),
    )
    watchdog.enter("sync")
    assert ended.wait(5)
    shown = capfd.readouterr().err
    assert "rank 3 has been in phase 'sync'" in shown and "--watchdog-minutes" in shown
    assert "test_guard.py" in shown, "the stacks of all threads must follow"
    assert watchdog.status == 70


def test_a_new_phase_starts_the_clock_anew():
    ended = threading.Event()
    watchdog = Watchdog(rank=0, minutes=0.4 / 60, exit=lambda status: ended.set())
    for phase in ("rollout", "train", "sync"):
        watchdog.enter(phase)
        assert not ended.wait(0.2)
    watchdog.limit = float("inf")


def test_zero_minutes_is_never():
    before = threading.active_count()
    Watchdog(rank=0, minutes=0)
    assert threading.active_count() == before
