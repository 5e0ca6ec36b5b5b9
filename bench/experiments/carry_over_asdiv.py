"""What does carry-over cost a pretrained model?

    python -m bench.experiments.carry_over_asdiv --model runs/warmup/smol-seed0-*
    python -m bench.experiments.carry_over_asdiv --model DIR --data my.jsonl --jobs 2

Result with five seeds (training code of commit 5fb712b, two cores of an AMD EPYC): no cost shows in
accuracy, where the intervals exclude a loss of 3 points, nor in length, within half a token. Steps
took 16 and 22 % longer. Two runs at a time shared the machine. docs/carry_over.md has the table.

Every run is a `train.py` of the recipe `asdiv_smol`, with `--carry-over` 0, 0.15 and 0.3. `--model`
is what `make real` leaves after the supervised phase. Runs of one seed see the same problems in the
same order. Then `eval.py` draws four samples for each of the held-out problems. Finished runs are
not run again.

What is compared, paired by seed, with 95 % t-intervals: accuracy and length at T = 1 on held-out
problems after equally many responses, reward over the last quarter of the steps, and seconds.
Times count only if nothing else runs.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from bench import harness
from bench.experiments.carry_over import SHARES, against_0, of_responses, seconds_of, table
from bench.experiments.study import folder
from bench.harness import RESULTS, ROOT
from drgrpo.run.files import read_jsonl

SAMPLES = 4
COLUMNS = {  # column: format, heading
    "accuracy": (".3f", "accuracy at T = 1"),
    "right": (".2f", "tokens, right"),
    "wrong": (".2f", "tokens, wrong"),
    "reward": (".3f", "reward"),
    "step_s": (".1f", "seconds a step"),
    "rollout_s": (".1f", "of them rollout"),
    "stale": (".2f", "stale tokens"),
}


def main() -> None:
    args = parse()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda arm: run(args, *arm), product(range(args.seeds), SHARES)))
    rows = {s: [ends(out_of(args, seed, s)) for seed in range(args.seeds)] for s in SHARES}
    arms = against_0(rows)
    result = {"where": harness.provenance(), "arms": arms}
    line = harness.write_json(args.out / "carry_over_asdiv.json", result)
    print(table(arms, COLUMNS), line, sep="\n\n")


def parse() -> argparse.Namespace:
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder of the model after its supervised phase")
    add("--data", default="asdiv_formulas", help="the problems, as in docs/asdiv.md")
    add("--seeds", type=int, default=5)
    add("--jobs", type=int, default=1, help="runs at a time, one thread each")
    add("--runs", type=Path, default=ROOT / "runs" / "carry_over", help="where the runs go")
    add("--out", type=Path, default=RESULTS, help="where the results go")
    return parser.parse_args()


def out_of(args: argparse.Namespace, seed: int, share: float) -> Path:
    return folder(args.runs, f"asdiv carry over {share:g}", "drgrpo", seed)


def run(args: argparse.Namespace, seed: int, share: float) -> None:
    """One `train.py` and its `eval.py`, unless they are finished."""
    out = out_of(args, seed, share)
    if (out / "T1" / "eval.json").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    training = ["train.py", "--recipe=asdiv_smol", f"--model={args.model}", f"--out={out}"]
    training += [f"--train-data={args.data}[25%:75%]", f"--seed={seed}", f"--carry-over={share}"]
    # eval.py has all held-out problems. train.py looks at a few of them, to save time.
    training += [f"--eval-data={args.data}[99%:]", "--eval-every=0", "--eval-samples=0"]
    evaluation = ["eval.py", f"--model={out}/hf", f"--benchmarks={args.data}[75%:]"]
    evaluation += ["--template={q}\n", "--answer=formula", "--max-new-tokens=24"]
    evaluation += ["--temperature=1", f"--samples={SAMPLES}", "--dtype=bfloat16"]
    harness.run_on_one_thread(training, f"{out}.log")
    harness.run_on_one_thread([*evaluation, f"--out={out}/T1"], f"{out}-T1.log")
    print(f"carry-over {share:g}, seed {seed}: done", flush=True)


def ends(out: Path) -> dict[str, float]:
    """The columns of one run."""
    rows = read_jsonl(out / "metrics.jsonl")
    (result,) = json.loads((out / "T1" / "eval.json").read_text())["benchmarks"].values()
    return {
        "accuracy": result["accuracy"],
        "right": result["len_correct"],
        "wrong": result["len_incorrect"],
        "reward": of_responses(rows[-len(rows) // 4 :], "reward_mean"),
        "step_s": sum(map(seconds_of, rows)) / len(rows),
        "rollout_s": sum(row["seconds"]["rollout"] for row in rows) / len(rows),
        "stale": of_responses(rows, "stale_frac"),
    }


if __name__ == "__main__":
    main()
