"""The typed-in numbers are the paper's. Its own averages come out, greedy accuracies are whole
numbers of problems, and the misprints of the news article are not there."""

from statistics import fmean

import pytest

from drgrpo.data import BENCHMARKS
from drgrpo.evaluation.published import PUBLISHED, REEVALUATED, N, same_model

BY_NAME = {row.name: row for row in PUBLISHED}

PRINTED_AVERAGE = {  # as the paper prints them
    "Qwen2.5-Math-1.5B, 4-shot": 19.7,
    "Qwen2.5-Math-1.5B, r1": 7.9,
    "Qwen2.5-Math-1.5B, qwen_math": 24.2,
    "Qwen2.5-Math-1.5B, none": 33.1,
    "Qwen2.5-Math-7B, 4-shot": 23.8,
    "Qwen2.5-Math-7B, r1": 0.0,
    "Qwen2.5-Math-7B, qwen_math": 26.5,
    "Qwen2.5-Math-7B, none": 38.2,
    "Oat-Zero-1.5B": 42.1,
    "R1-Distill-Qwen-1.5B": 22.0,
    "R1-Distill-Qwen-1.5B, 8k": 41.5,
    "Qwen2.5-Math-1.5B-Instruct": 39.8,
    "Llama-3.2-3B": 3.3,
    "Llama-3.2-3B + Dr. GRPO": 6.8,
    "Llama-3.2-3B-FineMath": 6.0,
    "Llama-3.2-3B-FineMath + Dr. GRPO": 14.8,
    "Llama-3.2-3B-NuminaQA": 0.14,
    "Oat-Zero-3B": 20.7,
    "Llama-3.2-3B-Instruct": 17.1,
    "SimpleRL-Zero-7B": 46.6,
    "PRIME-Zero-7B": 48.0,
    "OpenReasoner-Zero-7B": 43.0,
    "OpenReasoner-Zero-7B, 8k": 45.9,
    "Oat-Zero-7B": 51.4,
    "R1-Distill-Qwen-7B": 28.5,
    "R1-Distill-Qwen-7B, 8k": 54.7,
    "Qwen2.5-Math-7B-Instruct": 45.1,
}


def test_every_row_is_there_once():
    assert sorted(PRINTED_AVERAGE) == sorted(row.name for row in PUBLISHED)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_the_printed_average_comes_out(row):
    printed = PRINTED_AVERAGE[row.name]
    assert fmean(row.scores) == pytest.approx(printed, abs=0.061), "both are rounded"


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_a_greedy_accuracy_is_a_whole_number_of_problems(row):
    """The R1-Distill rows are averages or come from elsewhere. One number is 271 of 674."""
    for benchmark in () if "Distill" in row.name else BENCHMARKS:
        if (row.name, benchmark) == ("Qwen2.5-Math-1.5B-Instruct", "olympiad_bench"):
            continue
        n, printed = row.n(benchmark), row.by_benchmark[benchmark]
        assert any(abs(100 * k / n - printed) <= 0.0501 for k in range(n + 1)), benchmark


def test_the_slip_of_the_paper_is_mended():
    assert BY_NAME["Qwen2.5-Math-7B, none"].by_benchmark["aime24"] == 20.0, "printed as 0.2"
    assert BY_NAME["Qwen2.5-Math-7B, 4-shot"].n("amc") == 40


@pytest.mark.parametrize(
    ("name", "benchmark", "paper", "article"),
    [
        ("SimpleRL-Zero-7B", "aime24", 26.7, 36.0),
        ("PRIME-Zero-7B", "aime24", 16.7, 27.6),
        ("OpenReasoner-Zero-7B", "aime24", 13.3, 16.7),
        ("Oat-Zero-7B", "math500", 80.0, 40.9),
        ("Oat-Zero-7B", "minerva", 30.1, 45.8),
        ("Oat-Zero-7B", "olympiad_bench", 41.0, 62.7),
        ("Qwen2.5-Math-1.5B, none", "minerva", 15.1, 61.6),
        ("Qwen2.5-Math-1.5B, none", "math500", 61.8, 45.8),
    ],
)
def test_the_article_s_misprints_are_not_there(name, benchmark, paper, article):
    assert BY_NAME[name].by_benchmark[benchmark] == paper != article


def test_the_benchmarks_are_counted():
    assert sum(N.values()) == 1560 and list(N) == list(BENCHMARKS)


def test_a_model_is_matched_by_name_and_template():
    row = BY_NAME["Oat-Zero-7B"]
    assert same_model(row, "sail/Qwen2.5-Math-7B-Oat-Zero", "qwen_math")
    assert same_model(row, "/models/Qwen2.5-Math-7B-Oat-Zero/", "qwen_math")
    assert not same_model(row, "sail/Qwen2.5-Math-7B-Oat-Zero", "r1")
    assert not same_model(row, "Qwen/Qwen2.5-Math-7B", "qwen_math")
    assert not same_model(BY_NAME["PRIME-Zero-7B"], "", "")
    names = [r.name for r in PUBLISHED if same_model(r, "Qwen/Qwen2.5-Math-7B", "none")]
    assert names == ["Qwen2.5-Math-7B, none"]


# ---- re-evaluations

OTHERS = {row.name: row for row in REEVALUATED}


@pytest.mark.parametrize(
    ("name", "average"),
    [
        ("Oat-Zero-7B, Sober Look", 50.4),
        ("Oat-Zero-1.5B, Sober Look", 41.1),
        ("Oat-Zero-7B, GPG", 47.8),
    ],
)
def test_re_evaluations_have_their_averages(name, average):
    """Of the paper's five benchmarks. GPG prints its own average."""
    scores = OTHERS[name].by_benchmark
    assert fmean(scores[b] for b in BENCHMARKS) == pytest.approx(average, abs=0.061)


@pytest.mark.parametrize("row", REEVALUATED, ids=lambda row: row.name)
def test_re_evaluated_scores_are_whole_numbers_of_answers(row):
    """Sober Look has 10 answers to each problem of AIME and AMC. Its 8.8 on AIME25 is no n/300."""
    answers = {"Sober Look": 10, "mean@32": 32}.get(row.name.partition(", ")[2], 1)
    for benchmark, printed in row.by_benchmark.items():
        if benchmark in ("aime24", "amc") or answers == 1:
            n = answers * row.n(benchmark)
            assert any(abs(100 * k / n - printed) <= 0.0501 for k in range(n + 1)), benchmark


def test_re_evaluations_tell_source_protocol_and_spread():
    assert len(OTHERS) == len(REEVALUATED)
    for row in REEVALUATED:
        assert row.source and row.protocol and row.hub
        assert row.sd.keys() in ({}.keys(), row.by_benchmark.keys())
    sober = OTHERS["Oat-Zero-7B, Sober Look"]
    assert (sober.by_benchmark["aime25"], sober.sd["aime25"]) == (8.8, 2.5)
    assert (sober.by_benchmark["aime24"], sober.sd["aime24"]) == (28.0, 3.1)


def test_a_re_evaluation_is_about_the_model_under_any_template():
    names = [r.name for r in REEVALUATED if same_model(r, "sail/Qwen2.5-Math-7B-Oat-Zero", "r1")]
    assert len(names) == 4 and all(name.startswith("Oat-Zero-7B") for name in names)
