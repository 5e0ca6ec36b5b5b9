"""Grades: is the answer in a response the ground truth?

    text -> extract -> equal_as_strings        in this process, microseconds
                    -> equal_as_mathematics    in a worker process, milliseconds, where strings do
                                               not decide

A response is hostile input (`drgrpo/answers.py`). Nothing here evaluates text as code. The parser
runs in worker processes that the kernel kills at a limit of time or memory. An answer that kills
its worker scores 0 and is counted. Other answers do not wait for it.

Nothing here imports torch, so that a worker starts quickly.
"""

import functools
import importlib.util
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from drgrpo.answers import MODES, RULES, equal_as_mathematics, equal_as_strings, extract, truths_of
from drgrpo.reward import Reward
from drgrpo.types import Answer, Grade, Rollout, UserError
from drgrpo.workers import Pool, serve

REMEMBERED = 10_000  # comparisons; equal pairs of answer and truth are compared once
MEMORY = 1 << 30  # bytes of address space of a worker; it needs 0.07 GB
WORKER = (sys.executable, "-W", "ignore", "-m", "drgrpo.grade")


class Grader:
    """Grades in worker processes, while the caller samples.

        with Grader("boxed", reward="math + 0.2*my.py:format_ok") as grader:
            grades = [grader.grade(rollout) for rollout in rollouts]
            rewards = [grade.result().reward for grade in grades]

    timeout_s: the CPU time of one comparison, or of one call of a reward function, in seconds. A
    busy machine therefore changes no score. The limit by the clock is 10 times as long. A worker
    that reaches a limit of time or memory dies. `workers` are those of the comparison, and of each
    reward function.

    timeouts, errors: how many responses scored 0 because their comparison ended at a limit of time,
    or in another way. Workers start when the first answer needs one. UserError if math-verify is
    missing and `rule` may need it, or for a wrong `reward` (`drgrpo/reward.py`).
    """

    def __init__(
        self,
        rule: str,
        mode: str = "correct",
        workers: int = 2,
        timeout_s: float = 5.0,
        reward: str = "math",
    ) -> None:
        if rule not in RULES or mode not in MODES:
            raise ValueError(
                f"rule {rule!r} must be one of {RULES} and mode {mode!r} one of {MODES}"
            )
        if rule != "hash" and importlib.util.find_spec("math_verify") is None:
            raise UserError("grading needs math-verify: pip install 'math-verify[antlr4_13_2]'")
        self.rule, self.mode = rule, mode
        self.timeouts = self.errors = 0
        self.reward = Reward(reward, workers, timeout_s)
        self._pool = Pool((*WORKER, str(timeout_s)), workers)
        self._compare = functools.lru_cache(REMEMBERED)(self._start)
        self._counting = threading.Lock()

    def grade(self, rollout: Rollout) -> "Grading":
        """Start grading a response and computing its reward."""
        graded = self.submit(rollout.text, rollout.problem.answer)
        return Grading(rollout, graded, self.reward, self.reward.start(rollout))

    def submit(self, text: str, answer: Answer) -> Future[Grade]:
        """Start grading a response. The future holds a grade, whatever the response does. It raises
        RuntimeError if no worker can start."""
        grade: Future[Grade] = Future()
        given, truths = extract(text, self.rule), truths_of(answer)
        equal = False if given is None else equal_as_strings(given, truths, self.rule)
        if given is not None and equal is None:
            comparison = self._compare(given, truths)
            comparison.add_done_callback(lambda done: self._finish(grade, done))
        else:
            grade.set_result(Grade(float(bool(equal)), parsed=given is not None))
        return grade

    def _start(self, given: str, truths: tuple[str, ...]) -> Future[bool]:
        return self._pool.submit({"answer": given, "truths": truths, "mode": self.mode})

    def _finish(self, grade: Future[Grade], comparison: Future[bool]) -> None:
        """Turn one comparison into the grade of one of the responses that wait for it."""
        if comparison.cancelled():
            grade.cancel()
            return
        error = comparison.exception()
        if error is not None and not isinstance(error, TimeoutError | ChildProcessError):
            grade.set_exception(error)
            return
        with self._counting:
            self.timeouts += isinstance(error, TimeoutError)
            self.errors += isinstance(error, ChildProcessError)
        grade.set_result(Grade(float(error is None and comparison.result()), parsed=True))

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.close()
        self.reward.close()


@dataclass(frozen=True, slots=True)
class Grading:
    """A grade on its way, as a future."""

    rollout: Rollout
    graded: Future[Grade]
    reward: Reward
    calls: dict[str, Future[dict]]

    def result(self) -> Grade:
        """Wait for the grade and its reward."""
        return self.reward.add(self.graded.result(), self.calls, self.rollout)


# ---- the worker process


def work(timeout_s: float) -> None:
    """Compare what stdin asks for."""
    serve(prepare, timeout_s, MEMORY)


def prepare() -> Callable[..., bool]:
    """The comparison. The first one imports the libraries and fills their tables."""
    forbid_code()
    if not equal_as_mathematics(r"\frac{1}{2}", ("2/4",), "correct"):
        raise RuntimeError("math-verify does not find 1/2 equal to 2/4")
    return equal_as_mathematics


_ATOM = (
    r"\s*(?:(?:Integer|Float|Rational)\s*\(\s*'?[\d.]+(?:[eE][+-]?\d+)?'?\s*\)"
    r"|Symbol\s*\(\s*'\w+'\s*\)|E|I|pi|oo)\s*"
)
_ATOMS = re.compile(rf"\s*-?{_ATOM}(?:[-+*/]{_ATOM})*")
"""What sympy makes of "12", "-3/2" and "x" before it evaluates them."""


def forbid_code() -> None:
    """Close the two ways in which sympy turns text into code. math-verify 0.9.0 reaches both.

    `sympify` evaluates a string, and sympy reads numbers by it. `lambdify` pastes the names of
    symbols into the source of a function."""
    from sympy.parsing import sympy_parser

    evaluate = sympy_parser.eval_expr

    def evaluate_atoms(code: object, local_dict: dict, global_dict: dict) -> object:
        if not isinstance(code, str) or not _ATOMS.fullmatch(code):
            raise PermissionError("a grader evaluates numbers and names only")
        return evaluate(code, local_dict, global_dict)

    def refuse_lambdify(event: str, args: tuple) -> None:
        if event == "compile" and str(args[1]).startswith("<lambdify"):
            raise PermissionError("a grader compiles no functions")

    sympy_parser.eval_expr = evaluate_atoms
    sys.addaudithook(refuse_lambdify)


if __name__ == "__main__":
    work(float(sys.argv[1]))
