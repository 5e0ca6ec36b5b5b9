"""Does GRPO lengthen wrong answers, which of its two terms does it, and when does it not?

    make study                                  # or: python -m bench.experiments.study
    python -m bench.experiments.study --settings "four updates" "budget 192"
    python -m bench.experiments.study --figures-only    # what study.json alone can draw; no run

All of it takes an hour or two on two cores. Result: with one update per rollout GRPO's wrong
answers end 45 tokens longer than Dr. GRPO's (95 % interval 41 to 49, eight seeds), and the length
term alone does it. The accuracies of all four objectives are equivalent within 5 points.

bench/results/study.json and study*.png come from commits caef923 to 86a7abd, between which nothing
changed that a run depends on, on two cores of an AMD EPYC. The paper separates the two terms as
well (arXiv 2503.20783v2, App. C, Fig. 8). It agrees on the length and finds all variants more
accurate than GRPO.

Every run is a `train.py` of its own on the `tiny` recipe, for Dr. GRPO, GRPO, and Dr. GRPO with one
of GRPO's two divisions put back. Then GRPO is compared with Dr. GRPO in set-ups that differ in one
thing. Finished runs are not run again.

    study.json            every run's end, the differences with intervals and tests
    study_length.png      length of wrong answers before and after: every seed, and the mean
    study.png             accuracy, length of wrong answers, truncated share by step
    study_details.png     training reward, length of right answers, entropy
    study_settings.png    GRPO minus Dr. GRPO in every set-up

What is compared was fixed beforehand: the mean length of wrong held-out answers, sampled at T = 1,
pooled over the last three evaluations. It is paired by seed: runs of one seed share the warmed-up
model and the order of the data. Two accuracies are called equivalent if the 90 % interval of their
difference lies within +-5 points (two one-sided tests at 5 %). Curves are means over seeds with the
95 % t-interval.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from scipy import stats

from bench import harness
from bench.harness import RESULTS, ROOT, markdown, new_figure, save_figure, spread
from drgrpo.config import tiny
from drgrpo.run.files import read_jsonl
from drgrpo.tiny.warmup import Warmup, cached_tiny_model

ALGOS = {
    "drgrpo": "Dr. GRPO",
    "grpo": "GRPO",
    "grpo_length": "length term only",
    "grpo_std": "std term only",
}
COLORS = dict(zip(ALGOS, ("C0", "C3", "C1", "C2"), strict=True))
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


SMALLER = dict(hidden_size=32, num_attention_heads=1, intermediate_size=96)
LARGER = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=384)
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
    "0.03 M parameters": Setting(warmup=SMALLER),
    "0.3 M parameters": Setting(warmup=LARGER),
    "200 steps": Setting(steps=200),
}
"""The first two are the study. The others change one thing of `four updates`."""


def main() -> None:
    parser = harness.command_line(__doc__)
    every, jobs = list(SETTINGS), os.cpu_count()
    add = parser.add_argument
    add("--settings", nargs="+", choices=every, default=every, metavar="NAME", help="which of them")
    add("--jobs", type=int, default=jobs, help="runs at a time, one thread each")
    add("--runs", type=Path, default=ROOT / "runs" / "study", help="where the runs go")
    add("--out", type=Path, default=RESULTS, help="where the results go")
    add("--figures-only", action="store_true", help="train nothing, draw and print study.json")
    args = parser.parse_args()
    if args.figures_only:
        return redraw(json.loads((args.out / "study.json").read_text())["settings"], args.out)
    torch.set_num_threads(1)
    chosen = {name: SETTINGS[name] for name in args.settings}
    for name, setting in chosen.items():
        train_all(name, setting, args.runs, args.jobs)
    report(chosen, args.runs, args.out)


# ---- runs


def train_all(name: str, setting: Setting, runs: Path, jobs: int) -> None:
    """The warm-ups of a set-up, then those of its runs that are not there yet, `jobs` at a time."""
    warmups = [Warmup(seed=seed, **setting.warmup) for seed in range(setting.seeds)]
    models = warm_models(warmups, runs, jobs)

    def train(arm: tuple[str, int]) -> None:
        algo, seed = arm
        train_one(setting, models[seed], folder(runs, name, algo, seed), algo, seed)
        print(f"{name}, {algo}, seed {seed}: done", flush=True)

    arms = product(setting.algos, range(setting.seeds))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, arms))  # the first failure surfaces here


def warm_models(warmups: list[Warmup], runs: Path, jobs: int) -> list[Path]:
    """The models after their supervised phases, `jobs` of them at a time."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(partial(cached_tiny_model, folder=runs / "warmup"), warmups))


def folder(runs: Path, name: str, algo: str, seed: int) -> Path:
    return runs / name.replace(" ", "-") / f"{algo}-seed{seed}"


def train_one(setting: Setting, model: Path, out: Path, algo: str, seed: int) -> None:
    """One `train.py`, unless it is finished. An interrupted one is resumed. Its output goes to a
    file beside its folder."""
    evals = out / "eval.jsonl"
    if evals.exists() and read_jsonl(evals)[-1]["step"] == setting.steps:
        return
    fields = dict(recipe="tiny", model=model, engine="torch", algo=algo, seed=seed, out=out)
    fields |= dict(steps=setting.steps, eval_every=EVAL_EVERY, save_every=0, **setting.train)
    command = ["train.py"]
    for name, value in fields.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    out.parent.mkdir(parents=True, exist_ok=True)
    harness.run_on_one_thread(command, f"{out}.log")


# ---- what came of them


POOLED_COLUMNS = ("accuracy", "len_incorrect", "len_correct", "truncated_frac")


def ends(run: Path) -> dict:
    """Where a run began and ended. Lengths are means over all wrong (right) answers of the last
    evaluations. `admitted`: the share of late wrong samples that contain an `n`."""
    evals, rows = read_jsonl(run / "eval.jsonl"), read_jsonl(run / "metrics.jsonl")
    sampled = [r for r in evals if r["temperature"] > 0]
    greedy = [r for r in evals if r["temperature"] == 0]
    late = rows[-1]["step"] - EVAL_EVERY * POOLED
    wrong = [r for r in read_jsonl(run / "samples.jsonl") if r["step"] > late and not r["reward"]]

    def evaluated(evals: list[dict], column: str) -> list[float | None]:
        return [pooled(evals[:1], column), pooled(evals[-POOLED:], column)]

    def trained(column: str) -> list[float]:
        values = [row[column] for row in rows]
        return [fmean(values[:EVAL_EVERY]), fmean(values[-EVAL_EVERY:])]

    columns = {column: evaluated(sampled, column) for column in POOLED_COLUMNS}
    return columns | {
        "greedy": evaluated(greedy, "accuracy"),
        "reward": trained("reward_mean"),
        "entropy": trained("entropy"),
        "admitted": fmean("n" in r["response"] for r in wrong) if wrong else None,
    }


def pooled(evals: list[dict], column: str) -> float | None:
    """Mean of a column over several evaluations, a length by how many answers it is a mean of. None
    if there is none."""
    total = count = 0.0
    for r in evals:
        if r[column] is not None:
            share = {"len_incorrect": 1 - r["accuracy"], "len_correct": r["accuracy"]}
            weight = r["n"] * share.get(column, 1.0)
            total += weight * r[column]
            count += weight
    return total / count if count else None


def difference(ours: list[float | None], baseline: list[float | None]) -> dict:
    """Paired by seed: mean of ours - baseline, 95 % t-interval, p of the t-test and of the exact
    sign-flip test. A seed on which one of them has no value (a run without a wrong answer has no
    length of them) is left out."""
    pairs = zip(ours, baseline, strict=True)
    d = np.array([a - b for a, b in pairs if a is not None and b is not None])
    test, every = stats.ttest_1samp(d, 0.0), 2 ** len(d)
    flips = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=every)
    ps = {"p": test.pvalue, "p_sign_flip": flips.pvalue}
    interval = list(test.confidence_interval(0.95))
    return {"mean": d.mean(), "interval": interval, "seeds": len(d), **ps}


def equivalence(ours: list[float], baseline: list[float]) -> dict:
    """Two one-sided tests of a difference within +-MARGIN, paired by seed. `interval` is the 90 %
    one that decides."""
    d = np.subtract(ours, baseline)
    above = stats.ttest_1samp(d, -MARGIN, alternative="greater").pvalue
    below = stats.ttest_1samp(d, MARGIN, alternative="less").pvalue
    p, interval = max(above, below), stats.ttest_1samp(d, 0.0).confidence_interval(0.90)
    measured = {"mean": d.mean(), "interval": list(interval), "p": p}
    return measured | {"margin": MARGIN, "equivalent": bool(p < 0.05)}


FIGURES = {  # file: (column, title) of every panel
    "study.png": (
        ("accuracy", "held-out accuracy"),
        ("len_incorrect", "length of wrong answers"),
        ("truncated_frac", "truncated share"),
    ),
    "study_details.png": (
        ("reward_mean", "training reward"),
        ("len_correct", "length of right answers"),
        ("entropy", "entropy (nats per token)"),
    ),
}


def compare(arms: dict[str, list[dict]]) -> dict:
    """Every objective against Dr. GRPO, paired by seed."""

    def late(algo: str, column: str) -> list[float | None]:
        return [run[column][1] for run in arms[algo]]

    against = {}
    for algo in arms:
        if algo != "drgrpo":
            length = difference(late(algo, "len_incorrect"), late("drgrpo", "len_incorrect"))
            accuracy = equivalence(late(algo, "accuracy"), late("drgrpo", "accuracy"))
            against[algo] = {"len_incorrect": length, "accuracy": accuracy}
    return against


def report(settings: dict[str, Setting], runs: Path, out: Path) -> None:
    rows = {}
    for name, setting in settings.items():
        arms = {}
        for algo in setting.algos:
            arms[algo] = [ends(folder(runs, name, algo, seed)) for seed in range(setting.seeds)]
        what = {key: getattr(setting, key) for key in ("train", "warmup", "steps")}
        rows[name] = what | {"runs": arms, "against_drgrpo": compare(arms)}
    study = {name: s for name, s in settings.items() if len(s.algos) > 2}
    for name, columns in FIGURES.items():
        draw(study, runs, out / name, columns)
    result = {"where": harness.provenance(), "pooled_evaluations": POOLED, "settings": rows}
    line = harness.write_json(out / "study.json", result)
    redraw(rows, out)
    print(line)


def redraw(settings: dict, out: Path) -> None:
    """The figures and tables that need nothing but study.json."""
    study = {name: setting for name, setting in settings.items() if len(setting["runs"]) > 2}
    if study:
        draw_lengths(study, out / "study_length.png")
    draw_settings(settings, out / "study_settings.png")
    print(summary(study), table(settings), differences(settings), sep="\n\n")


# ---- tables and figures


def summary(settings: dict) -> str:
    """Markdown: what the study says, a line per objective."""
    heads = ["objective, updates per rollout", "held-out accuracy", "length of wrong answers"]
    heads += ["longer than Dr. GRPO's by (95 %)", "accuracy above Dr. GRPO's (90 %)"]
    rows = []
    for name, algo, arm, test in lines(settings):
        ends = change(arm, "accuracy", ".2f"), change(arm, "len_incorrect", ".0f")
        compared = ["", ""]
        if test:
            length, accuracy = test["len_incorrect"], test["accuracy"]
            same = "equivalent" if accuracy["equivalent"] else "not shown equivalent"
            longer = f"{signed(length, '.0f')}, p = {length['p']:.1g}"
            compared = [longer, f"{signed(accuracy, '.3f')}, {same}"]
        rows.append([f"{ALGOS[algo]}, {name}", *ends, *compared])
    return markdown(heads, rows)


COLUMNS = {  # column: format, heading
    "accuracy": (".2f", "accuracy"),
    "len_incorrect": (".0f", "length of wrong answers"),
    "len_correct": (".0f", "of right ones"),
    "truncated_frac": (".2f", "truncated"),
    "entropy": (".3f", "entropy"),
}


def table(settings: dict) -> str:
    """Markdown: a line per set-up and objective, before and after."""
    heads = [title for _, title in COLUMNS.values()]
    rows = []
    for name, algo, arm, _ in lines(settings):
        cells = [change(arm, column, form) for column, (form, _) in COLUMNS.items()]
        admitted = late_spread([run["admitted"] for run in arm], ".2f")
        rows.append([name, ALGOS[algo], str(len(arm)), *cells, admitted])
    return markdown(["set-up", "objective", "seeds", *heads, "wrong ones that say so"], rows)


def differences(settings: dict) -> str:
    """Markdown: every objective against Dr. GRPO, paired by seed."""
    heads = ["set-up", "against Dr. GRPO", "wrong answers longer by (95 %)", "p", "p, sign flips"]
    heads += ["accuracy higher by (90 %)", f"equivalent within {MARGIN:g}"]
    rows = []
    for name, algo, _, test in lines(settings):
        if test:
            length, accuracy = test["len_incorrect"], test["accuracy"]
            ps = f"{length['p']:.1g}", f"{length['p_sign_flip']:.2g}"
            verdict = "yes" if accuracy["equivalent"] else "not shown"
            same = signed(accuracy, ".3f"), f"{verdict}, p = {accuracy['p']:.1g}"
            rows.append([name, ALGOS[algo], signed(length, ".0f"), *ps, *same])
    return markdown(heads, rows)


def lines(settings: dict) -> Iterator[tuple[str, str, list[dict], dict | None]]:
    """(set-up, objective, its runs, the tests against Dr. GRPO) of every line of a table."""
    for name, setting in settings.items():
        for algo, arm in setting["runs"].items():
            yield name, algo, arm, setting["against_drgrpo"].get(algo)


def late_spread(values: list[float | None], form: str) -> str:
    """Mean over seeds and the range."""
    known = [v for v in values if v is not None]
    return spread(known, form) if known else "–"


def change(arm: list[dict], key: str, form: str) -> str:
    """Before and after: means over seeds, and the range after."""
    start = [run[key][0] for run in arm if run[key][0] is not None]
    return f"{fmean(start):{form}} → {late_spread([run[key][1] for run in arm], form)}"


def signed(test: dict, form: str) -> str:
    low, high = test["interval"]
    return f"{test['mean']:+{form}} ({low:+{form}} to {high:+{form}})"


def curve(run: Path, column: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(steps, values): of the evaluations, or of the training steps in means of EVAL_EVERY."""
    points = []
    if column in ("reward_mean", "entropy"):
        rows = read_jsonl(run / "metrics.jsonl")
        for i in range(0, len(rows), EVAL_EVERY):
            block = rows[i : i + EVAL_EVERY]
            points.append((block[-1]["step"], fmean(r[column] for r in block)))
    else:
        for r in read_jsonl(run / "eval.jsonl"):
            if r["temperature"] > 0:
                points.append((r["step"], np.nan if r[column] is None else r[column]))
    return tuple(zip(*points, strict=True))


def draw(settings: dict[str, Setting], runs: Path, path: Path, columns: tuple) -> None:
    """A row per set-up, a panel per column: mean over seeds with its 95 % t-interval."""
    if not settings:
        return
    shape, size = (len(settings), len(columns)), (12, 3.1 * len(settings))
    figure, axes = new_figure(*shape, size, squeeze=False, sharex=True, sharey="col")
    for row, (name, setting) in zip(axes, settings.items(), strict=True):
        for axis, (column, title) in zip(row, columns, strict=True):
            for algo, color in COLORS.items():
                folders = [folder(runs, name, algo, seed) for seed in range(setting.seeds)]
                draw_mean(axis, [curve(run, column) for run in folders], color, ALGOS[algo])
            axis.set_title(f"{title}, {name} per rollout", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0][0].legend(fontsize=8)
    save_figure(figure, path)


def draw_mean(axis, curves: list[tuple[tuple, tuple]], color: str, label: str) -> None:
    steps, values = curves[0][0], np.array([values for _, values in curves])
    n = np.isfinite(values).sum(0)
    middle, deviation = np.nanmean(values, 0), np.nanstd(values, 0, ddof=1)
    half = stats.t.ppf(0.975, np.maximum(n - 1, 1)) * deviation / np.sqrt(n)
    low, high = np.maximum(middle - half, 0), middle + half
    axis.plot(steps, middle, color=color, label=label)
    axis.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)


def draw_lengths(settings: dict, path: Path) -> None:
    """Length of wrong answers before and after training, a panel per set-up."""
    size = (4.5 * len(settings), 3.3)
    figure, axes = new_figure(1, len(settings), size, squeeze=False, sharey=True)
    for axis, (name, setting) in zip(axes[0], settings.items(), strict=True):
        draw_lengths_of(axis, setting["runs"])
        budget = setting["train"].get("max_new_tokens", tiny().max_new_tokens)
        axis.axhline(budget, color="0.5", lw=0.8, ls="--")
        axis.text(0, budget - 1.5, "token budget", color="0.4", fontsize=8, va="top")
        axis.set_title(f"length of wrong answers, {name} per rollout", fontsize=10)
        axis.set_xticks([0, 1], ["before training", "after"])
        axis.set_xlim(-0.1, 1.75)
        axis.set_ylim(0, 1.06 * budget)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens")
    save_figure(figure, path)


def draw_lengths_of(axis, runs: dict[str, list[dict]]) -> None:
    """A thin line per seed; per objective a thick one for the mean, with a label at its end."""
    means = {}
    for algo, arm in runs.items():
        # a run without a wrong answer has no length of them: NaN
        lengths = np.array([run["len_incorrect"] for run in arm], dtype=float)  # [seeds, 2]
        means[algo] = np.nanmean(lengths, 0)
        axis.plot([0, 1], lengths.T, color=COLORS[algo], lw=0.8, alpha=0.25)
        axis.plot([0, 1], means[algo], color=COLORS[algo], lw=2.5, marker="o", ms=4)
    ascending = sorted(means, key=lambda algo: means[algo][1])
    for i, algo in enumerate(ascending):  # lines end in pairs, whose labels must not overlap
        end = means[algo][1]
        label = f"{ALGOS[algo]}, {end:.0f}"
        axis.text(1.05, end + (2.5 if i % 2 else -2.5), label, color=COLORS[algo], va="center")


def draw_settings(settings: dict, path: Path) -> None:
    """GRPO minus Dr. GRPO at the end, a line per set-up: length of wrong answers, accuracy."""
    figure, axes = new_figure(1, 2, (10, 1.1 + 0.32 * len(settings)), sharey=True)
    panels = (  # column, scale, label
        ("len_incorrect", 1, "length of wrong answers, tokens (95 % interval)"),
        ("accuracy", 100, "accuracy, points (90 % interval)"),
    )
    for axis, (column, scale, label) in zip(axes, panels, strict=True):
        tests = [setting["against_drgrpo"]["grpo"][column] for setting in settings.values()]
        middle = scale * np.array([t["mean"] for t in tests])
        error = np.abs(scale * np.array([t["interval"] for t in tests]).T - middle)
        axis.errorbar(middle, range(len(tests)), xerr=error, fmt="o", color="C3", capsize=3)
        axis.axvline(0, color="0.5", lw=0.8)
        axis.grid(alpha=0.3, axis="x")
        axis.set_xlabel(label)
    axes[1].axvspan(-100 * MARGIN, 100 * MARGIN, color="0.9", zorder=0)
    axes[0].set_yticks(range(len(settings)), settings)
    axes[0].invert_yaxis()
    figure.suptitle("GRPO minus Dr. GRPO at the end of training", fontsize=11)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
