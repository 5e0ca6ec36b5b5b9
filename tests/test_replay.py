"""Dumped rollouts come back the same, and only for the problems that they answer."""

import pytest

from drgrpo import replay
from drgrpo.types import Completion, Problem, Rollout, UserError

PROBLEMS = [Problem(4, "1+1?", "2", [1, 2]), Problem(9, "2+2?", "4", [1, 3])]


def rollouts():
    return [Rollout(p, Completion([7, 8, i], [-0.1, -1 / 3, -2e-9], i > 0), f"é {i}") for p in PROBLEMS for i in range(2)]


def test_round_trip_to_the_last_bit(tmp_path):
    replay.dump(tmp_path, 3, rollouts())
    assert replay.load(tmp_path, 3, PROBLEMS) == rollouts()


def test_a_missing_step_and_another_data_set_are_named(tmp_path):
    replay.dump(tmp_path, 3, rollouts())
    with pytest.raises(UserError, match="step-000004"):
        replay.load(tmp_path, 4, PROBLEMS)
    with pytest.raises(UserError, match="problem 9"):
        replay.load(tmp_path, 3, PROBLEMS[:1])
    with pytest.raises(UserError, match="problem 4"):
        replay.load(tmp_path, 3, [Problem(4, "3+3?", "6", [1]), PROBLEMS[1]])
