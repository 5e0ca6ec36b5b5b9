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
import json
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drgrpo.answers import MODES, RULES, equal_as_mathematics, equal_as_strings, extract, truths_of
from drgrpo.types import Answer, UserError

REMEMBERED = 10_000  # comparisons; equal pairs of answer and truth are compared once
TASKS_PER_WORKER = 5000  # then a new worker, since ANTLR's tables grow with every new input
WORKER_MEMORY = 1 << 30  # bytes of address space; a worker needs 0.07 GB
WORKER = (sys.executable, "-W", "ignore", "-m", "drgrpo.grade")


@dataclass(frozen=True, slots=True)
class Grade:
    """score: 1.0 or 0.0. parsed: whether the response holds an answer in the form that its template
    asks for."""

    score: float
    parsed: bool


class Grader:
    """Grades in worker processes, while the caller samples.

        with Grader("boxed", workers=4) as grader:
            grades = [grader.submit(text, problem.answer) for text, problem in ...]
            scores = [grade.result().score for grade in grades]

    timeout_s: the CPU time of one comparison, in seconds. A busy machine therefore changes no
    score. The limit by the clock is 10 times as long. A worker that reaches a limit of time or
    memory dies.

    timeouts, errors: how many responses scored 0 because their comparison ended at a limit of time,
    or in another way. Workers start when the first answer needs one. UserError if math-verify is
    missing and `rule` may need it.
    """

    def __init__(self, rule: str, mode: str = "correct", workers: int = 2, timeout_s: float = 5.0):
        if rule not in RULES or mode not in MODES:
            raise ValueError(
                f"rule {rule!r} must be one of {RULES} and mode {mode!r} one of {MODES}"
            )
        if rule != "hash" and importlib.util.find_spec("math_verify") is None:
            raise UserError("grading needs math-verify: pip install 'math-verify[antlr4_13_2]'")
        self.rule, self.mode = rule, mode
        self.timeouts = self.errors = 0
        self._workers = [_Worker(timeout_s) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # Each thread waits for one worker.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grader")
        self._compare = functools.lru_cache(REMEMBERED)(self._start)
        self._counting = threading.Lock()

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
        return self._threads.submit(self._ask_worker, given, truths)

    def _ask_worker(self, given: str, truths: tuple[str, ...]) -> bool:
        worker = self._idle.get()
        try:
            return worker.ask({"answer": given, "truths": truths, "mode": self.mode})
        finally:
            self._idle.put(worker)

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
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._stop()  # nobody waits for the comparisons that still run
        self._threads.shutdown()
        self._stop()  # a thread may have started another worker in between

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()


class _Worker:
    """A child process that compares what it is sent, one line of JSON each way.

    This is a plain subprocess and not `multiprocessing`, for three reasons. `multiprocessing`
    imports the caller's `__main__` in every worker, which is train.py and with it torch. Its forks
    are unsafe beside torch's threads. It unpickles what the worker returns.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.process: subprocess.Popen[str] | None = None
        self.tasks = 0

    def ask(self, task: Mapping[str, Any]) -> bool:
        """Whether the task's answer is right. TimeoutError or ChildProcessError if the worker did
        not survive the task; the next task gets a new worker."""
        if self.process is None or self.tasks >= TASKS_PER_WORKER:
            self.stop()
            self.process = self._start()
        self.tasks += 1
        reply = exchange(self.process, json.dumps(task) + "\n")
        if reply:
            return json.loads(reply)
        status = self.process.wait()
        self.process = None
        if status in (-signal.SIGPROF, -signal.SIGALRM):
            raise TimeoutError(signal.Signals(-status).name)
        raise ChildProcessError(f"a grader worker ended with status {status}")

    def _start(self) -> "subprocess.Popen[str]":
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [*WORKER, str(self.timeout_s)]
        # `stop` must see the process before it is ready.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.tasks = 0
        if exchange(self.process, "") != "ready\n":
            raise RuntimeError(
                f"a grader worker did not start (its error is above): {' '.join(command)}"
            )
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def exchange(process: "subprocess.Popen[str]", line: str) -> str:
    """The process's reply to a line; empty if the process is dead."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


# ---- the worker process


def work(timeout_s: float) -> None:
    """Compare what stdin asks for until stdin closes, so that no worker outlives the trainer."""
    # These signals are sent to the whole job, and the trainer handles them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads the reply: end without a traceback
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    forbid_code()
    # The first comparison imports the libraries and fills their tables.
    if not equal_as_mathematics(r"\frac{1}{2}", ("2/4",), "correct"):
        raise RuntimeError("math-verify does not find 1/2 equal to 2/4")
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # Nobody handles the signals of these timers, so that the kernel ends the process, even
        # inside a long multiplication.
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        signal.setitimer(signal.ITIMER_REAL, 10 * timeout_s)
        # An exception ends the process too: a new process is the best cleanup.
        equal = equal_as_mathematics(**json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(equal), file=replies, flush=True)


_ATOM = (
    r"\s*(?:(?:Integer|Float|Rational)\s*\(\s*'?[\d.]+(?:[eE][+-]?\d+)?'?\s*\)"
    r"|Symbol\s*\(\s*'\w+'\s*\)|E|I|pi|oo)\s*"
)
_ATOMS = re.compile(rf"{_ATOM}(?:[-+*/]{_ATOM})*")
"""What sympy makes of "12", "3/2" and "x" before it evaluates them."""


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
