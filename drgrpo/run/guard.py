"""What keeps a long run safe from outside: orders to stop, time limits, hangs."""

import faulthandler
import os
import signal
import sys
import threading
import time


class Stopper:
    """Notices SIGTERM, SIGUSR1 and a time limit; the loop asks after every step, saves, and ends in
    good order. A second signal of the same kind acts as it would without us."""

    def __init__(self, max_hours: float = 0.0):
        self.reason: str | None = None
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self.max_hours = max_hours
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._notice)

    def _notice(self, number, frame) -> None:
        self.reason = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def asked(self) -> str | None:
        """Why to stop now, or None."""
        if time.monotonic() > self.deadline:
            self.reason = self.reason or f"--max-hours {self.max_hours:g}"
        return self.reason


class Watchdog:
    """Ends the process when one phase takes longer than `minutes`, after saying which one on which
    rank, and where every thread is. A hung collective has no other way to be found: all ranks but
    one are innocent and wait too."""

    def __init__(self, rank: int, minutes: float, exit=os._exit):
        self.rank, self.limit, self.exit = rank, 60 * minutes, exit
        self.phase, self.since = "setup", time.monotonic()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def _watch(self) -> None:
        while (left := self.since + self.limit - time.monotonic()) > 0:
            time.sleep(min(left, 30.0))
        print(
            f"watchdog: rank {self.rank} has been in phase {self.phase!r} for {self.limit / 60:g} minutes; the run ends here "
            "and resumes from its last checkpoint. Raise --watchdog-minutes if that phase may take so long. Stacks follow",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        self.exit(70)
