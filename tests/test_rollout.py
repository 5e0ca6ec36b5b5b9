"""Problems become groups of rollouts; a sample's seed is its own."""

import math
from itertools import pairwise

import pytest
import torch.distributed as dist

from drgrpo import distributed
from drgrpo.rollout import Sampler, longest_prompt, sample_seed, tokenize, tokenize_sets
from drgrpo.templates import get_template
from drgrpo.types import Completion, ParityError, Problem, Rollout, Sampling, UserError


class Echo:
    """An engine that answers with its prompt, backwards, and an end token; the last request
    finishes first."""

    def generate(self, requests, sampling, on_finish, enough):
        completions = [
            Completion([*r.prompt_ids[::-1], 256], [-0.5] * (len(r.prompt_ids) + 1), True)
            for r in requests
        ]
        for i in reversed(range(len(requests))):
            on_finish(i, completions[i])
        return completions


class Graders:
    """Notes the order in which texts come."""

    def __init__(self):
        self.texts = []

    def grade(self, rollout):
        self.texts.append(rollout.text)
        return f"{rollout.text}={rollout.problem.answer}"


def test_groups_are_contiguous_and_each_response_meets_its_grade(tokenizer, group_of_one):
    problems = [Problem(0, "ab", "1"), Problem(1, "cde", "2")]
    problems, dropped = tokenize(problems, get_template("none"), tokenizer, 10)
    sampler, grader = Sampler(Echo(), tokenizer, seed=0), Graders()
    sampling = Sampling(max_new_tokens=9, stop_token_ids=(256,))
    rollouts, grades = sampler.rollout(problems, 3, sampling, 1, grader)
    assert grader.texts == ["edc"] * 3 + ["ba"] * 3, "graded as they finish, the last one first"
    assert grades == ["ba=1"] * 3 + ["edc=2"] * 3
    assert [r.problem.id for r in rollouts] == [0, 0, 0, 1, 1, 1]
    assert [r.text for r in rollouts] == ["ba"] * 3 + ["edc"] * 3, "without special tokens"
    assert [r.length for r in rollouts] == [3] * 3 + [4] * 3
    assert dropped == 0


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_log_prob_that_is_not_finite_ends_the_run(tokenizer, group_of_one, bad):
    """A sampler that misses a weight may hold uninitialized memory in its place. The loss of its
    samples would be NaN, and the parity gate skips such a loss."""

    class Broken(Echo):
        def generate(self, requests, sampling, on_finish, enough):
            on_finish(0, Completion([1, 2], [-0.5, bad], True))

    sampler = Sampler(Broken(), tokenizer, seed=0)
    sampling = Sampling(max_new_tokens=9, stop_token_ids=(256,))
    with pytest.raises(ParityError, match="not finite"):
        sampler.rollout([Problem(0, "a", "1", [1])], 1, sampling, step=1)


def test_rewards_are_gathered_in_groups(tokenizer, group_of_one):
    rollouts = [Rollout(Problem(i, "", ""), Completion([1], [0.0], True), "") for i in range(6)]
    sampler = Sampler(Echo(), tokenizer, seed=0)
    gathered, reward_PG = sampler.gather(rollouts, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], group_size=3)
    assert gathered == rollouts and reward_PG.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_processes_that_share_an_engine_sample_the_same_and_count_it_once(tokenizer, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    problems = [Problem(0, "", "1", [65]), Problem(1, "", "2", [66])]
    sampler = Sampler(Echo(), tokenizer, seed=0, tp=2)
    sampling = Sampling(max_new_tokens=9, stop_token_ids=(256,))
    rollouts, _ = sampler.rollout(problems, 2, sampling, 1)
    assert [r.problem.id for r in rollouts] == [0, 0, 1, 1]
    monkeypatch.setattr(dist, "get_rank", lambda: 0)  # the one that sends
    monkeypatch.setattr(distributed, "gather_lists", lambda items: [items, []])
    gathered, reward_PG = sampler.gather(rollouts, [0.0, 1.0, 2.0, 3.0], group_size=2)
    assert gathered == rollouts and reward_PG.tolist() == [[0, 1], [2, 3]]


def test_sets_are_tokenized_and_overlap_is_logged(tokenizer):
    problems, logged = [Problem(0, "a b", "1"), Problem(1, "a" * 9, "1")], []
    sets = {"held_out": [Problem(0, "A b", "1"), Problem(1, "c", "1"), Problem(2, "b" * 9, "1")]}
    template = get_template("none")
    kept, sets, dropped = tokenize_sets(problems, sets, template, tokenizer, 5, logged.append)
    assert [p.id for p in kept] == [0] and [p.id for p in sets["held_out"]] == [0, 1]
    assert dropped == {"held_out": 1}
    assert "1 training problems, 1 dropped for a prompt of more than 5 tokens" in logged[0]
    assert "2 problems, 1 too long" in logged[1] and "1 of them among the training" in logged[1]


def test_overlong_prompts_are_dropped_and_counted(tokenizer):
    problems = [Problem(0, "a" * 5, "1"), Problem(1, "a" * 6, "1"), Problem(2, "a", "1")]
    kept, dropped = tokenize(problems, get_template("none"), tokenizer, longest=5)
    assert [p.id for p in kept] == [0, 2] and dropped == 1


@pytest.mark.parametrize(("budget", "most", "longest"), [(8, 1024, 1016), (1000, 1024, 24)])
def test_a_prompt_gets_what_the_response_leaves(random_model, budget, most, longest):
    assert longest_prompt(random_model, most, budget) == longest
    assert longest_prompt(random_model, 10, budget) == 10


@pytest.mark.parametrize("budget", [1024, 9000])
def test_a_budget_beyond_the_positions_names_both_numbers(random_model, budget):
    message = rf"--max-new-tokens {budget} .* 1024 positions .* at most 1023 are allowed"
    with pytest.raises(UserError, match=message):
        longest_prompt(random_model, 1024, budget)


def test_no_prompt_that_fits_is_an_error(tokenizer):
    with pytest.raises(UserError, match="the shortest of 1 has 6 tokens and 5 are allowed"):
        tokenize([Problem(0, "a" * 6, "1")], get_template("none"), tokenizer, longest=5)


def test_sample_seeds_are_distinct_stable_and_fit_a_signed_64_bit_integer():
    keys = [
        (seed, step, problem, k)
        for seed in range(3)
        for step in range(5)
        for problem in range(20)
        for k in range(8)
    ]
    seeds = [sample_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= s < 2**63 for s in seeds)
    assert seeds == [sample_seed(*key) for key in keys]
    gaps = [b - a for a, b in pairwise(sorted(seeds))]
    assert min(gaps) > 8, "a sampler that derives seeds as seed + i must not reach the next one"
