"""Every objective side by side, with controls: accuracy, length of wrong answers, and tokens paid.

    python -m bench.experiments.objectives                  # eight seeds, an hour on two cores
    python -m bench.experiments.objectives --seeds 2
    python -m bench.experiments.objectives --figures-only   # what objectives.json alone can draw

Result with eight seeds, at commit 6ea001e on two cores of an AMD EPYC: wrong answers end 39 and 42
tokens longer with GRPO and with its length term alone. All accuracies are within 5 points of
Dr. GRPO's. To an accuracy of 0.7 the two train on 1.3 and 1.4 times as many tokens. The overlong
mask makes wrong answers long in three seeds of eight. docs/study.md has the tables.

Every run is a `train.py` of its own on the `tiny` recipe, with four updates per rollout. Runs of
one seed share the warmed-up model and the order of the data. The controls train Dr. GRPO on rewards
that say nothing about whether an answer is right. Finished runs are not run again.

    objectives.json       every run's end and costs, and the differences with intervals and tests
    objectives.md         the tables
    objectives.png        every objective's end: a dot a seed, and the mean
    controls.png          accuracy over training with the true reward and with the controls

Lengths and accuracies are compared as in bench/experiments/study.py. The cost is what a run has
spent when its held-out accuracy first reaches a target: tokens sampled, tokens trained on, and
seconds of rollout and training. Between two evaluations the accuracy is taken to rise linearly. A
cost is compared with Dr. GRPO's of the same seed, and the mean of the ratios is geometric.
"""

import json
import os
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise, product
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from scipy import stats

from bench import harness
from bench.experiments.study import (
    Setting,
    change,
    curve,
    difference,
    draw_mean,
    ends,
    equivalence,
    signed,
    train_one,
    warm_models,
)
from bench.harness import RESULTS, ROOT, markdown, new_figure, save_figure
from drgrpo.run.files import read_jsonl
from drgrpo.tiny.warmup import Warmup

OBJECTIVES = {
    "drgrpo": "Dr. GRPO",
    "grpo": "GRPO",
    "grpo_length": "length term only",
    "grpo_std": "std term only",
    "dapo": "DAPO",
    "rloo": "RLOO",
    "lite_ppo": "Lite PPO",
    "maxrl": "MaxRL",
    "cispo": "CISPO",
    "overlong_mask": "overlong mask",
}
"""Without the masks of trainer and sampler's difference, because here the two agree to rounding."""
CONTROLS = {"random_reward": "random", "constant_reward": "constant", "form_reward": "form only"}
TARGETS = (0.5, 0.6, 0.7)
COSTS = {"tokens": "sampled", "tokens_trained": "trained on", "seconds": "seconds"}


def main() -> None:
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=8, help="runs of each objective and control")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    add("--runs", type=Path, default=ROOT / "runs" / "objectives", help="where the runs go")
    add("--out", type=Path, default=RESULTS, help="where the results go")
    add("--figures-only", action="store_true", help="train nothing, draw objectives.json")
    args = parser.parse_args()
    if not args.figures_only:
        torch.set_num_threads(1)
        train_all(args)
        result = {"where": harness.provenance(), **measured(args.runs, args.seeds)}
        print(harness.write_json(args.out / "objectives.json", result))
    show(json.loads((args.out / "objectives.json").read_text()), args.out)


# ---- runs


def train_all(args: Namespace) -> None:
    """The supervised phases, then the runs that are not there yet, seed by seed."""
    warmups = [Warmup(seed=seed) for seed in range(args.seeds)]
    models = warm_models(warmups, args.runs, args.jobs)

    def train(run: tuple[int, str]) -> None:
        seed, arm = run
        algo = arm if arm in OBJECTIVES else "drgrpo"
        reward = f"{ROOT}/bench/experiments/controls.py:{arm}" if arm in CONTROLS else "math"
        setting = Setting(train={"reward": reward})
        train_one(setting, models[seed], folder(args.runs, arm, seed), algo, seed)
        print(f"{arm}, seed {seed}: done", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train, product(range(args.seeds), [*OBJECTIVES, *CONTROLS])))


def folder(runs: Path, arm: str, seed: int) -> Path:
    return runs / f"{arm}-seed{seed}"


# ---- what came of them


def measured(runs: Path, seeds: int) -> dict:
    """Every run's end and costs, and each objective against Dr. GRPO."""
    arms = {}
    for arm in (*OBJECTIVES, *CONTROLS):
        arms[arm] = [run_row(folder(runs, arm, seed)) for seed in range(seeds)]
    against = {arm: compare(arms[arm], arms["drgrpo"]) for arm in OBJECTIVES if arm != "drgrpo"}
    return {"runs": arms, "against_drgrpo": against}


def run_row(run: Path) -> dict:
    """A run's end, its costs for each target, and its accuracy at every evaluation."""
    steps, accuracy = curve(run, "accuracy")
    costs = {name: costs_to(run, name) for name in COSTS}
    return ends(run) | {"costs": costs, "curve": {"step": steps, "accuracy": accuracy}}


def costs_to(run: Path, name: str) -> dict[str, float | None]:
    """What the run has spent of `name` when it first reaches each target. None if it never does."""
    spent = [0.0, *accumulate(spending(row, name) for row in read_jsonl(run / "metrics.jsonl"))]
    steps, accuracy = curve(run, "accuracy")
    points = [(spent[step], value) for step, value in zip(steps, accuracy, strict=True)]
    return {str(target): first_reached(points, target) for target in TARGETS}


def spending(row: dict, name: str) -> float:
    if name == "seconds":
        return row["seconds"]["rollout"] + row["seconds"]["old"] + row["seconds"]["train"]
    return row[name]


def first_reached(points: list[tuple[float, float]], target: float) -> float | None:
    """Where the line through the points (x, y) first reaches `target`. None if it never does."""
    if points[0][1] >= target:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= target:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


def compare(ours: list[dict], baseline: list[dict]) -> dict:
    """Length of wrong answers, accuracy and costs against Dr. GRPO's, paired by seed."""

    def late(runs: list[dict], column: str) -> list[float | None]:
        return [run[column][1] for run in runs]

    def cost(runs: list[dict], name: str, target: float) -> list[float | None]:
        return [run["costs"][name][str(target)] for run in runs]

    costs: dict[str, dict] = {name: {} for name in COSTS}
    for name, target in product(COSTS, TARGETS):
        pair = cost(ours, name, target), cost(baseline, name, target)
        costs[name][str(target)] = cost_ratio(*pair)
    return {
        "len_incorrect": difference(late(ours, "len_incorrect"), late(baseline, "len_incorrect")),
        "accuracy": equivalence(late(ours, "accuracy"), late(baseline, "accuracy")),
        "costs": costs,
    }


def cost_ratio(ours: list[float | None], baseline: list[float | None]) -> dict:
    """Geometric mean of ours / baseline with its 95 % t-interval. Seeds on which one of the two
    never reached the target are left out and counted in `missing`."""
    pairs = [(a, b) for a, b in zip(ours, baseline, strict=True) if a and b]
    missing = {"seeds": len(pairs), "missing": len(ours) - len(pairs)}
    if len(pairs) < 2:
        return {"mean": None, "interval": [None, None], **missing}
    logs = np.log([a / b for a, b in pairs])
    interval = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    return {"mean": np.exp(logs.mean()), "interval": list(np.exp(interval)), **missing}


# ---- tables and figures


def show(result: dict, out: Path) -> None:
    """The tables and figures that need nothing but objectives.json."""
    runs, against = result["runs"], result["against_drgrpo"]
    tables = objectives_table(runs, against), costs_table(runs, against), controls_table(runs)
    heads = "## Where the objectives end", "## What an accuracy costs", "## Controls"
    text = "# Every objective side by side\n"
    text += f"\n{len(runs['drgrpo'])} seeds, written by `python -m bench.experiments.objectives`.\n"
    text += f"Means over seeds, with the range or the interval. On {machine(result['where'])}\n"
    for head, table in zip(heads, tables, strict=True):
        text += f"\n{head}\n\n{table}\n"
    (out / "objectives.md").write_text(text)
    print(*tables, sep="\n\n")
    draw_objectives(runs, against, out / "objectives.png")
    draw_controls(runs, out / "controls.png")


def machine(where: dict) -> str:
    return f"{where['device']}, torch {where['torch']}, commit {where['commit']}."


def objectives_table(runs: dict, against: dict) -> str:
    heads = ["objective", "held-out accuracy", "length of wrong answers", "truncated"]
    heads += ["wrong answers longer than Dr. GRPO's by (95 %)", "accuracy above it (90 %)"]
    rows = []
    for arm, name in OBJECTIVES.items():
        cells = [change(runs[arm], "accuracy", ".2f"), change(runs[arm], "len_incorrect", ".0f")]
        cells.append(change(runs[arm], "truncated_frac", ".2f"))
        compared = ["", ""]
        if arm in against:
            length, accuracy = against[arm]["len_incorrect"], against[arm]["accuracy"]
            compared = [signed(length, ".0f"), signed(accuracy, ".3f")]
        rows.append([name, *cells, *compared])
    return markdown(heads, rows)


def costs_table(runs: dict, against: dict) -> str:
    """Costs to the last target: Dr. GRPO's own, and the others' as multiples of it."""
    target = str(TARGETS[-1])
    rows = [["Dr. GRPO", *own_costs(runs["drgrpo"], target)]]
    for arm, tests in against.items():
        ratios = [tests["costs"][name][target] for name in COSTS]
        rows.append([OBJECTIVES[arm], *map(times, ratios)])
    heads = [f"to accuracy {target}", *(f"{name}" for name in COSTS.values())]
    return markdown(heads, rows)


def own_costs(runs: list[dict], target: str) -> list[str]:
    cells = []
    for name in COSTS:
        known = [run["costs"][name][target] for run in runs if run["costs"][name][target]]
        cells.append(f"{fmean(known):,.0f}" if known else "–")
    return cells


def times(ratio: dict) -> str:
    if ratio["mean"] is None:
        return "–"
    low, high = ratio["interval"]
    missing = f", {ratio['missing']} never" if ratio["missing"] else ""
    return f"{ratio['mean']:.2f} x ({low:.2f} to {high:.2f}{missing})"


def controls_table(runs: dict) -> str:
    columns = {"accuracy": ".2f", "len_incorrect": ".0f", "reward": ".2f", "entropy": ".3f"}
    heads = ["reward", "held-out accuracy", "length of wrong answers", "reward", "entropy"]
    rows = []
    for arm, name in {"drgrpo": "right answers", **CONTROLS}.items():
        rows.append([name, *(change(runs[arm], column, form) for column, form in columns.items())])
    return markdown(heads, rows)


def draw_objectives(runs: dict, against: dict, path: Path) -> None:
    """A line per objective: accuracy and length at the end, tokens to the last target."""
    figure, axes = new_figure(1, 3, (12, 4.2), sharey=True)
    target = str(TARGETS[-1])
    panels = (
        ("accuracy at the end", [[run["accuracy"][1] for run in runs[a]] for a in OBJECTIVES]),
        (
            "length of wrong answers, tokens",
            [[run["len_incorrect"][1] for run in runs[a]] for a in OBJECTIVES],
        ),
        (
            f"sampled tokens until accuracy {target}, millions",
            [millions(runs[a], target) for a in OBJECTIVES],
        ),
    )
    for axis, (title, values) in zip(axes, panels, strict=True):
        draw_dots(axis, values)
        axis.set_title(title, fontsize=10)
    axes[0].set_yticks(range(len(OBJECTIVES)), OBJECTIVES.values())
    axes[0].invert_yaxis()
    save_figure(figure, path)


def millions(runs: list[dict], target: str) -> list[float]:
    known = [run["costs"]["tokens"][target] for run in runs]
    return [tokens / 1e6 for tokens in known if tokens]


def draw_dots(axis, values: list[list[float]]) -> None:
    """A small dot per seed and a large one for the mean, a line per list."""
    for y, row in enumerate(values):
        known = [value for value in row if value is not None]
        color = "C0" if y == 0 else "0.35"
        axis.plot(known, [y] * len(known), "o", ms=3.5, color=color, alpha=0.35, mew=0)
        axis.plot(fmean(known), y, "o", ms=8, color=color)
    axis.axvline(fmean(v for v in values[0] if v is not None), color="C0", lw=0.8, ls="--")
    axis.grid(alpha=0.3, axis="x")
    axis.spines[["top", "right"]].set_visible(False)


def draw_controls(runs: dict, path: Path) -> None:
    figure, axis = new_figure(1, 1, (6.5, 3.6))
    arms = {"drgrpo": "1 for a right answer", "constant_reward": "1 for every answer"}
    arms |= {"random_reward": "1 for a random 29 %", "form_reward": "1 for the right form"}
    for color, (arm, label) in zip(("C0", "C2", "C3", "C1"), arms.items(), strict=True):
        curves = [(run["curve"]["step"], run["curve"]["accuracy"]) for run in runs[arm]]
        draw_mean(axis, curves, color, f"reward {label}")
    axis.set_xlabel("step")
    axis.set_ylabel("accuracy on held-out problems")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
