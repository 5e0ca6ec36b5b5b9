"""Columns of metrics.jsonl against counts by hand."""

import pytest
import torch

from drgrpo.run.metrics import sample_rows, step_row
from drgrpo.types import Completion, Problem, Rollout

SECONDS = {"rollout": 0.5, "train": 0.5, "total": 1.0}
REWARD_PG = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
ADVANTAGE_PG = torch.tensor([[0.5, -0.5], [0.0, 0.0]])


def rollouts():
    lengths = (2, 4, 6, 8)
    return [
        Rollout(
            Problem(i // 2, f"q{i // 2}", "1", [1]),
            Completion([5] * n, [-0.5] * n, finished=n != 8),
            f"text {i}",
        )
        for i, n in enumerate(lengths)
    ]


def update(**changes):
    return {
        "tokens": 3,
        "gap_sum": 0.3,
        "gap_max": 0.2,
        "clipped": 1,
        "ratio_max": 1.3,
        "kl_sum": 0.6,
        "loss": 0.5,
        "grad_norm": 2.0,
        "applied": True,
        "lr": 1e-3,
    } | changes


def test_columns():
    updates = [
        update(),
        update(tokens=1, clipped=0, grad_norm=4.0, ratio_max=1.1, gap_sum=9, lr=2e-3),
    ]
    seconds = {"rollout": 2.0, "train": 0.5, "total": 4.0}
    row = step_row(3, "drgrpo", rollouts(), REWARD_PG, ADVANTAGE_PG, updates, seconds)
    expected = {
        "step": 3,
        "algo": "drgrpo",
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
    }
    assert {k: row[k] for k in expected} == pytest.approx(expected)


def test_a_step_without_gradient_or_without_a_right_answer_has_no_made_up_numbers():
    nothing = update(tokens=0, gap_sum=0, gap_max=0, ratio_max=0, grad_norm=0.0)
    row = step_row(
        1, "drgrpo", rollouts(), torch.zeros(2, 2), torch.zeros(2, 2), [nothing], SECONDS
    )
    for column in ("response_len_correct", "ratio_max", "kl", "parity_mean", "parity_max"):
        assert row[column] is None, column
    skipped = step_row(
        1, "drgrpo", rollouts(), REWARD_PG, ADVANTAGE_PG, [update(applied=False)], SECONDS
    )
    assert skipped["skipped_updates"] == 1 and skipped["grad_norm"] is None


def test_samples_are_the_first_of_each_prompt():
    rows = sample_rows(3, rollouts(), REWARD_PG, count=5)
    assert [(r["problem"], r["response"], r["reward"]) for r in rows] == [
        ("q0", "text 0", 1.0),
        ("q1", "text 2", 0.0),
    ]
    assert len(sample_rows(3, rollouts(), REWARD_PG, count=1)) == 1
