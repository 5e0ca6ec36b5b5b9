"""What a person sees and what a run leaves behind: step lines, a progress bar on a terminal, JSON lines, a table."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Stopwatch:
    """Seconds by phase of one step: `with watch("rollout"): ...`"""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """All phases so far and `total`, the wall time since this watch was made."""
        return {**self.seconds, "total": time.perf_counter() - self.started}


class Log:
    """Rank 0's voice; on other ranks every method does nothing. Plain lines when the output is not a terminal."""

    def __init__(self, out: str | Path, active: bool):
        self.out, self.active, self.progress = Path(out), active, None
        self.console = Console(highlight=False, soft_wrap=True, quiet=not active)
        if not self.console.is_terminal:
            self.console.width = 120

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def record(self, name: str, *rows: dict) -> None:
        """Append rows to OUT/NAME.jsonl."""
        if self.active:
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)

    @contextmanager
    def steps(self, first: int, last: int):
        """Yields the step numbers; shows a progress bar under the step lines on a terminal."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("eta"), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=self.console, disable=not (self.active and self.console.is_terminal)) as progress:
            task = progress.add_task("training", total=last, completed=first - 1)

            def numbers():
                for step in range(first, last + 1):
                    yield step
                    progress.update(task, completed=step)

            yield numbers()

    def step(self, row: dict, steps: int, budget_hours: float) -> None:
        phases = " ".join(f"{k} {v:.2f}" for k, v in row["seconds"].items() if k != "total" and v >= 0.005)
        self.say(
            f"step {row['step']:4d}/{steps}  reward {row['reward_mean']:.3f}  len {row['response_len_mean']:.1f} "
            f"(right {number(row['response_len_correct'])} wrong {number(row['response_len_incorrect'])} "
            f"cut {row['truncated_frac']:.0%})  entropy {row['entropy']:.3f}  clip {number(row['clip_frac'], '.2%')}  "
            f"grad {number(row['grad_norm'], '.3f')}  parity {number(row['parity_max'], '.0e')}  "
            f"{row['seconds']['total']:.2f} s ({phases})  {row['tokens_per_s']:,.0f} tok/s  "
            f"{row['hours_used']:.3f} of {budget_hours:g} h"
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
        for column in ("benchmark", "sampling", "when", "accuracy", "len right", "len wrong", "cut"):
            table.add_column(column, justify="left" if column in ("benchmark", "sampling", "when") else "right")
        for key in dict.fromkeys((r["benchmark"], r["temperature"], r["samples"]) for r in rows):
            mine = [r for r in rows if (r["benchmark"], r["temperature"], r["samples"]) == key]
            for when, r in (("before", mine[0]), (f"step {mine[-1]['step']}", mine[-1])):
                how = "greedy" if r["temperature"] == 0 else f"T={r['temperature']:g}, {r['samples']} each"
                table.add_row(r["benchmark"], how, when, f"{r['accuracy']:.3f}", number(r["len_correct"]),
                              number(r["len_incorrect"]), number(r["truncated_frac"], ".1%"))  # fmt: skip
        self.console.print(table)


def number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def read_jsonl(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
