"""Every statistic against a closed form, a full enumeration or a simulation: pass@k, maj@k, the
bootstrap in one stage and in two, the tests of differences."""

import itertools
import math
from statistics import fmean, pvariance

import numpy as np
import pytest
from scipy import stats

from drgrpo.evaluation import scores
from drgrpo.evaluation.scores import (
    average,
    bootstrap,
    columns,
    interval,
    maj_at_k,
    majority,
    mcnemar,
    pass_at_k,
    powers_of_two,
    samples_only,
    score,
    sign_flip,
    two_proportions,
    two_stage,
)
from rows import response_row


def row(id: int, score: float, sample: int = 0, **changes) -> dict:
    return response_row(id=id, score=score, sample=sample, **changes)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(fmean(map(max, subsets)), abs=1e-12)


def test_powers_of_two_up_to_the_samples():
    for n, powers in {1: [1], 2: [1, 2], 3: [1, 2], 7: [1, 2, 4], 8: [1, 2, 4, 8]}.items():
        assert powers_of_two(n) == powers


def test_majority():
    assert majority([0, 1, 1], [1, 0, 0]) == 0 and majority([0, 1, 0], [1, 0, 1]) == 1
    assert majority([0, None, None], [1, 0, 0]) == 1, "no answer, no vote"
    assert majority([0, 1], [1, 0]) == 0.5, "a tie is drawn by lot"
    assert majority([0, 0, 1, 1, 2], [1, 1, 0, 0, 0]) == 0.5, "between the first only"
    assert majority([None, None], [0, 0]) == 0


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_maj_at_k_is_unbiased(k):
    """Its mean over all orders of the samples is the mean over all subsets of k."""
    samples = [(0, 1.0), (0, 1.0), (1, 0.0), (1, 0.0), (None, 0.0), (2, 0.0)]
    orders = [maj_at_k(*zip(*order, strict=True), k) for order in itertools.permutations(samples)]
    subsets = [majority(*zip(*s, strict=True)) for s in itertools.combinations(samples, k)]
    assert fmean(orders) == pytest.approx(fmean(subsets), abs=1e-12)


def test_maj_at_1_and_pass_at_1_are_the_accuracy():
    rows = [row(0, s, k, vote=1 - s) for k, s in enumerate((1, 0, 0, 1))]
    rows += [row(1, s, k, vote=1 - s) for k, s in enumerate((0, 0, 0, 1))]
    result = score(rows)
    assert result["accuracy"] == result["pass_at"]["1"] == result["maj_at"]["1"] == 0.375
    assert list(result["pass_at"]) == list(result["maj_at"]) == ["1", "2", "4"]
    assert result["samples"] == 4
    assert result["pass_at"]["4"] == 1.0 and result["maj_at"]["4"] == pytest.approx((0.5 + 0) / 2)


def test_columns_count_problems_that_do_not_fit_as_wrong():
    rows = [
        row(0, 1, tokens=4),
        row(1, 0, tokens=9, finished=False, parsed=False),
        row(2, 0, tokens=0, parsed=False, response=None),
    ]
    assert columns(rows) == {
        "accuracy": 1 / 3,
        "interval": [0.0, 1.0],
        "n": 3,
        "dropped": 1,
        "len_correct": 4,
        "len_incorrect": 9,
        "truncated_frac": 0.5,
        "unparsed_frac": 0.5,
    }


def test_rewards_are_means_over_responses_and_failures_count_as_0():
    rows = [
        row(0, 1, reward=1.5, components={"math": 1.0, "f": 0.5}),
        row(1, 0, reward=0.0, components={"math": 0.0, "f": None}),
        row(2, 0, response=None),
    ]
    found = columns(rows)
    names = ("accuracy", "reward", "reward/math", "reward/f", "reward_errors")
    assert [found[name] for name in names] == [1 / 3, 0.75, 0.5, 0.25, 1]
    assert not any("reward" in name for name in columns([row(0, 1)]))


def test_one_sample_has_no_pass_at_k():
    assert score([row(0, 1), row(1, 0)])["pass_at"] == {}


def test_the_bootstrap_has_the_moments_of_resampling_with_replacement():
    """Mean: that of the values. Variance: population variance / n. To 5 standard errors of 10 000
    draws."""
    values = [0.0, 0.0, 1.0, 0.25, 0.5, 1.0, 1.0]
    draws, variance = bootstrap(values), pvariance(values) / len(values)
    assert abs(draws.mean() - fmean(values)) < 5 * math.sqrt(variance / scores.DRAWS)
    assert draws.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / scores.DRAWS))
    assert set(np.round(bootstrap([0.0, 1.0, 1.0]) * 3, 9)) == {0, 1, 2, 3}


def test_the_bootstrap_is_seeded():
    assert (bootstrap([0.0, 1.0, 1.0]) == bootstrap([0.0, 1.0, 1.0])).all()
    assert (bootstrap([0.0, 1.0, 1.0]) != bootstrap([0.0, 1.0, 1.0], seed=1)).any()


def test_the_interval_holds_the_truth_95_times_in_100():
    """300 benchmarks of 200 problems with difficulties drawn at random, 4 samples each. Standard
    error of the share: 1.3 %."""
    rng, truth, held = np.random.default_rng(7), 0.4, 0
    for _ in range(300):
        difficulty = rng.beta(2, 3, size=200)  # mean 0.4
        low, high = interval(bootstrap(rng.binomial(4, difficulty) / 4))
        held += low <= truth <= high
    assert 0.92 <= held / 300 <= 0.98


def test_problems_are_resampled_and_not_samples():
    """Four equal samples of each problem tell no more than one of them."""
    once = [row(p, p % 3 == 0) for p in range(60)]
    four = [row(p, p % 3 == 0, k) for p in range(60) for k in range(4)]
    assert score(four)["interval"] == score(once)["interval"]
    low, high = score(once)["interval"]
    assert (high - low) / 3.92 == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 60), rel=0.1)


# ---- problems and samples apart


def textbook(scores: np.ndarray) -> tuple[float, float]:
    """(V, S) of scores [n, k]: the variance of the mean of k samples between problems, and the part
    of it that the samples bring, s^2 / k with the unbiased s^2 within a problem."""
    within = scores.var(axis=1, ddof=1).mean() if scores.shape[1] > 1 else 0.0
    return scores.mean(axis=1).var(), within / scores.shape[1]


def graded(n: int, k: int, seed: int = 11) -> np.ndarray:
    """Scores [n, k] of problems from impossible to easy."""
    rng = np.random.default_rng(seed)
    return rng.binomial(1, rng.beta(0.5, 1, size=(n, 1)), size=(n, k)).astype(float)


SPREAD = 5 * math.sqrt(2 / scores.DRAWS)  # five standard errors of a variance over DRAWS


def test_one_sample_each_is_the_plain_bootstrap():
    """The textbook's binomial case: a standard error of sqrt(p (1 - p) / n)."""
    single = [[1.0]] * 13 + [[0.0]] * 17
    draws, p = two_stage(single), 13 / 30
    assert draws == pytest.approx(bootstrap([1.0] * 13 + [0.0] * 17), abs=1e-12)
    assert draws.var() == pytest.approx(p * (1 - p) / 30, rel=SPREAD)


@pytest.mark.parametrize(("n", "k"), [(30, 2), (30, 32), (200, 4)])
def test_the_noise_of_samples_counts_once(n, k):
    """The variance of a two-stage sample is V / n. Samples drawn on top of problems, without the
    rescaling, would make it (V + S (k - 1) / k) / n. Samples alone have S / n."""
    scores_ = graded(n, k)
    between, within = textbook(scores_)
    assert two_stage(scores_.tolist()).var() == pytest.approx(between / n, rel=SPREAD)
    assert samples_only(scores_.tolist()).var() == pytest.approx(within / n, rel=SPREAD)
    assert two_stage(scores_.tolist()).mean() == pytest.approx(scores_.mean(), abs=2e-3)
    assert samples_only(scores_.tolist()).mean() == pytest.approx(scores_.mean(), abs=2e-3)
    assert within / between * (k - 1) / k > 2 * SPREAD or k == 32, "else the test sees nothing"


@np.errstate(all="raise")
def test_alike_problems_leave_the_noise_of_their_samples():
    """Every problem has 2 of 4 right, so that resampled problems show no spread."""
    alike = [[1.0, 1.0, 0.0, 0.0]] * 50
    expected = 0.25 / 3 / 50
    assert bootstrap([0.5] * 50).var() == 0
    assert two_stage(alike).var() == pytest.approx(expected, rel=SPREAD)
    assert samples_only(alike).var() == pytest.approx(expected, rel=SPREAD)


def test_resampled_means_are_accuracies():
    """Rescaled deviations of two samples may lead beyond 0 and 1."""
    nearly = [[1.0, 1.0]] * 5 + [[1.0, 0.0]] * 2
    for draws in (two_stage(nearly), samples_only(nearly)):
        assert draws.min() >= 0 and draws.max() == 1.0


def test_a_problem_without_a_response_has_no_noise():
    """Training records one row of score 0 for it, however many samples the other problems have."""
    some = [[1.0, 0.0, 1.0, 1.0]] * 20
    assert samples_only([*some, [0.0]]).var() == pytest.approx(20 * 0.1875 / 3 / 21**2, rel=SPREAD)
    variance = (20 * 0.1875 / 3 + 20 * 0.25) / 40**2
    assert samples_only([*some, *[[1.0, 0.0]] * 20]).var() == pytest.approx(variance, rel=SPREAD)


def test_two_samples_show_both_intervals_and_one_sample_one():
    once = [row(p, p % 3 == 0) for p in range(60)]
    scores_ = [[float(p % 3 > k) for k in range(2)] for p in range(60)]
    twice = [row(p, scores_[p][k], k) for p in range(60) for k in range(2)]
    assert "interval_samples" not in score(once)
    assert "average_interval_samples" not in average({"a": once})
    result, means = score(twice), average({"a": twice, "b": twice})
    assert result["interval"] == interval(two_stage(scores_)) == columns(twice)["interval"]
    assert result["interval_samples"] == interval(samples_only(scores_))
    low, high = result["interval_samples"]
    mean_low, mean_high = means["average_interval_samples"]
    assert (mean_high - mean_low) / (high - low) == pytest.approx(math.sqrt(0.5), rel=0.1)


def test_32_samples_have_pass_at_32():
    rows = [row(p, (p + k) % 40 == 0, k) for p in range(30) for k in range(32)]
    result = score(rows)
    assert list(result["pass_at"]) == ["1", "2", "4", "8", "16", "32"]
    solved = sum(any((p + k) % 40 == 0 for k in range(32)) for p in range(30))
    assert result["pass_at"]["32"] == pytest.approx(solved / 30)
    assert result["pass_at"]["1"] == pytest.approx(result["accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(30, 1), (30, 2), (30, 32), (200, 4), (500, 1)])
def test_coverage(n, k, capsys, monkeypatch):
    """How often the intervals hold the truth, in 1000 benchmarks of n problems with k samples each
    (standard error 0.7 points). The difficulty of a problem is Beta(0.5, 1). The truth of
    `two_stage` is the mean of all such problems, 1/3, and that of `samples_only` is the mean
    difficulty of the n. `pytest tests/test_scores.py -k coverage -s` prints the shares."""
    monkeypatch.setattr(scores, "DRAWS", 2000)  # for time; it moves a bound by 1 % of the width
    rng, held = np.random.default_rng(2026), np.zeros(2)
    for _ in range(1000):
        difficulty = rng.beta(0.5, 1, size=(n, 1))
        drawn = rng.binomial(1, difficulty, size=(n, k)).astype(float).tolist()
        low, high = interval(two_stage(drawn))
        held[0] += low <= 1 / 3 <= high
        if k > 1:
            low, high = interval(samples_only(drawn))
            held[1] += low <= difficulty.mean() <= high
    with capsys.disabled():
        samples = f"{held[1] / 10:.1f} %" if k > 1 else "-"
        print(f"\nn {n}, k {k}: problems {held[0] / 10:.1f} %, samples {samples}")
    assert 910 <= held[0] <= 975 and (k == 1 or 910 <= held[1] <= 975)


def test_the_average_is_plain_and_its_interval_that_of_independent_benchmarks():
    small = [row(p, p % 2) for p in range(30)]
    large = [row(p, p % 4 == 0) for p in range(400)]
    result = average({"small": small, "large": large})
    assert result["average"] == pytest.approx((0.5 + 0.25) / 2)
    expected = math.sqrt(0.25 / 30 + 0.1875 / 400) / 2
    low, high = result["average_interval"]
    assert (high - low) / 3.92 == pytest.approx(expected, rel=0.06)
    # Like benchmarks are drawn apart. Otherwise their average would be as unsure as one of them.
    same = average({"a": large, "b": large})["average_interval"]
    low, high = score(large)["interval"]
    assert (same[1] - same[0]) / (high - low) == pytest.approx(math.sqrt(0.5), rel=0.08)


@pytest.mark.parametrize("n", range(9))
def test_mcnemar_counts_all_ways_to_split_the_discordant_problems(n):
    for a in range(n + 1):
        splits = [sum(ways) for ways in itertools.product((0, 1), repeat=n)]
        extreme = fmean(abs(s - n / 2) >= abs(a - n / 2) for s in splits)
        assert mcnemar(a, n - a) == pytest.approx(extreme, abs=1e-12)


def test_mcnemar_of_many():
    tail = sum(math.comb(40, i) for i in range(11)) / 2**40
    assert mcnemar(10, 30) == mcnemar(30, 10) == pytest.approx(2 * tail)


@pytest.mark.parametrize(
    "differences",
    [[1, 1, 1, -1, 0, 0], [0.5, -0.25, 1, 0.75, 0.25, 0.5, -0.1], [0.2] * 8, [0.0, 0.0]],
    ids=str,
)
def test_the_permutation_test_counts_all_signs(differences):
    signs = list(itertools.product((-1, 1), repeat=len(differences)))
    sums = np.asarray(signs) @ differences
    exact = fmean(abs(s) >= abs(sum(differences)) - 1e-9 for s in sums)
    assert sign_flip(differences) == pytest.approx(exact, abs=5 * math.sqrt(0.25 / scores.DRAWS))


def test_the_permutation_test_of_single_answers_is_mcnemars():
    assert sign_flip([1] * 14 + [-1] * 5 + [0] * 30) == pytest.approx(mcnemar(14, 5), abs=0.01)


def test_two_proportions_against_the_formula():
    p, n, q, m = 13 / 30, 30, 8 / 30, 30
    r = 21 / 60
    z = (p - q) / math.sqrt(r * (1 - r) * (1 / n + 1 / m))
    assert two_proportions([(p, n, q, m)]) == pytest.approx(math.erfc(z / math.sqrt(2)))
    assert two_proportions([(p, n, q, m)]) == two_proportions([(q, m, p, n)])
    assert two_proportions([(0.5, 1000, 0.4, 1000)]) < 1e-5
    assert two_proportions([(0.5, 30, 0.4, 30)]) > 0.05


def test_two_proportions_of_several_benchmarks_add_their_variances():
    """Two equal benchmarks with the same difference: z grows by sqrt 2."""
    one = (0.5, 100, 0.4, 100)
    z = 0.1 / math.sqrt(0.45 * 0.55 * 2 / 100)
    assert two_proportions([one, one]) == pytest.approx(math.erfc(z * math.sqrt(2) / math.sqrt(2)))


def test_two_proportions_without_variance():
    assert two_proportions([(0.0, 30, 0.0, 30)]) == 1 and two_proportions([(1.0, 30, 1.0, 83)]) == 1
    assert two_proportions([(1.0, 30, 0.0, 30)]) < 1e-9


def test_two_proportions_errs_as_rarely_as_it_says():
    """Both runs draw from one truth: at most 5 % of 2000 differences are called beyond noise
    (standard error 0.5 %)."""
    rng = np.random.default_rng(3)
    pairs = rng.binomial(83, 0.6, size=(2000, 2)) / 83
    called = [two_proportions([(a, 83, b, 83)]) < 0.05 for a, b in pairs]
    assert 0.03 < fmean(called) < 0.065


# ---- beside scipy


@pytest.mark.parametrize(("a", "b"), [(0, 5), (3, 11), (14, 5), (7, 7), (10, 90)])
def test_mcnemar_is_scipys_binomial_test(a, b):
    assert mcnemar(a, b) == pytest.approx(stats.binomtest(a, a + b).pvalue, rel=1e-9)


def test_the_permutation_test_is_scipys():
    differences = [0.5, -0.25, 1, 0.75, 0.25, 0.5, -0.1, -0.5, 0.3, 0.3, -0.2, 0.1]
    exact = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    error = math.sqrt(exact.pvalue * (1 - exact.pvalue) / scores.DRAWS)
    assert sign_flip(differences) == pytest.approx(exact.pvalue, abs=5 * error)


def test_the_bootstrap_interval_is_scipys():
    """Both are Monte Carlo. Their ends agree to a fifth of a standard error of the mean."""
    values = np.random.default_rng(5).binomial(4, 0.3, size=200) / 4
    theirs = stats.bootstrap((values,), np.mean, method="percentile", random_state=6)
    tolerance = 0.2 * values.std() / math.sqrt(len(values))
    interval_of_scipy = list(theirs.confidence_interval)
    assert interval(bootstrap(values)) == pytest.approx(interval_of_scipy, abs=tolerance)


@pytest.mark.parametrize(("a", "n", "b", "m"), [(13, 30, 8, 30), (52, 83, 9, 40), (1, 500, 4, 500)])
def test_two_proportions_is_scipys_chi_square_test(a, n, b, m):
    theirs = stats.chi2_contingency([[a, n - a], [b, m - b]], correction=False)
    assert two_proportions([(a / n, n, b / m, m)]) == pytest.approx(theirs.pvalue, rel=1e-9)
