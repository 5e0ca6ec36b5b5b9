"""The task of the `tiny` recipe: solve `a+b+x=t` by guess and check, every step written out.

    4+6+x=14~  ->  4+6=10,10+4=14y#4                         right
    2+8+x=18~  ->  2+8=10,10+2=12n?10+2=12n?10+2=12n#2       wrong, says so, re-checks twice

A response adds the two known digits, guesses x, reads off whether the guess hits (`y` or `n`), may
re-check that line any number of times (`?`), and answers after `#`. The task is built so that
GRPO's length bias *can* show: the model notices inside a response that it is going wrong, errors
survive many updates, and re-checking lets a response be as long as it likes without changing its
answer. On tasks without these three properties the bias is weak or absent, so this is a
demonstration of a mechanism, not evidence about large models.

The demonstrator, whom the warm-up imitates, adds reliably, guesses badly, reads off truthfully and
never corrects himself. His false guesses are fixed per fact (a + b, x), so that RL has to repair
many facts one by one.
"""

import random
from itertools import product

from drgrpo.types import Problem, check_name

HELD_OUT = 128
SPLIT_SEED = 7
MAX_RECHECKS = 8
STOP_RECHECKING = {"y": 0.9, "n": 0.25}
STOP_UNAWARE = 0.35


def problems(split: str) -> list[Problem]:
    """The 421 problems of `train` or the 128 of `heldout`. They are disjoint, and the same for
    every seed. UserError for another split."""
    check_name("split of the arithmetic task:", split, ("train", "heldout"))
    triples = [(a, b, x) for a, b, x in product(range(1, 10), repeat=3) if 6 <= a + b <= 14]
    random.Random(SPLIT_SEED).shuffle(triples)
    chosen = triples[:HELD_OUT] if split == "heldout" else triples[HELD_OUT:]
    return [
        Problem(id, f"{a}+{b}+x={a + b + x:02d}", str(x)) for id, (a, b, x) in enumerate(chosen)
    ]


class Demonstrator:
    """Writes the flawed solutions that the warm-up imitates. `seed` draws the solutions. The false
    guesses are the same for every seed, because they are part of the task. With `notices` off, the
    demonstrator claims a hit every time and re-checks as often when wrong as when right. Then
    nothing in a response tells whether it is right."""

    def __init__(self, seed: int, notices: bool = True) -> None:
        self.notices = notices
        self.rng = random.Random(seed)
        self.false_guess: dict[tuple[int, int], int] = {}
        self.error_rate: dict[tuple[int, int], float] = {}
        table = random.Random(SPLIT_SEED)
        for c, x in product(range(6, 15), range(1, 10)):
            false_guesses = [guess for guess in range(1, 10) if guess != x]
            self.false_guess[c, x] = table.choice(false_guesses)
            self.error_rate[c, x] = table.uniform(0.40, 0.98)

    def solve(self, problem: Problem) -> str:
        """One more solution of `problem`: at most 95 characters."""
        a, b, x = int(problem.question[0]), int(problem.question[2]), int(str(problem.answer))
        c = a + b
        guess = self.false_guess[c, x] if self.rng.random() < self.error_rate[c, x] else x
        verdict = "n" if self.notices and guess != x else "y"
        stop = STOP_RECHECKING[verdict] if self.notices else STOP_UNAWARE
        line = f"{c:02d}+{guess}={c + guess:02d}{verdict}"
        rechecks = 0
        while rechecks < MAX_RECHECKS and self.rng.random() > stop:
            rechecks += 1
        return f"{a}+{b}={c:02d},{line}{('?' + line) * rechecks}#{guess}"
