"""Grades per second: the pool of workers against grading one answer at a time, and against a reward
function of a user.

    python -m bench.bench_grade                 # made-up answers
    python -m bench.bench_grade --data DIR      # the truths of DIR/*.jsonl, rewritten
    python -m bench.bench_grade --save bench/results/grade.json
    DRGRPO_FUZZ=100000 pytest -s tests/test_grade.py -k fuzz_pool    # the fuzz run
There are three loads. `mixed` is what a trained model writes, and the string rules settle most of
it. `math` holds only answers that need math-verify. `hostile` is `math` with one answer in a
hundred that never ends. It is killed after one second of CPU time. The user's function is
`examples/format_reward.py:one_box`, which does next to nothing, so that its line is the cost of a
call.
"""

import random
import time
from itertools import chain
from pathlib import Path

from bench.harness import command_line, provenance, write_json
from drgrpo.answers import equal_as_mathematics, equal_as_strings, extract, truths_of
from drgrpo.data import BENCHMARKS, benchmark_source, load_problems
from drgrpo.grade import Grader
from drgrpo.reward import Term
from drgrpo.types import Completion, Problem, Rollout

ONE_BOX = Term(1.0, "one_box", str(Path(__file__).parents[1] / "examples" / "format_reward.py"))
ENDLESS = "9^{9^9}"
FORMS = (
    *("{a}", "\\frac{{{a}}}{{{b}}}", "{a}\\sqrt{{{b}}}", "({a}, \\frac{{{b}}}{{{c}}})"),
    *("x^2 - {a}x + {b}", "\\frac{{{a} + \\sqrt{{{b}}}}}{{{c}}}"),
    "[{a}, {b}) \\cup ({c}, \\infty)",
)

Pairs = list[tuple[str, str]]
"""Responses with their ground truths."""


def made_up_truths(rng: random.Random, count: int) -> list[str]:
    truths = []
    for _ in range(count):
        form = rng.choice(FORMS)
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        truths.append(form.format(a=a, b=b, c=c))
    return truths


def rewrite(truth: str, rng: random.Random) -> str:
    """A truth as a model may write it: right or wrong, in this form or another."""
    text = truth.strip().strip("$")
    others = [text.replace("\\frac", "\\dfrac"), f"x = {text}", f"{text} + 0", f"{text} + 1"]
    others.append(f"\\left({text}\\right) \\cdot 1")
    return rng.choice([text, text, text, *others])


def make_loads(truths: list[str], count: int, rng: random.Random) -> dict[str, Pairs]:
    """`count` pairs a load. No problem comes twice in the same words."""
    drawn = sorted({(rewrite(truth, rng), truth) for truth in rng.choices(truths, k=8 * count)})
    math = [(a, t) for a, t in drawn if equal_as_strings(a, (t,), "boxed") is None]
    rng.shuffle(math)
    math, mixed = math[:count], rng.sample(drawn, min(count, len(drawn)))
    hostile = math.copy()
    for i in range(50, len(math), 100):
        hostile[i] = (f"{ENDLESS}+{i}", math[i][1])
    return {"mixed": boxed(mixed), "math": boxed(math), "hostile": boxed(hostile)}


def boxed(pairs: Pairs) -> Pairs:
    return [(f"so it is \\boxed{{{answer}}}.", truth) for answer, truth in pairs]


# ---- ways to count the right answers


def in_process(pairs: Pairs, grader: Grader) -> float:
    """What a grader does, without its workers and their protection."""
    right = 0
    for text, truth in pairs:
        given = extract(text, "boxed") or ""
        equal = equal_as_strings(given, (truth,), "boxed")
        right += equal_as_mathematics(given, (truth,), "correct") if equal is None else equal
    return right


def one_at_a_time(pairs: Pairs, grader: Grader) -> float:
    """Submit, wait, submit: as the paper's trainer uses its pool."""
    return sum(grader.submit(*pair).result().score for pair in pairs)


def pool(pairs: Pairs, grader: Grader) -> float:
    grades = [grader.submit(*pair) for pair in pairs]
    return sum(grade.result().score for grade in grades)


def function(pairs: Pairs, grader: Grader) -> float:
    """A user's reward function in its workers. It finds a box in every response."""
    completion = Completion([], [], finished=True)
    rollouts = [Rollout(Problem(0, "", truth), completion, text) for text, truth in pairs]
    calls = [grader.reward.start(rollout)[ONE_BOX.name] for rollout in rollouts]
    return sum(call.result()["value"] for call in calls)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", help="folder with the benchmarks as NAME.jsonl")
    parser.add_argument("--count", type=int, default=600, help="answers a load")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", help="write the numbers to this JSON file")
    args = parser.parse_args()
    rng = random.Random(0)
    truths = made_up_truths(rng, 400)
    if args.data:
        sets = [load_problems(benchmark_source(name, args.data)) for name in BENCHMARKS]
        truths = [truth for p in chain.from_iterable(sets) for truth in truths_of(p.answer)]
    easy = [(f"\\boxed{{{i}/{2 * i}}}", "1/2") for i in range(2, 50)]
    rows = []
    print(f"{'load':8} {'method':24} {'grades/s':>9} {'ms each':>8} {'right':>6}")
    for load, pairs in make_loads(truths, args.count, rng).items():
        methods = {"one at a time, workers": one_at_a_time, f"pool of {args.workers}": pool}
        if load != "hostile":  # in this process nothing would end it
            methods = {"one at a time, in process": in_process, **methods}
        methods[f"function, pool of {args.workers}"] = function
        reward = f"{ONE_BOX.file}:{ONE_BOX.name}"
        for name, method in methods.items():
            with Grader("boxed", workers=args.workers, timeout_s=1.0, reward=reward) as grader:
                in_process(easy, grader)  # imports
                pool(easy, grader)  # starts the workers
                function(easy, grader)
                start = time.perf_counter()
                right = method(pairs, grader)
                seconds = time.perf_counter() - start
            n = len(pairs)
            row = {"load": load, "method": name, "n": n, "right": right, "seconds": seconds}
            rows.append(row)
            speed = f"{n / seconds:9.0f} {1e3 * seconds / n:8.2f}"
            print(f"{load:8} {name:24} {speed} {right / n:6.1%}", flush=True)
    if args.save:
        write_json(Path(args.save), {"where": provenance(), "data": bool(args.data), "rows": rows})


if __name__ == "__main__":
    main()
