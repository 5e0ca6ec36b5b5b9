"""Orders to stop are noticed, a hang is named and ended, non-finite gradients are counted."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from drgrpo.pack import pack
from drgrpo.run import guard
from drgrpo.run.guard import NonFinite, Stopper, Watchdog


@pytest.fixture(autouse=True)
def default_handlers(restored_handlers):
    """The tests send this process signals."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_is_noticed_once_and_then_acts_as_usual(number):
    stopper = Stopper()
    assert stopper.reason is None
    os.kill(os.getpid(), number)
    assert stopper.reason == number.name
    assert signal.getsignal(number) == signal.SIG_DFL


def test_the_time_limit(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(guard, "time", clock)
    limited, free = Stopper(max_hours=2.0), Stopper()
    for hours, reason in ((1.99, None), (2.01, "--max-hours 2")):
        clock.now = 1000.0 + 3600 * hours
        assert limited.reason == reason and free.reason is None


def test_a_hang_is_named_by_rank_and_phase_and_ended(capfd):
    ended, statuses = threading.Event(), []

    def exit(status):
        statuses.append(status)
        ended.set()

    watchdog = Watchdog(rank=3, minutes=0.2 / 60, exit=exit)
    watchdog.enter("sync")
    assert ended.wait(5) and statuses == [70]
    shown = capfd.readouterr().err
    assert "rank 3 has been in phase 'sync'" in shown and "--watchdog-minutes" in shown
    assert "test_guard.py" in shown, "the stacks of all threads must follow"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_new_phase_starts_the_clock_again():
    ended = threading.Event()
    watchdog = Watchdog(rank=0, minutes=0.4 / 60, exit=lambda status: ended.set())
    for phase in ("rollout", "train", "sync"):
        watchdog.enter(phase)
        assert not ended.wait(0.2)
    watchdog.rest()
    assert not ended.wait(0.6), "what follows the last phase may take as long as it takes"


def test_zero_minutes_is_never():
    before = threading.active_count()
    Watchdog(rank=0, minutes=0)
    assert threading.active_count() == before


def test_skipped_steps_keep_their_batches_and_three_in_a_row_end_the_run(tmp_path):
    nonfinite, batches = NonFinite(tmp_path, rank=1), [pack([])]
    for step, applied in enumerate((False, False, True, False, False)):
        nonfinite.check(applied, batches, step, 0)
    with pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row.*lower --lr"):
        nonfinite.check(False, batches, 5, 2)
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert len(kept) == 5 and kept[-1] == "nonfinite-step-000005-update-2-rank-1.pt"
    assert torch.load(tmp_path / kept[0], weights_only=False)[0].max_seqlen == 1
