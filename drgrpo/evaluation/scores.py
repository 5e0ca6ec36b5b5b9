"""Statistics of graded responses, each with its formula and its source. They need numpy only.

A row is one line of `responses.jsonl` (`drgrpo/evaluation/responses.py`). The samples of one
problem are alike. Resampling draws problems first and then samples within them, and tests draw
problems only. Samples drawn as if each were a problem of its own would feign precision.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

LEVEL = 0.95  # of the intervals
DRAWS = 10_000  # resamples and sign flips; the standard error of a p-value of 0.05 is 0.002
SEED = 0

Samples = Sequence[Sequence[float]]
"""The scores, 0 or 1, of the samples of each problem."""


# ---- from rows to columns


def by_problem(rows: Iterable[dict]) -> dict[int, list[dict]]:
    """The samples of each problem, in order."""
    groups: dict[int, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


def values(rows: Iterable[dict], column: str) -> list:
    return [row[column] for row in rows]


def problem_scores(rows: Iterable[dict]) -> dict[int, float]:
    """Mean score of each problem's samples, which is mean@k of one problem."""
    return {id: fmean(values(group, "score")) for id, group in by_problem(rows).items()}


def sample_scores(rows: Iterable[dict]) -> list[list[float]]:
    """The scores of each problem's samples."""
    return [values(group, "score") for group in by_problem(rows).values()]


def columns(rows: list[dict]) -> dict:
    """What `train.py` logs of an evaluation.

    A row without a response is a prompt too long for the model. Its score of 0 counts, since the
    problem is part of the benchmark. Its length does not count."""
    answered = [r for r in rows if r["response"] is not None]
    right = [r for r in answered if r["score"] > 0]
    wrong = [r for r in answered if r["score"] <= 0]
    scores = problem_scores(rows)
    return {
        "accuracy": fmean(scores.values()),
        "interval": interval(two_stage(sample_scores(rows))),
        "n": len(scores),
        "dropped": len(scores) - len(by_problem(answered)),
        "len_correct": mean(values(right, "tokens")),
        "len_incorrect": mean(values(wrong, "tokens")),
        "truncated_frac": mean(map(operator.not_, values(answered, "finished"))),
        "unparsed_frac": mean(map(operator.not_, values(answered, "parsed"))),
        **rewards([row for row in answered if "reward" in row]),
    }


def rewards(rows: list[dict]) -> dict:
    """Means of the reward and of its components, and how many calls of reward functions failed.
    Nothing without `--reward`."""
    if not rows:
        return {}
    components, means = values(rows, "components"), {}
    for name in components[0]:
        means[f"reward/{name}"] = mean(value or 0.0 for value in values(components, name))
    failed = sum(list(each.values()).count(None) for each in components)
    return {"reward": mean(values(rows, "reward")), **means, "reward_errors": failed}


def score(rows: list[dict]) -> dict:
    """The columns of one benchmark in `eval.json`: those of training. If there are several samples,
    also pass@k, maj@k, and the interval of this benchmark again, which moves the samples only."""
    groups = list(by_problem(rows).values())
    samples = min(map(len, groups))
    ks = powers_of_two(samples) if samples > 1 else []
    result = columns(rows) | {"samples": samples}
    result["pass_at"] = {str(k): mean_pass_at_k(groups, k) for k in ks}
    result["maj_at"] = {str(k): mean_maj_at_k(groups, k) for k in ks}
    if samples > 1:
        result["interval_samples"] = interval(samples_only(sample_scores(rows)))
    return result


def count_right(rows: Iterable[dict]) -> int:
    return sum(r["score"] > 0 for r in rows)


def mean_pass_at_k(groups: list[list[dict]], k: int) -> float:
    """pass@k, over the samples of each problem."""
    return fmean(pass_at_k(len(group), count_right(group), k) for group in groups)


def mean_maj_at_k(groups: list[list[dict]], k: int) -> float:
    """maj@k, over the samples of each problem."""
    return fmean(maj_at_k(values(g, "vote"), values(g, "score"), k) for g in groups)


def average(benchmarks: dict[str, list[dict]]) -> dict:
    """The plain mean of the benchmarks' accuracies, as in the paper, and its intervals.

    Problems are resampled within each benchmark, since the benchmarks themselves are fixed."""
    scores = [sample_scores(rows) for rows in benchmarks.values()]
    draws = [two_stage(each, seed=(SEED, i)) for i, each in enumerate(scores)]
    result = {
        "average": fmean(fmean(map(fmean, each)) for each in scores),
        "average_interval": interval(np.mean(draws, axis=0)),
    }
    if min(len(samples) for each in scores for samples in each) > 1:
        draws = [samples_only(each, seed=(SEED, i)) for i, each in enumerate(scores)]
        result["average_interval_samples"] = interval(np.mean(draws, axis=0))
    return result


def mean(numbers: Iterable[float]) -> float | None:
    """None without numbers, since JSON has no NaN."""
    numbers = list(numbers)
    return fmean(numbers) if numbers else None


# ---- several samples of a problem


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... up to `samples`."""
    return [2**i for i in range(samples.bit_length())]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples hold a right one, if c of the n are right and the k are drawn
    without replacement: 1 - C(n-c, k) / C(n, k).

    It is the unbiased estimate of 1 - (1-p)^k (Chen et al. 2021, arXiv 2107.03374, Eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[int | None], scores: Sequence[float], k: int) -> float:
    """Expected score of the answer that most of k samples give (Wang et al. 2022, arXiv
    2203.11171).

    `votes` names the answer of each sample, None where there is none. The result is the mean over
    the n // k disjoint blocks of k consecutive samples. The blocks are independent, so that the
    mean is unbiased; all subsets of k would be too many."""
    starts = range(0, len(votes) - k + 1, k)
    return fmean(majority(votes[i : i + k], scores[i : i + k]) for i in starts)


def majority(votes: Sequence[int | None], scores: Sequence[float]) -> float:
    """Score of the most frequent answer. Tied answers score their mean, as if one were drawn by
    lot. Without any answer the score is 0."""
    scores_of: dict[int, list[float]] = {}
    for vote, score in zip(votes, scores, strict=True):
        if vote is not None:
            scores_of.setdefault(vote, []).append(score)
    most = max(map(len, scores_of.values()), default=0)
    return mean(fmean(s) for s in scores_of.values() if len(s) == most) or 0.0


# ---- how sure


def bootstrap(values: Sequence[float], seed: int | tuple[int, ...] = SEED) -> np.ndarray:
    """Means of DRAWS resamples of `values` with replacement (Efron 1979), [DRAWS].

    A mean depends only on how often each distinct value is drawn, and these counts are multinomial.
    Drawing the counts has the same distribution as drawing indices, and its memory does not grow
    with the benchmark."""
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=DRAWS)
    return drawn @ distinct / len(values)


def two_stage(scores: Samples, seed: int | tuple[int, ...] = SEED) -> np.ndarray:
    """Means of DRAWS resamples of the problems and, within each problem, of its samples, [DRAWS].
    They are between 0 and 1.

    The means of the problems already scatter by the noise of their samples. To resample samples on
    top would count that noise twice. So both stages are rescaled (Rao and Wu 1988): samples to the
    unbiased variance of a problem's mean, and problems to what is left of the variance between
    means. The sum is the variance of the plain bootstrap. With one sample of each problem it is the
    plain bootstrap."""
    kinds = Kinds.of(scores)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(kinds.n, kinds.count / kinds.n, size=DRAWS)
    mean = kinds.count @ kinds.mean / kinds.n
    total = kinds.count @ (kinds.mean - mean) ** 2
    within = kinds.count @ kinds.variance
    between = math.sqrt(max(0.0, 1 - within / total)) if total else 0.0
    draws = mean + between * (drawn @ kinds.mean / kinds.n - mean) + kinds.noise(drawn, rng)
    return np.clip(draws, 0.0, 1.0)


def samples_only(scores: Samples, seed: int | tuple[int, ...] = SEED) -> np.ndarray:
    """Means of DRAWS resamples of the samples alone, [DRAWS]: the same problems, answered again.

    Rescaled like the samples in `two_stage`. It needs two samples of each problem."""
    kinds = Kinds.of(scores)
    drawn = np.tile(kinds.count, (DRAWS, 1))
    draws = kinds.count @ kinds.mean / kinds.n + kinds.noise(drawn, np.random.default_rng(seed))
    return np.clip(draws, 0.0, 1.0)


@dataclass(frozen=True)
class Kinds:
    """The problems with equally many samples, equally many of them right, are of one kind [K].

    count: problems of the kind. samples: their number of samples. mean: their mean score."""

    count: np.ndarray
    samples: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, scores: Samples) -> Kinds:
        pairs = [(fmean(samples), len(samples)) for samples in scores]
        kinds, count = np.unique(pairs, axis=0, return_counts=True)
        return cls(count, kinds[:, 1].astype(int), kinds[:, 0])

    @property
    def n(self) -> int:
        return int(self.count.sum())

    @property
    def variance(self) -> np.ndarray:
        """Unbiased variance of a problem's mean over its samples, [K]: p (1 - p) / (k - 1). It is 0
        for a single sample, where p is 0 or 1."""
        return self.mean * (1 - self.mean) / np.maximum(self.samples - 1, 1)

    def noise(self, drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """By how much resampled samples move the mean of all problems, [DRAWS]. `drawn` [DRAWS, K]
        is how many problems of each kind there are.

        The right ones among the samples of `drawn` problems of one kind are binomial. A resample of
        k has (k - 1) / k of the unbiased variance, hence the factor."""
        right = rng.binomial(drawn * self.samples, self.mean)
        factor = np.sqrt(self.samples / np.maximum(self.samples - 1, 1))
        return (right / self.samples - drawn * self.mean) @ factor / self.n


def interval(draws: np.ndarray) -> list[float]:
    """Percentile bootstrap interval [low, high].

    For scores that are all equal it is a point: 0 of 30 gives [0, 0]. Resampling cannot show what
    the sample does not hold."""
    return [float(q) for q in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact McNemar test: two-sided p-value of the problems that one model alone solves.

    Without a difference each of them falls to either model with probability 1/2. p = 2 P(X <= min)
    with X ~ Binomial(only_a + only_b, 1/2), at most 1."""
    n = only_a + only_b
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, tail / 2 ** (n - 1))


def sign_flip(differences: Sequence[float]) -> float:
    """Paired permutation test: two-sided p-value of a sum of paired differences, each of which
    could as well have the other sign (Fisher 1935).

    Monte Carlo over DRAWS flips. p = (1 + hits) / (1 + DRAWS) is never too small (Phipson and Smyth
    2010). Of n differences of one size Binomial(n, 1/2) keep their sign, so that the flips of each
    size are one draw."""
    sizes = np.abs(np.asarray(differences, dtype=np.float64)).round(12)
    size, counts = np.unique(sizes, return_counts=True)
    kept = np.random.default_rng(SEED).binomial(counts, 0.5, size=(DRAWS, len(counts)))
    sums = np.abs((2 * kept - counts) @ size)
    rounding = 1e-9 * max(1.0, float(size.max()))
    hits = int((sums >= abs(float(np.sum(differences))) - rounding).sum())
    return (1 + hits) / (1 + DRAWS)


def two_proportions(pairs: Sequence[tuple[float, int, float, int]]) -> float:
    """Two-sided p-value that the mean of the differences p - q over `pairs` (p, n, q, m) is 0. A
    pair is a benchmark: one model solves a share p of n problems, and the other a share q of m.

    Pooled z-test: z = sum (p - q) / sqrt(sum r (1 - r) (1/n + 1/m)), r = (n p + m q) / (n + m). It
    is for published scores, of which only the proportion is known. It treats the two as independent
    draws of problems. They are the same problems, on which models tend to agree, so that the test
    calls too much noise rather than too little."""
    difference = variance = 0.0
    for p, n, q, m in pairs:
        r = min(1.0, max(0.0, (n * p + m * q) / (n + m)))
        difference += p - q
        variance += r * (1 - r) * (1 / n + 1 / m)
    if variance == 0:
        return float(difference == 0)
    return math.erfc(abs(difference) / math.sqrt(2 * variance))
