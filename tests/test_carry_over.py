"""The study of carry-over reads what its runs wrote, on runs that are made up."""

import pytest

from bench.experiments import carry_over
from bench.experiments.carry_over import compare, of_responses, setting, table
from bench.experiments.study import folder
from drgrpo.run.files import append_jsonl

STEPS = 20


def make_run(path, share: float, seed: int, step_s: float) -> None:
    """Rewards and accuracies rise by step. The first step takes in half of the responses."""
    path.mkdir(parents=True)
    rows, evals = [], []
    for step in range(1, STEPS + 1):
        seconds = {"total": step_s + 1.5, "eval": 1.0, "save": 0.5}
        row = {"step": step, "reward_mean": step / 100, "response_len_mean": 10 + seed}
        row |= {"responses": 2, "stale_frac": share} if share else {}
        rows.append(row | {"seconds": seconds})
    for step in range(0, STEPS + 1, 5):
        for temperature in (0, 1):
            accuracy = step / 100 + share + seed / 1000 if temperature else 9.0
            evals.append({"step": step, "temperature": temperature, "accuracy": accuracy})
    append_jsonl(path / "metrics.jsonl", rows)
    append_jsonl(path / "eval.jsonl", evals)


def test_shares_are_compared_by_seed_after_equal_responses_and_equal_seconds(tmp_path):
    for share, step_s in ((0.0, 2.0), (0.15, 1.0), (0.3, 1.5)):
        for seed in range(3):
            run = folder(tmp_path, carry_over.name(share), "drgrpo", seed)
            make_run(run, share, seed, step_s + 0.01 * seed * (share > 0))
    arms = compare(tmp_path, seeds=3)
    plain, fast = arms["0"]["runs"], arms["0.15"]["runs"]
    assert plain["reward"] == fast["reward"] == pytest.approx([0.195] * 3)
    assert plain["length"] == [10, 11, 12] and plain["step_s"] == pytest.approx([2.0] * 3)
    assert plain["accuracy"] == pytest.approx([0.15, 0.151, 0.152])
    # The fastest has 20 steps in 20 s, in which the plain run has 10: steps 0, 5 and 10 count.
    assert plain["accuracy_in_time"] == pytest.approx([0.05, 0.051, 0.052])
    assert fast["accuracy_in_time"] == fast["accuracy"] == pytest.approx([0.3, 0.301, 0.302])
    assert plain["stale"] == [0, 0, 0] and fast["stale"] == pytest.approx([0.15] * 3)
    against = arms["0.15"]["against_0"]
    assert against["step_s"]["mean"] == pytest.approx(-0.99) and against["step_s"]["seeds"] == 3
    assert against["accuracy"]["mean"] == pytest.approx(0.15)
    shown = table(arms, carry_over.COLUMNS)
    assert "| 0.3 |" in shown and "-0.990 (" in shown and "+0.250 (" in shown


def test_a_step_without_a_complete_group_weighs_nothing():
    rows = [{"r": 1.0, "responses": 3}, {"r": None, "responses": 0}, {"r": 0.0, "responses": 1}]
    assert of_responses(rows, "r") == 0.75 and of_responses(rows, "no column") == 0.0


def test_every_arm_has_room_for_what_is_carried():
    for share in carry_over.SHARES:
        arm = setting(share, seeds=4, steps=100)
        assert arm.train == {"carry_over": share, "sampler_batch": 512} and arm.algos == ("drgrpo",)
