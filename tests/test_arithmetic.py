"""The arithmetic task: disjoint splits, a demonstrator as flawed as the recipe needs, solutions the
grader understands."""

from statistics import fmean

import pytest

from drgrpo.grade import grade
from drgrpo.tiny.arithmetic import Demonstrator, problems
from drgrpo.types import UserError


def test_train_and_held_out_are_disjoint_and_complete():
    train, held_out = problems("train"), problems("heldout")
    assert (len(train), len(held_out)) == (421, 128)
    assert not {p.question for p in train} & {p.question for p in held_out}
    for p in train + held_out:
        a, b, t = int(p.question[0]), int(p.question[2]), int(p.question.split("=")[1])
        assert a + b + int(p.answer) == t


def test_demonstrations_are_right_a_third_of_the_time_and_longer_when_wrong():
    demonstrator = Demonstrator(seed=0)
    solved = [(p, demonstrator.solve(p)) for _ in range(10) for p in problems("train")]
    right = [len(s) for p, s in solved if grade(s, p.answer, "hash").score == 1]
    wrong = [len(s) for p, s in solved if grade(s, p.answer, "hash").score == 0]
    assert 0.25 < len(right) / len(solved) < 0.40
    assert fmean(right) < 20 < 35 < fmean(wrong)
    assert max(right + wrong) <= 95  # fits the recipe's budget of 96 with its EOS


def test_the_verdict_is_truthful():
    demonstrator = Demonstrator(seed=1)
    for p in problems("train"):
        solution = demonstrator.solve(p)
        assert ("y" in solution) == (grade(solution, p.answer, "hash").score == 1)


def test_a_demonstrator_who_does_not_notice_leaves_no_trace_of_being_wrong():
    demonstrator = Demonstrator(seed=1, notices=False)
    solved = [(p, demonstrator.solve(p)) for _ in range(10) for p in problems("train")]
    assert not any("n" in s for _, s in solved)
    right = [len(s) for p, s in solved if grade(s, p.answer, "hash").score == 1]
    wrong = [len(s) for p, s in solved if grade(s, p.answer, "hash").score == 0]
    assert 0.25 < len(right) / len(solved) < 0.40
    assert abs(fmean(right) - fmean(wrong)) < 3 and fmean(right + wrong) > 25, (
        "he re-checks, right or wrong"
    )


def test_the_seed_draws_the_solutions_and_not_the_task():
    a, b, c = Demonstrator(0), Demonstrator(0), Demonstrator(1)
    chosen = problems("train")[:50]
    assert (
        [a.solve(p) for p in chosen] == [b.solve(p) for p in chosen] != [c.solve(p) for p in chosen]
    )
    assert a.false_guess == c.false_guess


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match=r"'test'.*'heldout'"):
        problems("test")
