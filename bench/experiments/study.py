"""The length bias of GRPO, term by term: `make study` or `python -m bench.experiments.study` (an
hour or two on two cores).

Dr. GRPO, GRPO, and Dr. GRPO with one of GRPO's two divisions put back, on the `tiny` recipe: many
seeds, one and four updates per rollout; then GRPO against Dr. GRPO in set-ups that differ in one
thing, to see where the effect appears and where it does not. Every run is a `train.py` of its own;
finished runs are not run again. Writes to bench/results:

    study.json            every run's end, the differences with intervals and tests
    study.png             accuracy, length of wrong answers, truncated share by step: mean over seeds, 95 % t-interval
    study_details.png     training reward, length of right answers, entropy
    study_settings.png    GRPO minus Dr. GRPO in every set-up

What is compared was fixed beforehand: the mean length of wrong held-out answers, sampled at T = 1,
pooled over the last three evaluations, paired by seed (runs of one seed share the warmed-up model
and the order of the data). Two accuracies are called equivalent if the 90 % interval of their
difference lies within +-5 points (two one-sided tests at 5 %).
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats

from bench.harness import ROOT, markdown, provenance, write_json
from drgrpo.run.log import read_jsonl
from drgrpo.tiny.warmup import Warmup, cached_tiny_model

ALGOS = {
    "drgrpo": "Dr. GRPO",
    "grpo": "GRPO",
    "grpo_length": "length term only",
    "grpo_std": "std term only",
}
POOLED = 3  # evaluations at the end of a run that count as its end
MARGIN = 0.05  # of accuracy, for equivalence
EVAL_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a set-up changes: fields of `train.py`'s tiny recipe, fields of its warm-up; and who
    takes part."""

    train: dict = field(default_factory=dict)
    warmup: dict = field(default_factory=dict)
    algos: tuple[str, ...] = ("drgrpo", "grpo")
    seeds: int = 4
    steps: int = 100


SETTINGS = {
    "one update": Setting(train={"minibatches": 1}, algos=tuple(ALGOS), seeds=8),
    "four updates": Setting(algos=tuple(ALGOS), seeds=8),
    "errors not noticed": Setting(warmup={"notices": False}),
    "groups of 4": Setting(train={"prompts_per_step": 64, "group_size": 4}),
    "groups of 16": Setting(train={"prompts_per_step": 16, "group_size": 16}),
    "budget 64": Setting(train={"max_new_tokens": 64}),
    "budget 192": Setting(train={"max_new_tokens": 192}),
    "learning rate 1e-4": Setting(train={"lr": 1e-4}),
    "learning rate 1e-3": Setting(train={"lr": 1e-3}),
    "0.03 M parameters": Setting(
        warmup={"hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 96}
    ),
    "0.3 M parameters": Setting(
        warmup={
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 384,
        }
    ),
    "200 steps": Setting(steps=200),
}
"""The first two are the study; the others change one thing of `four updates`."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=list(SETTINGS),
        metavar="NAME",
        help="which of them",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each"
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "study", help="where the runs go"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results", help="where the results go"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: SETTINGS[name] for name in args.settings}
    for name, setting in chosen.items():
        train_all(name, setting, args.runs, args.jobs)
    report(chosen, args.runs, args.out)


# ---- runs


def train_all(name: str, setting: Setting, runs: Path, jobs: int) -> None:
    """The warm-ups of a set-up, then those of its runs that are not there yet, `jobs` at a time."""
    warmups = [Warmup(seed=seed, **setting.warmup) for seed in range(setting.seeds)]
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        models = list(pool.map(partial(cached_tiny_model, cache_dir=runs / "warmup"), warmups))

    def train(arm):
        algo, seed = arm
        train_one(setting, models[seed], folder(runs, name, algo, seed), algo, seed)
        print(f"{name}, {algo}, seed {seed}: done", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(
            pool.map(train, product(setting.algos, range(setting.seeds)))
        )  # the first failure surfaces here


def folder(runs: Path, name: str, algo: str, seed: int) -> Path:
    return runs / name.replace(" ", "-") / f"{algo}-seed{seed}"


def train_one(setting: Setting, model: Path, out: Path, algo: str, seed: int) -> None:
    """One `train.py`, unless it is finished; an interrupted one is resumed. Its output goes to a
    file beside its folder."""
    if (out / "eval.jsonl").exists() and read_jsonl(out / "eval.jsonl")[-1][
        "step"
    ] == setting.steps:
        return
    fields = {
        "recipe": "tiny",
        "model": model,
        "engine": "torch",
        "algo": algo,
        "seed": seed,
        "steps": setting.steps,
        "eval_every": EVAL_EVERY,
        "save_every": 0,
        "samples_logged": 32,
        "out": out,
        **setting.train,
    }
    flags = [text for k, v in fields.items() for text in (f"--{k.replace('_', '-')}", str(v))]
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with open(f"{out}.log", "w") as log:
        done = subprocess.run(
            [sys.executable, "train.py", *flags], cwd=ROOT, stdout=log, stderr=log, env=environment
        )
    if done.returncode:
        raise RuntimeError(f"{out} ended with status {done.returncode}: see {out}.log")


# ---- what came of them


def ends(run: Path) -> dict:
    """Where a run began and ended; lengths are means over all wrong (right) answers of the last
    evaluations."""
    evals, rows = read_jsonl(run / "eval.jsonl"), read_jsonl(run / "metrics.jsonl")
    sampled, greedy = (
        [r for r in evals if (r["temperature"] == 0) == cold] for cold in (False, True)
    )
    late = rows[-1]["step"] - EVAL_EVERY * POOLED
    wrong = [r for r in read_jsonl(run / "samples.jsonl") if r["step"] > late and not r["reward"]]
    return {
        "accuracy": [pooled(rows, "accuracy") for rows in (sampled[:1], sampled[-POOLED:])],
        "greedy": [pooled(rows, "accuracy") for rows in (greedy[:1], greedy[-POOLED:])],
        "len_incorrect": [
            pooled(rows, "len_incorrect") for rows in (sampled[:1], sampled[-POOLED:])
        ],
        "len_correct": [pooled(rows, "len_correct") for rows in (sampled[:1], sampled[-POOLED:])],
        "truncated_frac": [
            pooled(rows, "truncated_frac") for rows in (sampled[:1], sampled[-POOLED:])
        ],
        "reward": [
            fmean(r["reward_mean"] for r in part)
            for part in (rows[:EVAL_EVERY], rows[-EVAL_EVERY:])
        ],
        "entropy": [
            fmean(r["entropy"] for r in part) for part in (rows[:EVAL_EVERY], rows[-EVAL_EVERY:])
        ],
        "admitted": fmean("n" in r["response"] for r in wrong) if wrong else None,
    }


def pooled(evals: list[dict], column: str) -> float | None:
    """Mean of a column over several evaluations, a length by how many answers it is a mean of. None
    if there is none."""
    share = {
        "len_incorrect": lambda r: 1 - r["accuracy"],
        "len_correct": lambda r: r["accuracy"],
    }.get(column, lambda r: 1.0)
    weights = [r["n"] * share(r) if r[column] is not None else 0.0 for r in evals]
    return (
        float(np.average([r[column] or 0.0 for r in evals], weights=weights))
        if sum(weights)
        else None
    )


def difference(ours: list[float | None], baseline: list[float | None]) -> dict:
    """Paired by seed: mean of ours - baseline, 95 % t-interval, p of the t-test and of the exact
    sign-flip test. A seed on which one of them has no value (a run without a wrong answer has no
    length of them) is left out."""
    d = np.array(
        [a - b for a, b in zip(ours, baseline, strict=True) if a is not None and b is not None]
    )
    test = stats.ttest_1samp(d, 0.0)
    flips = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=2 ** len(d)
    )
    return {
        "mean": d.mean(),
        "interval": list(test.confidence_interval(0.95)),
        "p": test.pvalue,
        "p_sign_flip": flips.pvalue,
        "seeds": len(d),
    }


def equivalence(ours: list[float], baseline: list[float]) -> dict:
    """Two one-sided tests of a difference within +-MARGIN, paired by seed; `interval` is the 90 %
    one that decides."""
    d = np.subtract(ours, baseline)
    low, high = (
        stats.ttest_1samp(d, -MARGIN, alternative="greater"),
        stats.ttest_1samp(d, MARGIN, alternative="less"),
    )
    p = max(low.pvalue, high.pvalue)
    interval = list(stats.ttest_1samp(d, 0.0).confidence_interval(0.90))
    return {
        "mean": d.mean(),
        "interval": interval,
        "p": p,
        "margin": MARGIN,
        "equivalent": bool(p < 0.05),
    }


def report(settings: dict[str, Setting], runs: Path, out: Path) -> None:
    result = {"where": provenance(), "pooled_evaluations": POOLED, "settings": {}}
    for name, setting in settings.items():
        arms = {
            algo: [ends(folder(runs, name, algo, seed)) for seed in range(setting.seeds)]
            for algo in setting.algos
        }
        length, accuracy = (
            {algo: [run[key][1] for run in arm] for algo, arm in arms.items()}
            for key in ("len_incorrect", "accuracy")
        )
        result["settings"][name] = {
            "train": setting.train,
            "warmup": setting.warmup,
            "steps": setting.steps,
            "runs": arms,
            "against_drgrpo": {
                algo: {
                    "len_incorrect": difference(length[algo], length["drgrpo"]),
                    "accuracy": equivalence(accuracy[algo], accuracy["drgrpo"]),
                }
                for algo in setting.algos
                if algo != "drgrpo"
            },
        }
    study = [name for name in settings if len(settings[name].algos) > 2]
    draw(
        study,
        settings,
        runs,
        out / "study.png",
        {
            "accuracy": "held-out accuracy",
            "len_incorrect": "length of wrong answers",
            "truncated_frac": "truncated share",
        },
    )
    draw(
        study,
        settings,
        runs,
        out / "study_details.png",
        {
            "reward_mean": "training reward",
            "len_correct": "length of right answers",
            "entropy": "entropy (nats per token)",
        },
    )
    draw_settings(result["settings"], out / "study_settings.png")
    line = write_json(out / "study.json", result)
    print(
        summary({name: result["settings"][name] for name in study}),
        table(result["settings"]),
        differences(result["settings"]),
        line,
        sep="\n\n",
    )


# ---- tables and figures


def spread(values: list, form: str) -> str:
    """Mean over seeds and the range."""
    there = [v for v in values if v is not None]
    return f"{fmean(there):{form}} ({min(there):{form}}–{max(there):{form}})" if there else "–"


def summary(settings: dict) -> str:
    """Markdown: what the study says, a line per objective."""
    rows = []
    for name, setting in settings.items():
        for algo, arm in setting["runs"].items():
            row = [
                f"{ALGOS[algo]}, {name}",
                change(arm, "accuracy", ".2f"),
                change(arm, "len_incorrect", ".0f"),
                "",
                "",
            ]
            if test := setting["against_drgrpo"].get(algo):
                length, accuracy = test["len_incorrect"], test["accuracy"]
                same = "equivalent" if accuracy["equivalent"] else "not shown equivalent"
                row[3:] = (
                    f"{signed(length, '.0f')}, p = {length['p']:.1g}",
                    f"{signed(accuracy, '.3f')}, {same}",
                )
            rows.append(row)
    return markdown(
        [
            "objective, updates per rollout",
            "held-out accuracy",
            "length of wrong answers",
            "longer than Dr. GRPO's by (95 %)",
            "accuracy above Dr. GRPO's (90 %)",
        ],
        rows,
    )


def table(settings: dict) -> str:
    """Markdown: a line per set-up and objective, before and after."""
    columns = {
        "accuracy": ".2f",
        "len_incorrect": ".0f",
        "len_correct": ".0f",
        "truncated_frac": ".2f",
        "entropy": ".3f",
    }
    rows = [
        [
            name,
            ALGOS[algo],
            str(len(arm)),
            *(change(arm, key, form) for key, form in columns.items()),
            spread([run["admitted"] for run in arm], ".2f"),
        ]
        for name, setting in settings.items()
        for algo, arm in setting["runs"].items()
    ]
    return markdown(
        [
            "set-up",
            "objective",
            "seeds",
            "accuracy",
            "length of wrong answers",
            "of right ones",
            "truncated",
            "entropy",
            "wrong ones that say so",
        ],
        rows,
    )


def differences(settings: dict) -> str:
    """Markdown: every objective against Dr. GRPO, paired by seed."""
    rows = []
    for name, setting in settings.items():
        for algo, test in setting["against_drgrpo"].items():
            length, accuracy = test["len_incorrect"], test["accuracy"]
            verdict = "yes" if accuracy["equivalent"] else "not shown"
            rows.append(
                [
                    name,
                    ALGOS[algo],
                    signed(length, ".0f"),
                    f"{length['p']:.1g}",
                    f"{length['p_sign_flip']:.2g}",
                    signed(accuracy, ".3f"),
                    f"{verdict}, p = {accuracy['p']:.1g}",
                ]
            )
    return markdown(
        [
            "set-up",
            "against Dr. GRPO",
            "wrong answers longer by (95 %)",
            "p",
            "p, sign flips",
            "accuracy higher by (90 %)",
            f"equivalent within {MARGIN:g}",
        ],
        rows,
    )


def change(arm: list[dict], key: str, form: str) -> str:
    """Before and after: means over seeds, and the range after."""
    start = [run[key][0] for run in arm if run[key][0] is not None]
    return f"{fmean(start):{form}} → {spread([run[key][1] for run in arm], form)}"


def signed(test: dict, form: str) -> str:
    low, high = test["interval"]
    return f"{test['mean']:+{form}} ({low:+{form}} to {high:+{form}})"


def curve(run: Path, column: str) -> tuple[list[int], list[float]]:
    """(steps, values): of the evaluations, or of the training steps in means of EVAL_EVERY."""
    if column in ("reward_mean", "entropy"):
        rows = read_jsonl(run / "metrics.jsonl")
        blocks = [rows[i : i + EVAL_EVERY] for i in range(0, len(rows), EVAL_EVERY)]
        return [b[-1]["step"] for b in blocks], [fmean(r[column] for r in b) for b in blocks]
    rows = [r for r in read_jsonl(run / "eval.jsonl") if r["temperature"] > 0]
    return [r["step"] for r in rows], [np.nan if r[column] is None else r[column] for r in rows]


def draw(
    names: list[str], settings: dict[str, Setting], runs: Path, path: Path, columns: dict[str, str]
) -> None:
    """A row per set-up, a panel per column: mean over seeds with its 95 % t-interval."""
    if not names:
        return
    figure, axes = plt.subplots(
        len(names),
        len(columns),
        figsize=(12, 3.1 * len(names)),
        squeeze=False,
        sharex=True,
        sharey="col",
        constrained_layout=True,
    )
    for row, name in enumerate(names):
        for axis, (column, title) in zip(axes[row], columns.items(), strict=True):
            for color, (algo, label) in zip(("C0", "C3", "C1", "C2"), ALGOS.items(), strict=True):
                curves = [
                    curve(folder(runs, name, algo, seed), column)
                    for seed in range(settings[name].seeds)
                ]
                steps, values = curves[0][0], np.array([values for _, values in curves])
                n = np.isfinite(values).sum(0)
                middle, deviation = np.nanmean(values, 0), np.nanstd(values, 0, ddof=1)
                half = stats.t.ppf(0.975, np.maximum(n - 1, 1)) * deviation / np.sqrt(n)
                axis.plot(steps, middle, color=color, label=label)
                axis.fill_between(
                    steps,
                    np.maximum(middle - half, 0),
                    middle + half,
                    color=color,
                    alpha=0.15,
                    lw=0,
                )
            axis.set_title(f"{title}, {name} per rollout", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_settings(settings: dict, path: Path) -> None:
    """GRPO minus Dr. GRPO at the end, a line per set-up: length of wrong answers, accuracy."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.1 + 0.32 * len(settings)), sharey=True, constrained_layout=True
    )
    for axis, key, level, scale in zip(
        axes, ("len_incorrect", "accuracy"), (95, 90), (1, 100), strict=True
    ):
        tests = [setting["against_drgrpo"]["grpo"][key] for setting in settings.values()]
        middle = scale * np.array([t["mean"] for t in tests])
        error = np.abs(scale * np.array([t["interval"] for t in tests]).T - middle)
        axis.errorbar(middle, range(len(tests)), xerr=error, fmt="o", color="C3", capsize=3)
        axis.axvline(0, color="0.5", lw=0.8)
        axis.grid(alpha=0.3, axis="x")
        unit = {"len_incorrect": "length of wrong answers, tokens", "accuracy": "accuracy, points"}[
            key
        ]
        axis.set_xlabel(f"{unit} ({level} % interval)")
    axes[1].axvspan(-100 * MARGIN, 100 * MARGIN, color="0.9", zorder=0)
    axes[0].set_yticks(range(len(settings)), settings)
    axes[0].invert_yaxis()
    figure.suptitle("GRPO minus Dr. GRPO at the end of training", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
