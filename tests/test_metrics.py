"""Columns of metrics.jsonl against counts by hand."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from drgrpo.config import RECIPES
from drgrpo.pack import Sequence, pack
from drgrpo.run.checkpoint import Progress
from drgrpo.run.log import step_line
from drgrpo.run.metrics import Tally, Update, step_row
from drgrpo.types import Completion, Grade, Problem, Rollout

REWARD_PG = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
ADVANTAGE_PG = torch.tensor([[0.5, -0.5], [0.0, 0.0]])
UPDATE = Update(
    tokens=3,
    fresh=3,
    gap_sum=0.3,
    gap_max=0.2,
    clipped=1,
    masked=1,
    ratio_max=1.3,
    kl_sum=0.6,
    loss=0.5,
    grad_norm=2.0,
    applied=True,
    lr=1e-3,
)


def rollouts(prompts=2):
    made = []
    for i, n in enumerate((2, 4, 6, 8) * (prompts // 2)):
        problem = Problem(i // 2, f"q{i // 2}", "1", [1])
        made.append(Rollout(problem, Completion([5] * n, [-0.5] * n, n != 8), f"text {i}"))
    return made


def row_of(
    updates, reward_PG=REWARD_PG, advantage_PG=ADVANTAGE_PG, sampled=None, pending=(), **changes
):
    seconds = {"rollout": 2.0, "train": 0.5, "total": 4.0}
    timer = SimpleNamespace(read=lambda: seconds, gb={"train": 1.23456})
    grader = SimpleNamespace(timeouts=1, errors=2)
    config = replace(RECIPES["tiny"](), **{"algo": "rloo", **changes})
    now = Progress(3, 0.25, pending)
    sampled = rollouts() if sampled is None else sampled
    return step_row(config, now, sampled, reward_PG, advantage_PG, updates, timer, grader)


def test_columns():
    second = UPDATE._replace(tokens=1, clipped=0, grad_norm=4.0, ratio_max=1.1, gap_sum=9, lr=2e-3)
    expected = {
        "step": 3,
        "reward_mean": 0.25,
        "response_len_mean": 5,
        "response_len_correct": 2,
        "response_len_incorrect": 6,
        "truncated_frac": 0.25,
        "zero_adv_frac": 0.5,
        "entropy": 0.5,
        "clip_frac": 0.05,
        "ratio_max": 1.3,
        "kl": 0.3,
        "loss": 0.5,
        "grad_norm": 3.0,
        "skipped_updates": 0,
        "lr": 2e-3,
        "parity_max": 0.2,
        "parity_mean": 0.1,
        "tokens": 20,
        "tokens_trained": 4,
        "tokens_per_s": 5.0,
        "rollout_tokens_per_s": 10.0,
        "train_tokens_per_s": 8.0,
        "grader_timeout": 1,
        "grader_error": 2,
        "hours_used": 0.25,
    }
    row = row_of([UPDATE, second])
    assert {k: row[k] for k in expected} == pytest.approx(expected)
    assert row["algo"] == "rloo" and row["gb"] == {"train": 1.235}


def graded(*components):
    """Rollouts of 2, 4, 6 and 8 tokens. The last one is right, but cut off."""
    marks = [Grade(1, True), Grade(0, True), Grade(0, False), Grade(1, True)]
    return [
        replace(rollout, grade=replace(grade, components=parts))
        for rollout, grade, parts in zip(rollouts(), marks, components, strict=True)
    ]


def test_each_component_of_the_reward_is_logged():
    parts = [{"math": 1.0, "f": -2.0}, {"math": 0.0, "f": None}, {"math": 0.0, "f": 3.0}]
    sampled = graded(*parts, {"math": 0.0, "f": 1.0})
    row = row_of([UPDATE], torch.tensor([[0.0, 5.0], [5.0, 5.0]]), sampled=sampled)
    assert (row["reward/math"], row["reward/f"], row["reward_error"]) == (0.25, 0.5, 1)
    assert (row["accuracy"], row["no_answer_frac"]) == (0.5, 0.25)
    lengths = row["response_len_correct"], row["response_len_incorrect"]
    assert lengths == (2, 6), "right by math, whatever the sum is"


def test_without_math_a_positive_reward_is_right():
    row = row_of([UPDATE], torch.tensor([[0.0, 5.0], [-1.0, 5.0]]), sampled=graded(*[{"f": 1}] * 4))
    assert (row["response_len_correct"], row["response_len_incorrect"]) == (6, 4)


def test_a_step_without_gradient_or_without_a_right_answer_has_no_made_up_numbers():
    nothing = UPDATE._replace(tokens=0, fresh=0, gap_sum=0, gap_max=0, ratio_max=0, grad_norm=0.0)
    row = row_of([nothing], torch.zeros(2, 2), torch.zeros(2, 2))
    for column in ("response_len_correct", "ratio_max", "kl", "parity_mean", "parity_max"):
        assert row[column] is None, column
    skipped = row_of([UPDATE._replace(applied=False)])
    assert skipped["skipped_updates"] == 1 and skipped["grad_norm"] is None


def test_with_carry_over_a_step_counts_what_it_has_drawn_and_what_waits():
    old, *others = rollouts()
    carried = replace(old, completion=Completion([5] * 3, [-0.5] * 3, False, open=True))
    pending = [carried, replace(old, stale=2), replace(carried, stale=1)]
    sampled = [replace(old, stale=1), *others]
    row = row_of([UPDATE], sampled=sampled, pending=pending, carry_over=0.25)
    counts = {"responses": 4, "carried": 2, "waiting": 1, "stale_frac": 1 / 20, "tokens": 24}
    assert {name: row[name] for name in counts} == counts
    assert (row["tokens_per_s"], row["rollout_tokens_per_s"]) == (6, 12)
    assert row["entropy"] == 0.5 and row["clip_frac"] == 0.05, "of the responses trained on"
    assert not (counts.keys() - {"tokens"}) & row_of([UPDATE]).keys()


def test_a_mask_s_row_says_what_share_of_the_trained_tokens_it_left_out():
    masked = {"algo": "icepop", "old_logprob": "recompute", "tis_cap": 5.0}
    assert row_of([UPDATE], **masked)["masked_frac"] == pytest.approx(1 / 3)
    assert "masked_frac" not in row_of([UPDATE])


def test_parity_is_that_of_the_fresh_tokens():
    assert row_of([UPDATE._replace(fresh=1)])["parity_mean"] == pytest.approx(0.3)
    row = row_of([UPDATE._replace(fresh=0, gap_sum=0)])
    assert row["parity_mean"] is None and row["parity_max"] is None


def test_a_step_without_a_complete_group_has_a_row():
    carried = Rollout(Problem(0, "", "1", [1]), Completion([5], [-0.5], False, open=True), "")
    empty, how = torch.zeros(0, 2), {"carry_over": 0.9, "dtype": "float16"}
    row = row_of([], empty, empty, sampled=[], pending=[carried] * 2, **how)
    json.dumps(row, allow_nan=False)
    assert (row["tokens"], row["tokens_trained"], row["responses"], row["carried"]) == (2, 0, 0, 2)
    for name in ("reward_mean", "accuracy", "entropy", "clip_frac", "loss", "lr", "zero_adv_frac"):
        assert row[name] is None, name
    other = {"mfu": None, "gb": {"train": 1.0}}
    assert "reward -  len - (right - wrong - cut -)" in step_line(row | other, 9)


def test_a_number_that_is_not_finite_is_none_so_that_the_row_can_be_written():
    """The ratio overflows where a log-prob moves by more than 88 nats."""
    row = row_of([UPDATE._replace(ratio_max=math.inf, gap_sum=math.nan, kl_sum=math.nan)])
    assert [row[name] for name in ("ratio_max", "parity_mean", "kl")] == [None] * 3
    json.dumps(row, allow_nan=False)


def test_a_tally_adds_up_micro_batches_and_takes_the_largest(group_of_one):
    tally = Tally()
    for logprobs, clipped in (([-1.0, -2.0], [1, 0]), ([-1.0], [-1]), ([], [])):
        n = len(logprobs)
        # a token of the first batch is masked
        batch = pack([Sequence([1], [2] * n, [-1.5] * n, 1.0)] if n else [])
        batch.advantage_N[1:] = 0
        stats = {
            "logprob": torch.tensor(logprobs),
            "clipped": torch.tensor(clipped, dtype=torch.int8),
            "log_ratio": torch.tensor(logprobs),
            "kl": torch.ones(n),
        }
        tally.add(batch, torch.tensor(0.25), stats)
    assert tally.reduce() == pytest.approx(
        {
            "tokens": 3,
            "fresh": 3,
            "gap_sum": 1.5,
            "clipped": 2,
            "masked": 1,
            "loss": 0.75,
            "kl_sum": 3,
            "gap_max": 0.5,
            "ratio_max": 0.36787944,
        }
    )


def test_a_tally_over_two_processes_averages_their_losses_and_takes_the_largest(monkeypatch):
    """Both hold the same micro-batch."""

    def all_reduce(tensor, op=dist.ReduceOp.SUM):
        tensor *= 2 if op == dist.ReduceOp.SUM else 1

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    tally, logprob_N = Tally(), torch.tensor([-1.0, -1.25])
    stats = {"logprob": logprob_N, "clipped": torch.tensor([1, 0]), "log_ratio": 0 * logprob_N}
    tally.add(pack([Sequence([1], [2, 2], [-1.5] * 2, 1.0)]), torch.tensor(0.5), stats)
    expected = {"tokens": 4, "fresh": 4, "gap_sum": 1.5, "clipped": 2, "loss": 0.5, "kl_sum": 0}
    assert tally.reduce() == expected | {"masked": 0, "gap_max": 0.5, "ratio_max": 1}
