"""Statistics of graded responses: each with its formula and where it comes from. numpy, and nothing
of the trainer.

A row is one line of `responses.jsonl` (`drgrpo/evaluation/responses.py`). The problem is the unit
of everything random: resampling and tests draw problems, never samples, because the samples of one
problem are alike and would feign precision.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

LEVEL = 0.95  # of the intervals
DRAWS = 10_000  # bootstrap resamples and random sign flips: a p-value of 0.05 is known to 0.002
SEED = 0


# ---- from rows to columns


def by_problem(rows: Iterable[dict]) -> dict[int, list[dict]]:
    """The samples of each problem, in order."""
    groups: dict[int, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


def problem_scores(rows: Iterable[dict]) -> dict[int, float]:
    """Mean score of each problem's samples: avg@k, of one problem."""
    return {id: fmean(r["score"] for r in group) for id, group in by_problem(rows).items()}


def columns(rows: list[dict]) -> dict:
    """What `train.py` logs of an evaluation. A row without a response is a prompt too long for the
    model: its score of 0 counts, as the problem is part of the benchmark; its length says nothing
    and does not."""
    asked = [r for r in rows if r["response"] is not None]
    scores = problem_scores(rows)
    return {
        "accuracy": fmean(scores.values()),
        "n": len(scores),
        "dropped": len(scores) - len(by_problem(asked)),
        "len_correct": mean(r["tokens"] for r in asked if r["score"] > 0),
        "len_incorrect": mean(r["tokens"] for r in asked if r["score"] <= 0),
        "truncated_frac": mean(not r["finished"] for r in asked),
        "unparsed_frac": mean(not r["parsed"] for r in asked),
    }


def score(rows: list[dict]) -> dict:
    """The columns of one benchmark in `eval.json`: those of training, the interval, and pass@k and
    maj@k if sampled."""
    groups = by_problem(rows).values()
    samples = min(map(len, groups))
    ks = powers_of_two(samples) if samples > 1 else []
    solved = [(len(g), sum(r["score"] > 0 for r in g)) for g in groups]
    return columns(rows) | {
        "samples": samples,
        "interval": interval(bootstrap(list(problem_scores(rows).values()))),
        "pass_at": {str(k): fmean(pass_at_k(n, c, k) for n, c in solved) for k in ks},
        "maj_at": {
            str(k): fmean(
                maj_at_k([r["vote"] for r in g], [r["score"] for r in g], k) for g in groups
            )
            for k in ks
        },
    }


def average(benchmarks: dict[str, list[dict]]) -> dict:
    """The plain mean of the benchmarks' accuracies, as in the paper, and its interval: problems are
    resampled within each benchmark, since the benchmarks themselves are fixed."""
    scores = [list(problem_scores(rows).values()) for rows in benchmarks.values()]
    draws = np.mean([bootstrap(values, seed=(SEED, i)) for i, values in enumerate(scores)], axis=0)
    return {
        "average": fmean(fmean(values) for values in scores),
        "average_interval": interval(draws),
    }


def mean(values: Iterable[float]) -> float | None:
    """None without values: JSON has no NaN."""
    values = list(values)
    return fmean(values) if values else None


# ---- several samples of a problem


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... up to `samples`."""
    return [2**i for i in range(samples.bit_length())]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them right, drawn without replacement, hold a right
    one: 1 - C(n-c, k) / C(n, k), the unbiased estimate of 1 - (1-p)^k (Chen et al. 2021, arXiv
    2107.03374, Eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[int | None], scores: Sequence[float], k: int) -> float:
    """Expected score of the answer that most of k samples give (Wang et al. 2022, arXiv
    2203.11171).

    `votes` names the answer of each sample, None where there is none. A tie is drawn by lot, so it
    scores the mean of the tied answers; no vote at all scores 0. Mean over the n // k disjoint
    blocks of k consecutive samples: independent, so unbiased, where all the subsets of k would need
    sampling."""
    return fmean(
        majority(votes[i : i + k], scores[i : i + k]) for i in range(0, len(votes) - k + 1, k)
    )


def majority(votes: Sequence[int | None], scores: Sequence[float]) -> float:
    counts = Counter(v for v in votes if v is not None)
    if not counts:
        return 0.0
    first = [vote for vote, count in counts.items() if count == max(counts.values())]
    return fmean(
        fmean(s for v, s in zip(votes, scores, strict=True) if v == winner) for winner in first
    )


# ---- how sure


def bootstrap(values: Sequence[float], seed: int | tuple[int, ...] = SEED) -> np.ndarray:
    """Means of DRAWS resamples of `values` with replacement (Efron 1979), [DRAWS].

    A mean depends only on how often each distinct value was drawn, and these counts are
    multinomial: the same distribution as drawing indices, in memory that does not grow with the
    benchmark."""
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=DRAWS)
    return drawn @ distinct / len(values)


def interval(draws: np.ndarray) -> list[float]:
    """Percentile bootstrap interval [low, high]. Of scores that are all equal it is a point:
    resampling cannot show what the sample does not hold, so 0 of 30 gives [0, 0]."""
    return [float(q) for q in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact McNemar test: two-sided p-value that as many problems or more, of those that one model
    alone solves, fall to one of the two when either is as likely. 2 P(X <= min) with X ~
    Binomial(only_a + only_b, 1/2), at most 1."""
    n = only_a + only_b
    return (
        min(1.0, sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2 ** (n - 1))
        if n
        else 1.0
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Paired permutation test: two-sided p-value of a sum of paired differences, when each could as
    well have the other sign (Fisher 1935). Monte Carlo over DRAWS flips, p = (1 + hits) / (1 +
    DRAWS), which is never too small (Phipson and Smyth 2010). Of n differences of one size,
    Binomial(n, 1/2) keep their sign; so the flips of each size are one draw."""
    size, counts = np.unique(
        np.abs(np.asarray(differences, dtype=np.float64)).round(12), return_counts=True
    )
    kept = np.random.default_rng(SEED).binomial(counts, 0.5, size=(DRAWS, len(counts)))
    sums = (2 * kept - counts) @ size
    hits = int(
        (np.abs(sums) >= abs(float(np.sum(differences))) - 1e-9 * max(1.0, float(size.max()))).sum()
    )
    return (1 + hits) / (1 + DRAWS)


def two_proportions(pairs: Sequence[tuple[float, int, float, int]]) -> float:
    """Two-sided p-value that the mean over `pairs` (p, n, q, m) of the differences p - q is 0, with
    p of n problems solved and q of m. Pooled z-test: z = sum (p - q) / sqrt(sum r (1 - r) (1/n +
    1/m)), r = (n p + m q) / (n + m).

    For a published score, of which only the proportion is known. It treats the two as independent
    draws of problems; they are the same problems, on which models tend to agree, so it calls too
    much noise rather than too little."""
    difference = sum(p - q for p, _, q, _ in pairs)
    variance = sum(
        r * (1 - r) * (1 / n + 1 / m)
        for p, n, q, m in pairs
        for r in [min(1.0, max(0.0, (n * p + m * q) / (n + m)))]
    )
    return (
        math.erfc(abs(difference) / math.sqrt(2 * variance))
        if variance > 0
        else float(difference == 0)
    )
