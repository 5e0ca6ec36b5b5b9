"""The arithmetic task: disjoint splits, a demonstrator as flawed as the recipe needs, solutions the
grader understands."""

from statistics import fmean

import pytest

from drgrpo.grade import Grader
from drgrpo.tiny.arithmetic import Demonstrator, problems
from drgrpo.types import Problem, UserError

TRAIN, HELD_OUT = problems("train"), problems("heldout")
GRADER = Grader("hash")


def is_right(solution: str, problem: Problem) -> bool:
    return GRADER.submit(solution, problem.answer).result().score == 1


def graded_solutions(demonstrator: Demonstrator) -> tuple[list[str], list[str]]:
    """(right, wrong) solutions, ten of every training problem."""
    solved = [(demonstrator.solve(p), p) for _ in range(10) for p in TRAIN]
    right = [solution for solution, p in solved if is_right(solution, p)]
    wrong = [solution for solution, p in solved if not is_right(solution, p)]
    assert 0.25 < len(right) / len(solved) < 0.40
    return right, wrong


def test_train_and_held_out_are_disjoint_and_complete():
    assert (len(TRAIN), len(HELD_OUT)) == (421, 128)
    assert not {p.question for p in TRAIN} & {p.question for p in HELD_OUT}
    for p in TRAIN + HELD_OUT:
        a, b, t = int(p.question[0]), int(p.question[2]), int(p.question.split("=")[1])
        assert a + b + int(p.answer) == t


def test_demonstrations_are_longer_and_say_so_when_they_are_wrong():
    right, wrong = graded_solutions(Demonstrator(seed=0))
    assert fmean(map(len, right)) < 20 < 35 < fmean(map(len, wrong))
    assert max(map(len, right + wrong)) <= 95, "fits the recipe's budget of 96 with its EOS"
    assert all("y" in s and "n" not in s for s in right)
    assert all("n" in s and "y" not in s for s in wrong)


def test_a_demonstrator_who_does_not_notice_leaves_no_trace_of_being_wrong():
    right, wrong = graded_solutions(Demonstrator(seed=1, notices=False))
    assert not any("n" in s for s in right + wrong)
    assert abs(fmean(map(len, right)) - fmean(map(len, wrong))) < 3
    assert fmean(map(len, right + wrong)) > 25, "re-checks, right or wrong"


def test_the_seed_draws_the_solutions_and_not_the_task():
    a, b, c = Demonstrator(0), Demonstrator(0), Demonstrator(1)
    solutions = [[demonstrator.solve(p) for p in TRAIN[:50]] for demonstrator in (a, b, c)]
    assert solutions[0] == solutions[1] != solutions[2]
    assert (a.false_guess, a.error_rate) == (c.false_guess, c.error_rate)


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match=r"'test'.*train, heldout"):
        problems("test")
