"""How well and how fast does the `tiny` recipe train? `python -m bench.bench_tiny` (about half an hour on two cores)

Three seeds of Dr. GRPO and of GRPO with the PyTorch sampler, and one run with vLLM's CPU build, each a `torchrun train.py`.
Writes bench/results/tiny.json (accuracies and lengths before and after, seconds by phase, tokens/s, parity, machine,
versions, commit, date) and bench/results/tiny.png; the last line printed is the JSON. Finished runs are not run again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

from drgrpo.log import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "grade", "pack", "train", "sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-tiny", help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where tiny.json and tiny.png go")
    args = parser.parse_args()

    jobs = [(algo, "torch", seed) for algo in ("drgrpo", "grpo") for seed in range(args.seeds)] + [("drgrpo", "vllm", 0)]
    results = [measure(train(args, *job), *job) for job in jobs]
    report = {"what": f"tiny recipe, {args.steps} steps"} | machine() | {"runs": results}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tiny.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(args, results)
    print(table(results))
    print(json.dumps(report))


def train(args, algo: str, engine: str, seed: int) -> Path:
    out = args.runs / f"{algo}-{engine}-seed{seed}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "train.py", "--recipe", "tiny",
        "--algo", algo, "--engine", engine, "--seed", str(seed), "--steps", str(args.steps), "--out", str(out),
    ]  # fmt: skip
    print(" ".join(command[2:]), file=sys.stderr)
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, env={"OMP_NUM_THREADS": "1", **os.environ})
    return out


def measure(run: Path, algo: str, engine: str, seed: int) -> dict:
    """Scores before and after; times are medians over the steps, the first five left out."""
    rows, evals = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "eval.jsonl")
    first, last = ({r["temperature"]: r for r in evals if r["step"] == s} for s in (0, rows[-1]["step"]))
    return {
        "algo": algo, "engine": engine, "seed": seed,
        "greedy": [round(e[0.0]["accuracy"], 4) for e in (first, last)],
        "sampled": [round(e[1.0]["accuracy"], 4) for e in (first, last)],
        "len_correct": [e[1.0]["len_correct"] for e in (first, last)],
        "len_incorrect": [e[1.0]["len_incorrect"] for e in (first, last)],
        "truncated_frac": [e[1.0]["truncated_frac"] for e in (first, last)],
        "seconds": {p: round(median(r["seconds"].get(p, 0.0) for r in rows[5:]), 4) for p in PHASES},
        "seconds_per_step": round(median(sum(r["seconds"].get(p, 0.0) for p in PHASES) for r in rows[5:]), 4),
        "sampled_tokens_per_s": round(median(r["tokens"] / r["seconds"]["rollout"] for r in rows[5:])),
        "trained_tokens_per_s": round(median(r["tokens_trained"] / r["seconds"]["train"] for r in rows[5:])),
        "minutes": round(60 * rows[-1]["hours_used"], 2),
        "parity_max": max(r["parity_max"] for r in rows if r["parity_max"] is not None),
    }  # fmt: skip


def draw(args, results: list[dict]) -> None:
    """Accuracy and lengths over the steps: mean over seeds, band from lowest to highest."""
    figure, (accuracy, length) = plt.subplots(1, 2, figsize=(10, 3.4), constrained_layout=True)
    for algo, name, color in (("drgrpo", "Dr. GRPO", "C0"), ("grpo", "GRPO", "C3")):
        evals = [
            [r for r in read_jsonl(args.runs / f"{algo}-torch-seed{seed}" / "eval.jsonl") if r["temperature"] == 1]
            for seed in range(args.seeds)
        ]
        for axis, column, style, label in (
            (accuracy, "accuracy", "-", name),
            (length, "len_incorrect", "-", f"{name}, wrong answers"),
            (length, "len_correct", ":", f"{name}, right answers"),
        ):
            steps, values = [r["step"] for r in evals[0]], np.array([[r[column] for r in rows] for rows in evals], float)
            axis.plot(steps, values.mean(0), style, color=color, label=label)
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    accuracy.set(title="held-out accuracy, sampled at T=1", xlabel="step", ylim=(0, 1))
    length.set(title="length of held-out responses (tokens)", xlabel="step", ylim=(0, 96))
    accuracy.legend(fontsize=8, loc="lower right")
    length.legend(fontsize=8, loc="upper center", ncols=2)
    for axis in (accuracy, length):
        axis.grid(alpha=0.3)
    figure.savefig(args.out / "tiny.png", dpi=130)


def table(results: list[dict]) -> str:
    """Markdown, a line per algorithm and engine: mean over seeds (lowest - highest)."""
    lines = ["| algorithm, sampler | seeds | accuracy, sampled | accuracy, greedy | length of wrong answers | s/step | tok/s |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for algo, engine in dict.fromkeys((r["algo"], r["engine"]) for r in results):
        mine = [r for r in results if (r["algo"], r["engine"]) == (algo, engine)]
        changes = [change(mine, *column) for column in (("sampled", ".2f"), ("greedy", ".2f"), ("len_incorrect", ".0f"))]
        speed = f"{median(r['seconds_per_step'] for r in mine):.2f} | {median(r['sampled_tokens_per_s'] for r in mine):,.0f}"
        lines.append(f"| {algo}, {engine} | {len(mine)} | {' | '.join(changes)} | {speed} |")
    return "\n".join(lines)


def change(results: list[dict], column: str, form: str) -> str:
    """Before and after: mean over seeds, and the range."""
    ends = [[r[column][i] for r in results] for i in (0, 1)]
    return " → ".join(f"{fmean(e):{form}} ({min(e):{form}}–{max(e):{form}})" for e in ends)


def machine() -> dict:
    """Where, with what and when something was measured."""
    return {
        "machine": f"{os.cpu_count()} x {cpu_name()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "commit": git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
