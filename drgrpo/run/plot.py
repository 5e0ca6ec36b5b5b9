"""Curves of one run or several: `python -m drgrpo.run.plot runs/tiny [runs/tiny-grpo ...]`.

The figures go into the first run's plots/ folder:

    curves.png  reward, held-out accuracy, lengths of correct and of incorrect responses, by step
    time.png    seconds of a step by phase
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drgrpo.run.cli import user_errors
from drgrpo.run.files import read_jsonl
from drgrpo.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES = ("rollout", "grade", "pack", "old", "train", "sync", "eval", "save")


def plot(runs: Sequence[str | Path]) -> list[Path]:
    """Draw both figures. Returns their paths."""
    folders = [Path(run) for run in runs]
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} holds no metrics.jsonl; name the --out folder of a run")
    out = folders[0] / "plots"
    out.mkdir(exist_ok=True)
    figures = {out / "curves.png": curves(folders), out / "time.png": step_time(folders[0])}
    for path, figure in figures.items():
        figure.savefig(path, dpi=130)
    return list(figures)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # a tenth of train.py's imports, and one process draws

    return Figure(figsize=(width, height), layout="constrained")


def curves(runs: list[Path]) -> Figure:
    figure = new_figure(13, 3.6)
    reward, accuracy, length = figure.subplots(1, 3)
    for i, run in enumerate(runs):
        color, rows = f"C{i}", read_jsonl(run / "metrics.jsonl")
        label = f"{rows[0]['algo']} ({run.name})"
        reward.plot(*columns(rows, "reward_mean"), color=color, lw=1, label=label)
        draw_accuracy(accuracy, read_jsonl(run / "eval.jsonl"), color)
        draw_lengths(length, rows, color, run.name)
    titles = {reward: "training reward", accuracy: "accuracy", length: "response length (tokens)"}
    for axis, title in titles.items():
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=7)
    for axis in (reward, accuracy):
        axis.set_ylim(0, 1)
    length.set_ylim(bottom=0)
    return figure


def draw_accuracy(axis: Axes, rows: list[dict[str, Any]], color: str) -> None:
    """One line per benchmark and temperature. Greedy is dashed."""
    for name, temperature in dict.fromkeys((r["benchmark"], r["temperature"]) for r in rows):
        curve = [r for r in rows if (r["benchmark"], r["temperature"]) == (name, temperature)]
        style, how = ("--", "greedy") if temperature == 0 else ("-", f"T={temperature:g}")
        axis.plot(*columns(curve, "accuracy"), style, color=color, label=f"{name}, {how}")


def draw_lengths(axis: Axes, rows: list[dict[str, Any]], color: str, name: str) -> None:
    for kind, style in (("correct", ":"), ("incorrect", "-")):
        steps, lengths = columns(rows, f"response_len_{kind}")
        if steps:
            axis.plot(steps, lengths, style, color=color, lw=1.2, label=f"{kind}, {name}")


def columns(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[Any]]:
    """The steps at which a column has a value, and its values."""
    points = [(row["step"], row[name]) for row in rows if row[name] is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return list(steps), list(values)


def step_time(run: Path) -> Figure:
    figure = new_figure(9, 3.2)
    axis, rows = figure.subplots(), read_jsonl(run / "metrics.jsonl")
    shown: dict[str, list[float]] = {}
    steps, seconds = columns(rows, "seconds")
    for phase in PHASES:
        values = [step_seconds.get(phase, 0.0) for step_seconds in seconds]
        shown |= {phase: values} if any(values) else {}
    axis.stackplot(steps, *shown.values(), labels=list(shown))
    axis.set(title=f"seconds per step by phase, {run.name}", xlabel="step", ylabel="s")
    axis.legend(fontsize=7, loc="upper right")
    return figure


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python -m drgrpo.run.plot RUN [RUN ...]")
    with user_errors():
        print(*plot(sys.argv[1:]), sep="\n")
