"""Curves of one run or several: `python -m drgrpo.run.plot runs/tiny [runs/tiny-grpo ...]` writes
PNGs into the first one.

curves.png  reward, held-out accuracy, lengths of correct and of incorrect responses, by step
time.png    seconds of a step by phase
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from drgrpo.run.log import read_jsonl
from drgrpo.types import UserError

PHASES = ("rollout", "grade", "pack", "train", "sync", "eval", "save")


def plot(runs: list[str | Path]) -> list[Path]:
    """Draws both figures; returns their paths."""
    runs = [Path(run) for run in runs]
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise UserError(f"{run} holds no metrics.jsonl; name the --out folder of a run")
    out = runs[0] / "plots"
    out.mkdir(exist_ok=True)
    return [curves(runs, out / "curves.png"), step_time(runs[0], out / "time.png")]


def curves(runs: list[Path], path: Path) -> Path:
    figure, (reward, accuracy, length) = plt.subplots(
        1, 3, figsize=(13, 3.6), constrained_layout=True
    )
    for i, run in enumerate(runs):
        rows, evals = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "eval.jsonl")
        color, name = f"C{i}", f"{rows[0]['algo']} ({run.name})"
        reward.plot(
            [r["step"] for r in rows],
            [r["reward_mean"] for r in rows],
            color=color,
            lw=1,
            label=name,
        )
        for key in dict.fromkeys((r["benchmark"], r["temperature"]) for r in evals):
            mine = [r for r in evals if (r["benchmark"], r["temperature"]) == key]
            style = "--" if key[1] == 0 else "-"
            label = f"{key[0]}, {'greedy' if key[1] == 0 else f'T={key[1]:g}'}"
            steps = [r["step"] for r in mine]
            accuracy.plot(steps, [r["accuracy"] for r in mine], style, color=color, label=label)
        for column, style in (("correct", ":"), ("incorrect", "-")):
            values = [
                (r["step"], r[f"response_len_{column}"])
                for r in rows
                if r[f"response_len_{column}"] is not None
            ]
            if values:
                length.plot(
                    *zip(*values, strict=True),
                    style,
                    color=color,
                    lw=1.2,
                    label=f"{column}, {run.name}",
                )
    for axis, title in (
        (reward, "training reward"),
        (accuracy, "accuracy"),
        (length, "response length (tokens)"),
    ):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=7)
    for axis in (reward, accuracy):
        axis.set_ylim(0, 1)
    length.set_ylim(bottom=0)
    return finish(figure, path)


def step_time(run: Path, path: Path) -> Path:
    rows = read_jsonl(run / "metrics.jsonl")
    figure, axis = plt.subplots(figsize=(9, 3.2), constrained_layout=True)
    shown = [phase for phase in PHASES if any(r["seconds"].get(phase) for r in rows)]
    axis.stackplot(
        [r["step"] for r in rows],
        *[[r["seconds"].get(p, 0.0) for r in rows] for p in shown],
        labels=shown,
    )
    axis.set(title=f"seconds per step by phase, {run.name}", xlabel="step", ylabel="s")
    axis.legend(fontsize=7, loc="upper right")
    return finish(figure, path)


def finish(figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python -m drgrpo.run.plot RUN [RUN ...]")
    try:
        print(*plot(sys.argv[1:]), sep="\n")
    except UserError as error:
        sys.exit(f"error: {error}")
