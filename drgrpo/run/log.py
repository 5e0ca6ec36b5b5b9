"""What a person sees and what a run leaves behind: step lines, a progress bar on a terminal, JSON
lines, a table."""

import importlib.util
import json
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from drgrpo.types import UserError


class Stopwatch:
    """Seconds and peak memory by phase of one step: `with watch("rollout"): ...`

    Memory is the CUDA allocator's peak within the phase; without a GPU, the process's resident
    memory at its end."""

    def __init__(self, enter: Callable[[str], None] = lambda phase: None):
        self.enter, self.seconds, self.gb = enter, {}, {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str):
        self.enter(phase)
        cuda = torch.cuda.is_initialized()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes()
        self.gb[phase] = max(self.gb.get(phase, 0.0), peak / 2**30)

    def read(self) -> dict[str, float]:
        """All phases so far and `total`, the wall time since this watch was made."""
        return {**self.seconds, "total": time.perf_counter() - self.started}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Log:
    """Rank 0's voice; on other ranks every method does nothing. Plain lines when the output is not
    a terminal."""

    def __init__(self, out: str | Path, active: bool):
        self.out, self.active, self.trackers = Path(out), active, []
        self.console = Console(highlight=False, soft_wrap=True, quiet=not active)
        if not self.console.is_terminal:
            self.console.width = 120

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def track(self, tensorboard: bool, wandb: str, config: dict) -> None:
        """Send the numbers of every step to TensorBoard and to a Weights & Biases project too."""
        for wanted, package in ((tensorboard, "tensorboard"), (wandb, "wandb")):
            if wanted and importlib.util.find_spec(package) is None:
                raise UserError(f"--{package} needs the package {package}: pip install {package}")
        if self.active and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(self.out / "tensorboard")
            self.trackers.append(
                lambda row, step: (
                    [writer.add_scalar(k, v, step) for k, v in row.items()] and writer.flush()
                )
            )
        if self.active and wandb:
            import wandb as client

            run = client.init(
                project=wandb, config=config, name=self.out.name, dir=self.out, resume="allow"
            )
            self.trackers.append(lambda row, step: run.log(row, step=step))

    def record(self, name: str, *rows: dict) -> None:
        """Append rows to OUT/NAME.jsonl."""
        if self.active:
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    @contextmanager
    def steps(self, first: int, last: int):
        """Yields the step numbers; shows a progress bar under the step lines on a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self.console, disable=not (self.active and self.console.is_terminal)
        ) as progress:
            task = progress.add_task("training", total=last, completed=first - 1)

            def numbers():
                for step in range(first, last + 1):
                    yield step
                    progress.update(task, completed=step)

            yield numbers()

    def step(self, row: dict, steps: int, budget_hours: float) -> None:
        for tracker in self.trackers:
            tracker(flatten(row), row["step"])
        phases = " ".join(
            f"{k} {v:.2f}" for k, v in row["seconds"].items() if k != "total" and v >= 0.005
        )
        self.say(
            f"step {row['step']:4d}/{steps}  reward {row['reward_mean']:.3f}  len {row['response_len_mean']:.1f} "
            f"(right {number(row['response_len_correct'])} wrong {number(row['response_len_incorrect'])} "
            f"cut {row['truncated_frac']:.0%})  entropy {row['entropy']:.3f}  clip {number(row['clip_frac'], '.2%')}  "
            f"grad {number(row['grad_norm'], '.3f')}  parity {number(row['parity_max'], '.0e')}  "
            f"{row['seconds']['total']:.2f} s ({phases})  {row['tokens_per_s']:,.0f} tok/s  "
            f"mfu {number(row['mfu'], '.1%')}  {max(row['gb'].values()):.1f} GB  {row['hours_used']:.3f} of {budget_hours:g} h"
        )

    def evaluation(self, row: dict) -> None:
        how = "greedy" if row["temperature"] == 0 else f"T={row['temperature']:g} x{row['samples']}"
        self.say(
            f"eval {row['step']:4d}  {row['benchmark']} {how}: accuracy {row['accuracy']:.3f}  "
            f"len right {number(row['len_correct'])} wrong {number(row['len_incorrect'])}  cut {row['truncated_frac']:.1%}"
        )

    def table(self, rows: list[dict], title: str) -> None:
        """First and last evaluation of every benchmark, side by side."""
        table = Table(title=title, title_justify="left")
        for column in (
            "benchmark",
            "sampling",
            "when",
            "accuracy",
            "len right",
            "len wrong",
            "cut",
        ):
            table.add_column(
                column, justify="left" if column in ("benchmark", "sampling", "when") else "right"
            )
        for key in dict.fromkeys((r["benchmark"], r["temperature"], r["samples"]) for r in rows):
            mine = [r for r in rows if (r["benchmark"], r["temperature"], r["samples"]) == key]
            for when, r in (("before", mine[0]), (f"step {mine[-1]['step']}", mine[-1])):
                how = (
                    "greedy"
                    if r["temperature"] == 0
                    else f"T={r['temperature']:g}, {r['samples']} each"
                )
                table.add_row(
                    r["benchmark"],
                    how,
                    when,
                    f"{r['accuracy']:.3f}",
                    number(r["len_correct"]),
                    number(r["len_incorrect"]),
                    number(r["truncated_frac"], ".1%"),
                )
        self.console.print(table)


def flatten(row: dict) -> dict[str, float]:
    """The numbers of a row, those of inner objects under outer/inner."""
    inner = {
        f"{k}/{name}": v
        for k, values in row.items()
        if isinstance(values, dict)
        for name, v in values.items()
    }
    return {k: v for k, v in {**row, **inner}.items() if isinstance(v, int | float)}


def number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def read_jsonl(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
