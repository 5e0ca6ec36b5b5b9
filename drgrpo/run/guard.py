"""What keeps a long run safe: orders to stop, time limits, hangs, non-finite gradients, float16's
loss scale."""

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch.amp import GradScaler

from drgrpo.types import Batch

MAX_SKIPPED_IN_A_ROW = 3  # optimizer steps with a non-finite loss or gradient

MIN_LOSS_SCALE = 1.0
"""A gradient that overflows at this scale is not the scale's fault. Without a scale it is 1."""


class Stopper:
    """Notices SIGTERM, SIGUSR1 and a time limit. The loop asks after every step, saves, and ends.
    A second signal of the same kind acts as usual and kills the process."""

    def __init__(self, max_hours: float = 0.0) -> None:
        self._reason: str | None = None
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self.max_hours = max_hours
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    @property
    def reason(self) -> str | None:
        """Why to stop now, or None."""
        if time.monotonic() > self.deadline:
            self._reason = self._reason or f"--max-hours {self.max_hours:g}"
        return self._reason


class Watchdog:
    """Ends the process when one phase takes longer than `minutes`. First it prints the phase, the
    rank and the stack of every thread. A hung collective cannot be found otherwise, because all
    ranks but one only wait."""

    def __init__(self, rank: int, minutes: float, exit: Callable[[int], None] = os._exit) -> None:
        self.rank, self.limit, self.exit = rank, 60 * minutes, exit
        self.phase, self.since = "setup", time.monotonic()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def rest(self) -> None:
        """No phase follows: what comes now may take as long as it takes."""
        self.since = math.inf

    def _watch(self) -> None:
        while (remaining := self.since + self.limit - time.monotonic()) > 0:
            time.sleep(min(remaining, 30.0))
        message = (
            f"watchdog: rank {self.rank} has been in phase {self.phase!r} for "
            f"{self.limit / 60:g} minutes. The run ends here and resumes from its last checkpoint. "
            "Raise --watchdog-minutes if that phase may take so long. Stacks follow."
        )
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self.exit(70)


class NonFinite:
    """Counts optimizer steps that were skipped for a non-finite loss or gradient."""

    def __init__(self, out: Path, rank: int) -> None:
        self.out, self.rank, self.in_a_row = out, rank, 0

    def check(self, applied: bool, batches: list[Batch], step: int, update: int) -> None:
        """Keep the batches of a skipped optimizer step for inspection. FloatingPointError after
        several in a row."""
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        name = f"nonfinite-step-{step:06d}-update-{update}-rank-{self.rank}.pt"
        torch.save(batches, self.out / name)
        if self.in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{self.in_a_row} optimizer steps in a row had a non-finite loss or gradient. "
                f"Their batches are in {self.out}/nonfinite-*.pt. The last checkpoint is intact: "
                "resume with a lower --lr"
            )


def advance(scaler: GradScaler) -> float:
    """The loss scale of the optimizer step that ends here. The next one has half of it after an
    overflow, and twice after 2000 steps without: PyTorch's defaults, with a floor."""
    scale = scaler.get_scale()
    scaler.update()
    if scaler.get_scale() < MIN_LOSS_SCALE:
        scaler.update(MIN_LOSS_SCALE)
    return scale
