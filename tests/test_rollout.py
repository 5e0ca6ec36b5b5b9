"""Problems become groups of rollouts; a sample's seed is its own."""

import pytest

from drgrpo.rollout import rollout, sample_seed, tokenize
from drgrpo.templates import get_template
from drgrpo.types import Completion, Problem, Sampling, UserError


class Echo:
    """An engine that answers with its prompt, backwards, and an end token; the last request
    finishes first."""

    def generate(self, requests, sampling, on_finish):
        completions = [
            Completion([*r.prompt_ids[::-1], 256], [-0.5] * (len(r.prompt_ids) + 1), True)
            for r in requests
        ]
        for i in reversed(range(len(requests))):
            on_finish(i, completions[i])
        return completions


def test_groups_are_contiguous_and_texts_have_no_special_tokens(tokenizer):
    problems, dropped = tokenize(
        [Problem(0, "ab", "1"), Problem(1, "cde", "2")], get_template("none"), tokenizer, 10
    )
    finished = []
    rollouts = rollout(
        Echo(),
        tokenizer,
        problems,
        3,
        Sampling(max_new_tokens=9, stop_token_ids=(256,)),
        seed=0,
        step=1,
        on_finish=lambda i, r: finished.append((i, r.text)),
    )
    assert finished == [(5, "edc"), (4, "edc"), (3, "edc"), (2, "ba"), (1, "ba"), (0, "ba")]
    assert [r.problem.id for r in rollouts] == [0, 0, 0, 1, 1, 1]
    assert [r.text for r in rollouts] == ["ba"] * 3 + ["edc"] * 3
    assert [r.length for r in rollouts] == [3] * 3 + [4] * 3
    assert dropped == 0


def test_overlong_prompts_are_dropped_and_counted(tokenizer):
    problems = [Problem(0, "a" * 5, "1"), Problem(1, "a" * 6, "1"), Problem(2, "a", "1")]
    kept, dropped = tokenize(problems, get_template("none"), tokenizer, longest=5)
    assert [p.id for p in kept] == [0, 2] and dropped == 1


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
    assert (
        min(abs(a - b) for a, b in zip(sorted(seeds), sorted(seeds)[1:], strict=False)) > 8
    )  # vLLM's samples use seed + i
