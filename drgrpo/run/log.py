"""What a person sees of a run, and what it appends to its records."""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from drgrpo.run.files import append_jsonl
from drgrpo.types import UserError


class Stopwatch:
    """Seconds and memory of one step by phase: `with timer("rollout"): ...`

    Memory in GB is what is in use at the end of the phase: of the whole GPU, or without one of the
    process. PyTorch's allocator keeps what it once had, so this contains its peak. The allocator's
    own peak would count the weights and the cache of a vLLM that sleeps."""

    def __init__(self, enter: Callable[[str], None] = lambda phase: None) -> None:
        self.enter = enter
        self.seconds: dict[str, float] = {}
        self.gb: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.enter(phase)
        cuda = torch.cuda.is_initialized()
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        used = gpu_bytes() if cuda else resident_bytes()
        self.gb[phase] = max(self.gb.get(phase, 0.0), used / 2**30)

    def read(self) -> dict[str, float]:
        """Seconds of all phases so far, and `total`, the wall time since the start."""
        return {**self.seconds, "total": time.perf_counter() - self.started}


def gpu_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Log:
    """The console and the records of a run. On ranks other than 0 every method does nothing."""

    def __init__(self, out: str | Path, active: bool) -> None:
        self.out, self.active = Path(out), active
        self.trackers: list[Callable[[dict[str, float], int], Any]] = []
        self.console = Console(highlight=False, soft_wrap=True, quiet=not active)
        if not self.console.is_terminal:
            self.console.width = 120
        transformers.utils.logging.disable_progress_bar()  # bars of loading break into the lines

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def track(self, tensorboard: bool, wandb: str, config: dict[str, Any]) -> None:
        """Send the numbers of every step to TensorBoard and to a Weights & Biases project too."""
        for wanted, package in ((tensorboard, "tensorboard"), (wandb, "wandb")):
            if wanted and importlib.util.find_spec(package) is None:
                raise UserError(f"--{package} needs the package {package}: pip install {package}")
        if self.active and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(self.out / "tensorboard")

            def write_scalars(numbers: dict[str, float], step: int) -> None:
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            self.trackers.append(write_scalars)
        if self.active and wandb:
            import wandb as client

            run = client.init(
                project=wandb, config=config, name=self.out.name, dir=self.out, resume="allow"
            )
            self.trackers.append(lambda numbers, step: run.log(numbers, step=step))

    def step(self, row: dict[str, Any], samples: list[dict], steps: int) -> None:
        """Record a step of `steps`, and print its line."""
        if not self.active:
            return
        append_jsonl(self.out / "metrics.jsonl", [row])
        append_jsonl(self.out / "samples.jsonl", samples)
        for tracker in self.trackers:
            tracker(flatten(row), row["step"])
        self.say(step_line(row, steps))

    def evaluation(self, row: dict[str, Any]) -> None:
        """Record the evaluation of one benchmark, and print its line."""
        if not self.active:
            return
        append_jsonl(self.out / "eval.jsonl", [row])
        how = "greedy" if row["temperature"] == 0 else f"T={row['temperature']:g} x{row['samples']}"
        reward = f"reward {row['reward']:.3f}  " if "reward" in row else ""
        self.say(
            f"eval {row['step']:4d}  {row['benchmark']} {how}: accuracy {row['accuracy']:.3f}  "
            f"{reward}"
            f"len right {number(row['len_correct'])} wrong {number(row['len_incorrect'])}  "
            f"cut {row['truncated_frac']:.1%}"
        )


def step_line(row: dict[str, Any], steps: int) -> str:
    seconds = dict(row["seconds"])
    total = seconds.pop("total")
    phases = " ".join(f"{phase} {s:.2f}" for phase, s in seconds.items() if s >= 0.005)
    lengths = (
        f"right {number(row['response_len_correct'])} wrong {number(row['response_len_incorrect'])}"
    )
    parts = (
        f"step {row['step']:4d}/{steps}",
        f"reward {number(row['reward_mean'], '.3f')}",
        f"len {number(row['response_len_mean'])} ({lengths} cut "
        f"{number(row['truncated_frac'], '.0%')})",
        f"entropy {number(row['entropy'], '.3f')}",
        f"clip {number(row['clip_frac'], '.2%')}",
        f"grad {number(row['grad_norm'], '.3f')}",
        f"parity {number(row['parity_max'], '.0e')}",
        f"{total:.2f} s ({phases})",
        f"{row['tokens_per_s']:,.0f} tok/s",
        f"mfu {number(row['mfu'], '.1%')}",
        f"{max(row['gb'].values()):.1f} GB",
        f"{row['hours_used']:.3f} h",
        f"eta {total * (steps - row['step']) / 3600:.2f} h",
    )
    return "  ".join(parts)


def flatten(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row. Those of inner objects are named outer/inner."""
    numbers: dict[str, Any] = {}
    for name, value in row.items():
        inner = value if isinstance(value, dict) else {}
        numbers |= {name: value} | {f"{name}/{key}": number for key, number in inner.items()}
    return {name: value for name, value in numbers.items() if isinstance(value, int | float)}


def number(value: float | None, form: str = ".1f") -> str:
    """A number for the eye. A missing one is a dash."""
    return "-" if value is None else format(value, form)
