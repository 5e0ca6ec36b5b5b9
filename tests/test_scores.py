"""Every statistic against a closed form, a full enumeration or a simulation: pass@k, maj@k, the
bootstrap, the tests of differences; and that problems, not samples, are what is resampled."""

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
    score,
    sign_flip,
    two_proportions,
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
