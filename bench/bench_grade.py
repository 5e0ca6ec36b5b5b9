"""Grades per second: the pool of workers against grading one answer at a time.

    python -m bench.bench_grade                                 # made-up answers
    python -m bench.bench_grade --data DIR                      # the ground truths of DIR/*.jsonl, rewritten
    python -m bench.bench_grade --save bench/results/grade.json
    DRGRPO_FUZZ=100000 pytest -s tests/test_grade.py -k fuzz_pool   # the fuzz run

Three loads. `mixed`: what a trained model writes, most of it settled by the string rules. `math`:
only answers that need math-verify. `hostile`: `math` with one answer in a hundred that never ends
(killed after one second of CPU time).
"""

import argparse
import random
import time
from pathlib import Path

from bench.harness import provenance, write_json
from drgrpo.data import BENCHMARKS, benchmark_source, load_problems
from drgrpo.grade import Grader, _quick, grade

ENDLESS = "9^{9^9}"


def made_up_truths(rng: random.Random, count: int) -> list[str]:
    forms = (
        "{a}",
        "\\frac{{{a}}}{{{b}}}",
        "{a}\\sqrt{{{b}}}",
        "({a}, \\frac{{{b}}}{{{c}}})",
        "x^2 - {a}x + {b}",
        "\\frac{{{a} + \\sqrt{{{b}}}}}{{{c}}}",
        "[{a}, {b}) \\cup ({c}, \\infty)",
    )
    return [
        rng.choice(forms).format(a=rng.randint(2, 99), b=rng.randint(2, 99), c=rng.randint(2, 99))
        for _ in range(count)
    ]


def written(truth: str, rng: random.Random) -> str:
    """A truth as a model may write it: right or wrong, in this form or another."""
    text = truth.strip().strip("$")
    others = (
        text.replace("\\frac", "\\dfrac"),
        f"x = {text}",
        f"{text} + 0",
        f"\\left({text}\\right) \\cdot 1",
        f"{text} + 1",
    )
    return rng.choice((text, text, text, *others))


def loads(truths: list[str], count: int, rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Pairs of a response and its truth, `count` a load. The same problem never comes twice in the
    same words."""
    mixed = {(written(truth, rng), truth) for truth in rng.choices(truths, k=8 * count)}
    math = [(a, t) for a, t in sorted(mixed) if _quick(a, (t,), "boxed") is None]
    rng.shuffle(math)
    math, mixed = math[:count], rng.sample(sorted(mixed), min(count, len(mixed)))
    hostile = [
        (f"{ENDLESS}+{i}", t) if i % 100 == 50 else pair
        for i, (pair, t) in enumerate((p, p[1]) for p in math)
    ]
    return {
        name: [(f"so it is \\boxed{{{a}}}.", t) for a, t in pairs]
        for name, pairs in {"mixed": mixed, "math": math, "hostile": hostile}.items()
    }


def in_process(pairs, workers):
    return [grade(text, truth, "boxed") for text, truth in pairs]


def one_at_a_time(pairs, workers):
    """Submit, wait, submit: as the paper's trainer uses its pool."""
    return [workers([text], [truth])[0] for text, truth in pairs]


def pool(pairs, workers):
    return workers(*zip(*pairs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder with the benchmarks as NAME.jsonl")
    parser.add_argument("--count", type=int, default=600, help="answers a load")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", help="write the numbers to this JSON file")
    args = parser.parse_args()
    rng = random.Random(0)
    truths = made_up_truths(rng, 400)
    if args.data:
        problems = [
            p for name in BENCHMARKS for p in load_problems(benchmark_source(name, args.data))
        ]
        truths = [
            str(t)
            for p in problems
            for t in (p.answer if isinstance(p.answer, list) else [p.answer])
        ]
    grade("\\boxed{2/4}", "1/2", "boxed")  # imports
    rows = []
    print(f"{'load':8} {'method':24} {'grades/s':>9} {'ms each':>8} {'right':>6}")
    for load, pairs in loads(truths, args.count, rng).items():
        methods = {"one at a time, workers": one_at_a_time, f"pool of {args.workers}": pool}
        if load != "hostile":  # nothing would end it
            methods = {"one at a time, in process": in_process, **methods}
        for name, method in methods.items():
            with Grader("boxed", workers=args.workers, timeout_s=1.0) as workers:
                workers(
                    [f"\\boxed{{{i}/{2 * i}}}" for i in range(2, 50)], ["1/2"] * 48
                )  # starts them all
                start = time.perf_counter()
                right = sum(grade.score for grade in method(pairs, workers))
                seconds = time.perf_counter() - start
            rows.append(
                {"load": load, "method": name, "n": len(pairs), "right": right, "seconds": seconds}
            )
            each = seconds / len(pairs)
            print(
                f"{load:8} {name:24} {1 / each:9.0f} {1e3 * each:8.2f} {right / len(pairs):6.1%}",
                flush=True,
            )
    if args.save:
        write_json(Path(args.save), {"where": provenance(), "data": bool(args.data), "rows": rows})


if __name__ == "__main__":
    main()
