"""What does a rollout that does not wait for its last responses save, and what does it cost?

    python -m bench.experiments.carry_over     # 12 runs on a quiet core
    python -m bench.experiments.carry_over --seeds 2 --steps 40

Result with five seeds: 0.15 and 0.3 cost 2.5 and 3.6 points of accuracy after as many responses,
with intervals off zero. That machine was not quiet. On a quiet one steps take 19 and 27 % longer
(four seeds of 60 steps, carry_over_60_steps.json). docs/carry_over.md has the table.

Every run is a `train.py` of its own on the `tiny` recipe, with `--carry-over` 0, 0.15 and 0.3. Runs
of one seed share the warmed-up model and the order of the data. All of them train on equally many
responses. Finished runs are not run again.

What is compared, paired by seed, with 95 % t-intervals:

    after equal responses   reward and length in training, over the last tenth of the steps, and
                            accuracy on held-out problems at T = 1, over the last three evaluations
    after equal seconds     that accuracy at the last evaluation before the fastest run of the seed
                            ends; evaluations and checkpoints cost no time
    seconds                 of a step

Times count only if nothing else runs: `--jobs` is 1.
"""

import argparse
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import torch

from bench import harness
from bench.experiments.study import Setting, difference, folder, train_all
from bench.harness import RESULTS, ROOT, markdown, spread
from drgrpo.run.files import read_jsonl

SHARES = (0.0, 0.15, 0.3)
POOLED = 3  # evaluations
COLUMNS = {  # column: format, heading
    "reward": (".3f", "reward"),
    "accuracy": (".3f", "accuracy"),
    "length": (".1f", "length"),
    "step_s": (".3f", "seconds a step"),
    "accuracy_in_time": (".3f", "accuracy after equal seconds"),
    "stale": (".2f", "stale tokens"),
}


def main() -> None:
    args = command_line().parse_args()
    torch.set_num_threads(1)
    for share in SHARES:
        train_all(name(share), setting(share, args.seeds, args.steps), args.runs, args.jobs)
    arms = compare(args.runs, args.seeds)
    result = {"where": harness.provenance(), "steps": args.steps, "arms": arms}
    line = harness.write_json(args.out / "carry_over.json", result)
    print(table(arms, COLUMNS), line, sep="\n\n")


def command_line() -> argparse.ArgumentParser:
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=4)
    add("--steps", type=int, default=100)
    add("--jobs", type=int, default=1, help="runs at a time, one thread each")
    add("--runs", type=Path, default=ROOT / "runs" / "carry_over", help="where the runs go")
    add("--out", type=Path, default=RESULTS, help="where the results go")
    return parser


def name(share: float) -> str:
    return f"carry over {share:g}"


def setting(share: float, seeds: int, steps: int) -> Setting:
    # the carried responses run beside the 256 new ones, not after them
    train = {"carry_over": share, "sampler_batch": 512}
    return Setting(train=train, algos=("drgrpo",), seeds=seeds, steps=steps)


def compare(runs: Path, seeds: int) -> dict[str, dict]:
    """Of each share: the values of its runs by seed, and their differences from share 0."""
    paths = {s: [folder(runs, name(s), "drgrpo", seed) for seed in range(seeds)] for s in SHARES}
    limits = [min(map(training_seconds, of_seed)) for of_seed in zip(*paths.values(), strict=True)]
    return against_0({share: list(map(ends, folders, limits)) for share, folders in paths.items()})


def against_0(rows: dict[float, list[dict[str, float]]]) -> dict[str, dict]:
    """The columns of every share's runs, and their differences from share 0, paired by seed."""
    arms: dict[str, dict] = {}
    for share, of_share in rows.items():
        values = {column: [row[column] for row in of_share] for column in of_share[0]}
        arms[f"{share:g}"] = {"runs": values}
        if share and len(of_share) > 1:
            baseline = arms["0"]["runs"]
            against = {c: difference(values[c], baseline[c]) for c in values if c != "stale"}
            arms[f"{share:g}"]["against_0"] = against
    return arms


def seconds_of(row: dict) -> float:
    """Of a step, without evaluation and checkpoint."""
    return row["seconds"]["total"] - row["seconds"]["eval"] - row["seconds"]["save"]


def training_seconds(run: Path) -> float:
    return sum(map(seconds_of, read_jsonl(run / "metrics.jsonl")))


def ends(run: Path, limit: float) -> dict[str, float]:
    """The columns of one run. `limit`: the seconds after which accuracies are compared."""
    rows = read_jsonl(run / "metrics.jsonl")
    evals = [row for row in read_jsonl(run / "eval.jsonl") if row["temperature"] > 0]
    elapsed = dict(enumerate(accumulate(map(seconds_of, rows), initial=0.0)))
    in_time = [row for row in evals if elapsed[row["step"]] <= limit + 1e-9]
    late = rows[-max(1, len(rows) // 10) :]
    return {
        "reward": of_responses(late, "reward_mean"),
        "accuracy": fmean(row["accuracy"] for row in evals[-POOLED:]),
        "length": of_responses(late, "response_len_mean"),
        "step_s": elapsed[len(rows)] / len(rows),
        "accuracy_in_time": fmean(row["accuracy"] for row in in_time[-POOLED:]),
        "stale": of_responses(rows, "stale_frac"),
    }


def of_responses(rows: list[dict], column: str) -> float:
    """The mean over the responses of several steps. 0 if no step has the column. Without carry-over
    all steps have equally many responses."""
    values = [(row[column], row.get("responses", 1)) for row in rows if row.get(column) is not None]
    count = sum(n for _, n in values)
    return sum(value * n for value, n in values) / count if values else 0.0


def table(arms: dict[str, dict], columns: dict[str, tuple[str, str]]) -> str:
    """Markdown: a line per share with means and ranges over seeds, then the differences. `columns`:
    format and heading of each."""
    heads = ["`--carry-over`", *(heading for _, heading in columns.values())]
    rows = []
    for share, arm in arms.items():
        rows.append([share, *(spread(arm["runs"][c], form) for c, (form, _) in columns.items())])
        if "against_0" in arm:
            tests = [arm["against_0"].get(column) for column in columns]
            forms = [form for form, _ in columns.values()]
            rows.append(["minus 0 (95 %)", *map(signed, tests, forms)])
    return markdown(heads, rows)


def signed(test: dict | None, form: str) -> str:
    if test is None:
        return ""
    low, high = test["interval"]
    return f"{test['mean']:+{form}} ({low:+{form}} to {high:+{form}})"


if __name__ == "__main__":
    main()
