"""Scores are means over all problems, dropped ones included. Equal answers to a problem are one
vote, whatever the truth is."""

from dataclasses import replace

import pytest
import torch.distributed as dist

from drgrpo import distributed
from drgrpo.evaluation.evaluate import (
    Graders,
    Scored,
    answer,
    counters,
    evaluate,
    evaluate_sets,
    group_equal_answers,
    make_graders,
    summarize,
)
from drgrpo.grade import Grade, Grader
from drgrpo.rollout import Sampler
from drgrpo.types import Completion, Problem, Request, Rollout, Sampling

SAMPLING = Sampling(max_new_tokens=4, stop_token_ids=())


def scored(
    problem_id: int, score: float, length: int, finished: bool = True, parsed: bool = True
) -> Scored:
    completion = Completion([1] * length, [0.0] * length, finished)
    return Scored(Rollout(Problem(problem_id, "q", "1"), completion, ""), Grade(score, parsed))


def test_columns():
    cut_off = scored(2, 0, 20, finished=False, parsed=False)
    assert summarize([scored(0, 1, 4), scored(1, 0, 10), cut_off, scored(3, 1, 8)]) == {
        "accuracy": 0.5,
        "interval": [0.0, 1.0],
        "n": 4,
        "dropped": 0,
        "len_correct": 6,
        "len_incorrect": 15,
        "truncated_frac": 0.25,
        "unparsed_frac": 0.25,
    }


def test_problems_too_long_for_the_model_count_as_wrong():
    row = summarize([scored(0, 1, 4), scored(1, 1, 4)], dropped=2)
    assert (row["accuracy"], row["n"], row["dropped"]) == (0.5, 4, 2)
    several = [scored(i, 1, 4) for i in (0, 1) for _ in range(3)]
    assert summarize(several, dropped=2)["accuracy"] == 0.5


def test_lengths_without_answers_are_none():
    assert summarize([scored(0, 0, 5)])["len_correct"] is None


class Oracle:
    """An engine that solves every second problem and finishes the last request first."""

    name = "oracle"

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def generate(self, requests: list[Request], sampling: Sampling, on_finish, enough):
        self.calls += 1
        for i, request in reversed(list(enumerate(requests))):
            first = request.prompt_ids[0]
            ids = self.tokenizer(f"#{first - 15 if first % 2 else 0}").input_ids
            on_finish(i, Completion(ids, [0.0] * len(ids), True))


@pytest.fixture
def sampler(group_of_one, tokenizer):
    return Sampler(Oracle(tokenizer), tokenizer, seed=0)


@pytest.fixture
def problems(tokenizer) -> list[Problem]:
    encoded = {digit: tokenizer(str(digit)).input_ids for digit in range(1, 9)}
    return [Problem(d, str(d), str(ids[0] - 15), ids) for d, ids in encoded.items()]


@pytest.mark.parametrize("samples", [1, 2])
def test_every_problem_is_answered_graded_and_returned_in_order(sampler, problems, samples):
    with Grader("hash") as grader:
        result = evaluate(sampler, grader, problems, samples, SAMPLING)
    expected = [p for p in problems for _ in range(samples)]
    assert [s.rollout.problem for s in result] == expected
    for s in result:
        assert s.grade.score == s.rollout.problem.prompt_ids[0] % 2
    assert summarize(result)["accuracy"] == 0.5 and summarize(result)["n"] == 8


def test_a_process_without_problems_has_no_results(sampler):
    with Grader("hash") as grader:
        assert evaluate(sampler, grader, [], 1, SAMPLING) == []


def test_processes_that_share_an_engine_answer_every_problem_once(sampler, problems, monkeypatch):
    monkeypatch.setattr(distributed, "gather_lists", lambda items: [items, items])
    with Grader("hash") as grader:
        shared = evaluate(replace(sampler, tp=1), grader, problems, 1, SAMPLING)
        assert len(shared) == 16, "two engines"
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        assert len(evaluate(replace(sampler, tp=2), grader, problems, 1, SAMPLING)) == 8


def test_training_gets_one_row_per_set_from_one_call_of_the_sampler(sampler, problems):
    right = [p for p in problems if p.prompt_ids[0] % 2]
    with Grader("hash") as grader:
        rows = evaluate_sets(
            sampler,
            grader,
            {"all": problems, "right": right},
            {"all": 2, "right": 0},
            2,
            SAMPLING,
            7,
        )
    assert sampler.engine.calls == 1
    columns = "accuracy interval n dropped len_correct len_incorrect truncated_frac unparsed_frac"
    settings = "samples temperature max_new_tokens"
    assert list(rows[0]) == ["step", "benchmark", *columns.split(), *settings.split()]
    shown = [(r["step"], r["benchmark"], r["accuracy"], r["n"], r["dropped"]) for r in rows]
    assert shown == [(7, "all", 0.4, 10, 2), (7, "right", 1.0, 4, 0)]
    assert [(r["samples"], r["temperature"], r["max_new_tokens"]) for r in rows] == [
        (2, 1.0, 4)
    ] * 2


def test_the_step_is_part_of_the_seeds(sampler, problems):
    seeds = []
    sampler.engine.generate = lambda requests, *_: seeds.append([r.seed for r in requests])
    for step in (1, 1, 2):
        with Grader("hash") as grader, pytest.raises(TypeError):
            evaluate_sets(sampler, grader, {"a": problems}, {"a": 0}, 1, SAMPLING, step)
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_prompt_that_does_not_fit_has_rows_without_a_response(sampler, tokenizer):
    fitting, unfit = Problem(3, "2", "2", tokenizer("2").input_ids), Problem(1, "long", "5")
    with make_graders({"hash"}, "correct") as graders:
        rows = answer(sampler, graders["hash"], [unfit, fitting], 2, SAMPLING)
    shown = [(r["id"], r["sample"], r["response"]) for r in rows]
    assert shown == [(1, 0, None), (1, 1, None), (3, 0, "#2"), (3, 1, "#2")]
    assert rows[0]["score"] == 0 and rows[2]["vote"] == rows[3]["vote"] == 0


@pytest.mark.parametrize(("samples", "votes"), [(1, False), (2, True)])
def test_several_samples_vote_through_the_grader_of_peers(sampler, monkeypatch, samples, votes):
    graders, given = Graders("truth", "peers"), []

    def evaluate(sampler, grader, problems, samples, sampling, peers):
        given.append((grader, peers))
        return []

    monkeypatch.setattr("drgrpo.evaluation.evaluate.evaluate", evaluate)
    answer(sampler, graders, [], samples, SAMPLING)
    assert given == [("truth", "peers" if votes else None)]


def test_answers_equal_as_mathematics_are_one_vote():
    boxed = [r"\boxed{\frac12}", r"so \boxed{0.5}", "no answer", r"\boxed{3}"]
    boxed += [r"\boxed{1/2}", r"\boxed{}", r"\boxed{3.0}"]
    with Grader("boxed") as grader:
        votes = group_equal_answers(grader, [boxed, [r"\boxed{3}"], []])
    assert votes == [[0, 0, None, 3, 0, None, 3], [0], []]


def test_answers_too_long_to_compare_stand_for_themselves():
    long = r"\boxed{" + "1" * 2000 + "}"
    with Grader("boxed") as grader:
        votes = group_equal_answers(grader, [[long, long, r"\boxed{2}", r"\boxed{2}"]])
    assert votes == [[0, 1, 2, 2]]


def test_an_answer_that_hangs_the_comparison_is_cut_off_and_counted():
    hanging = [r"\boxed{\int_0^{10} \sin(x^{9999})^{9999} dx}", r"\boxed{2x}"]
    with make_graders({"boxed"}, "correct") as graders:
        texts = [hanging, [r"\boxed{2x}", r"\boxed{x + x}"]]
        assert group_equal_answers(graders["boxed"].peers, texts) == [[0, 1], [0, 0]]
        count = {"grader_timeouts": 0, "grader_errors": 0, "votes_cut_off": 1}
        assert counters(graders) == count
