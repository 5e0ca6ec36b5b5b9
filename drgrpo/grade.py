"""Grades: is the answer in a response the ground truth?

    text --extract--> answer --quick--> equal or unequal as strings or integers?   in this process, microseconds
                             --else---> math-verify: equal as mathematics?         in a `Grader`'s workers, milliseconds

A response is hostile input: reinforcement learning finds every string that hangs, floods or crashes
a grader. So nothing here evaluates text as code, what reaches the parser is bounded, and the parser
runs in processes that the kernel kills at a limit of time or memory. Such an answer scores 0 and is
counted; the others never wait for it.

This file imports nothing of the project at run time, so that a worker starts without torch.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import queue
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drgrpo.types import Answer

RULES = ("boxed", "tag", "hash")
MODES = ("correct", "paper")

MAX_CHARS = 1000  # of an answer; the longest ground truth of MATH and the five benchmarks has 204
MAX_NESTING = 20  # brackets; they have 3
TASKS_PER_WORKER = 5000  # then a fresh one, since ANTLR's tables grow with every new input
WORKER_MEMORY = 1 << 30  # bytes of address space; a worker needs 0.07 GB
WORKER = (sys.executable, "-W", "ignore", "-m", "drgrpo.grade")


@dataclass(frozen=True, slots=True)
class Grade:
    """score: 1.0 or 0.0. parsed: whether the response holds an answer in the form that its template
    asks for."""

    score: float
    parsed: bool


# The answer in a response.


def extract(text: str, rule: str) -> str | None:
    r"""The answer in a response, or None if there is none.

    boxed: what the last `\boxed{...}` holds.
    tag:   what follows the last `<answer>`, if the response closes its thought by `</think> <answer>` (one space) and
           has an `</answer>`; a box in it is unwrapped.
    hash:  what follows the only `#`.
    """
    if rule == "hash":
        return text.partition("#")[2].strip() if text.count("#") == 1 else None
    if rule == "boxed":
        return _last_box(text)
    if rule != "tag":
        raise ValueError(f"unknown rule {rule!r}; there are {', '.join(RULES)}")
    if "</think> <answer>" not in text or "</answer>" not in text:
        return None
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
    return _last_box(answer) if "\\boxed" in answer else answer


def _last_box(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < text.rfind("\\boxed"):  # the last one is a "\boxed 12", which is no box
        return None
    return _braced(text, start + len("\\boxed")) if start >= 0 else None


def _braced(text: str, start: int) -> str | None:
    r"""What is between the brace at `start` and the one that closes it; None if none does. Escaped
    braces do not count, unless that leaves it open; some truths of MATH are damaged
    (`\frac{\}{p}i`, "90{square") and then the last one closes."""
    for token in (r"\\.|[{}]", r"[{}]"):
        depth = 0
        for match in re.compile(token, re.DOTALL).finditer(text, start):
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return text[start + 1 : match.start()]
    end = text.rfind("}", start)
    return text[start + 1 : end] if end >= 0 else None


# Equal as strings.

_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?: is|:)[: ]*", re.I
)
_PROSE = re.compile(r"\$[^$]*\$|\b(?:and|or)\b")
_INTEGER = re.compile(r"-?\d+")
_NUMBER = re.compile(r"[+-]?(?=\.?\d)(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d*)?(?:e[+-]?\d{1,2})?")
_DRESS = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|\^\{?\\circ\}?|\s|\\?%$")
_UNIT = re.compile(
    r"(.*[\w)}\]])\s*\\(?:text|mbox|mathrm)\s*\{(?![^}]*\b(?:and|or)\b)[a-zA-Z ./^]*\}(?:\^\{?-?\d\}?)?",
    re.DOTALL,
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|mathbf)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")

_HUGE = re.compile(  # a hundred digits, a five-digit power, a tower of three powers with braces and without
    r"\d{100}|(?:\^|\*\*)[\s{(+-]*\d{5}|\^\s*\{[^{}]*\^\s*\{[^{}]*\^|(?:\^[\s{(+-]*(?:\d+|[a-zA-Z])[\s)}]*){3}"
)

# Spellings of one thing. Row breaks are among them: some copies of MATH write a matrix with single
# backslashes.
_SAME = {
    "dfrac": "frac",
    "tfrac": "frac",
    "bmatrix": "pmatrix",
    "\\cdot": "\\times",
    "\\\\": "\\",
    "{,}": ",",
}


def _clean(text: str) -> str:
    """An answer without its dress: boxes, "the answer is", dollar signs, braces, a final full
    stop."""
    text = " ".join(text.split())
    if "\\boxed" in text:
        text = _last_box(text) or ""
    text = _LEAD_IN.sub("", text).replace("\\$", "").replace("\\!", "").replace("°", "^\\circ")
    if text.count("$") % 2 or not re.search("[a-zA-Z]", _PROSE.sub("", text)):
        # "$1$, $2$" is one list, where in "so $x$ is $2$" the signs say what is mathematics.
        text = text.replace("$", "")
    text = text.strip().rstrip(".\\ ")
    return text[1:-1] if text.startswith("{") and _braced(text, 0) == text[1:-1] else text


@functools.lru_cache(maxsize=8192)
def _key(text: str) -> str:
    """Equal keys, equal answers. The converse needs math-verify."""
    text = _clean(text)
    unit = _UNIT.fullmatch(text)
    if unit and "\\text" not in unit[1]:
        text = unit[1]
    text = _DRESS.sub("", _TEXT.sub(r"\1", text))
    for written, meant in _SAME.items():
        text = text.replace(written, meant)
    text = re.sub(r"^[a-zA-Z]{1,2}=(?=[^=]*$)", "", text)
    if "\\" not in text:
        text = text.lower()
    if _NUMBER.fullmatch(text):
        text = format(Decimal(text.replace(",", "")), "f")  # exact: no padding, no exponent, no "+"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _too_much(text: str) -> bool:
    """Whether a parser should not see this: brackets nested too deep, or numbers that explode when
    worked out."""
    depth = deepest = 0
    for bracket in re.findall(r"[({\[\])}]", text):
        depth += 1 if bracket in "({[" else -1
        deepest = max(deepest, depth)
    return deepest > MAX_NESTING or _HUGE.search(text) is not None


def _quick(given: str, truths: tuple[str, ...], rule: str) -> float | None:
    """The score, where strings and integers decide it; None where it takes mathematics."""
    if rule == "hash":
        return float(given in (truth.strip() for truth in truths))
    if len(given) > max(MAX_CHARS, *map(len, truths)):
        return 0.0
    key, keys = _key(given), [_key(truth) for truth in truths]
    if not key:
        return 0.0
    if key in keys:
        return 1.0
    integers = all(_INTEGER.fullmatch(k) for k in (key, *keys))
    return 0.0 if integers or _too_much(given) else None


def _truths(answer: Answer) -> tuple[str, ...]:
    return tuple(map(str, answer)) if isinstance(answer, list | tuple) else (str(answer),)


# Equal as mathematics.


@functools.cache
def _math_verify():
    """(parse, verify), without their own time limits: those are alarms, which need the main thread
    and do not stop a long multiplication. Numbers in prose are left alone: math-verify would send
    them through Python's eval."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no limit
    latex, prose = LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()

    def parse_latex(text: str, reference: bool = False) -> list:
        targets = (latex, prose) if reference else (latex,)
        wrapped = text if "$" in text else f"${text}$"
        parsed = parse(
            wrapped, extraction_config=targets, fallback_mode="no_fallback", parsing_timeout=None
        )
        return parsed if all(map(_harmless, parsed)) else []

    return parse_latex, functools.partial(verify, timeout_seconds=None)


def _harmless(expression) -> bool:
    r"""Whether every name in an expression is no more than a name. `x_{(a)if(exit(7))else(b)}`
    parses as one symbol, and sympy would paste it into a function to sum a series."""
    from sympy.core.function import AppliedUndef

    names = [node.name for node in expression.atoms() if hasattr(node, "name")]
    names += [node.func.__name__ for node in expression.atoms(AppliedUndef)]
    return all(re.fullmatch(r"[\w\\{}, ]*", str(name)) for name in names)


def _equal(given: str, truths: Sequence[str], mode: str) -> bool:
    parse, verify = _math_verify()
    answer = parse(_clean(given))
    if not answer:
        return False
    for truth in truths:
        newline = mode == "paper" and "\n" in truth
        if newline and verify(parse(truth, reference=True), answer):
            return True
        if (not newline or _plain(given, truth)) and verify(parse(_clean(truth)), answer):
            return True
    return False


def _plain(given: str, truth: str) -> bool:
    r"""Whether the paper's grader gets a Minerva truth right. It hands the truth to its LaTeX
    parser with the newline that 236 of the 272 end in, which hides the formula: the last number
    becomes the truth, "-3/2\n" is -3 and "7 \times 10^{37}\n" is 10. Its second parser, for plain
    sums, knows no two-digit powers and at most two letters, and compares fractions, and integers
    with anything else, as strings."""
    texts = [
        re.sub(r"\\(?:[dt]?frac|sqrt|times|cdot|left|right)", "", _clean(text))
        for text in (given, truth)
    ]
    letters = {letter for text in texts for letter in text if letter.isalpha()}
    fractions = all(re.fullmatch(r"-?(?:\{\d+\}\{\d+\}|\d+/\d+)", text) for text in texts)
    integers = {re.fullmatch(r"-?\d+", _key(text)) is not None for text in texts}
    powers = any(re.search(r"\^\{?[\d(]\d", text) for text in texts)
    return len(letters) <= 2 and not fractions and len(integers) == 1 and not powers


def equal(given: str, answer: Answer, mode: str = "correct") -> bool:
    """Whether `given` is the ground truth, or one of a list of them. In this process and without
    protection."""
    score = _quick(given, _truths(answer), "boxed")
    return _equal(given, _truths(answer), mode) if score is None else score == 1.0


def grade(text: str, answer: Answer, rule: str, mode: str = "correct") -> Grade:
    """The grade of one response, in this process and without protection: for text you trust.
    `Grader` is for models'."""
    given = extract(text, rule)
    if given is None:
        return Grade(0.0, parsed=False)
    if rule == "hash":
        return Grade(_quick(given, _truths(answer), rule), parsed=True)
    return Grade(float(equal(given, answer, mode)), parsed=True)


# The workers.


class Grader:
    """Grades in worker processes, while the caller goes on sampling.

        with Grader("boxed", workers=4) as grader:
            for text, problem in ...:
                grader.submit(text, problem.answer)
            grades = grader.collect()

    A worker that reaches `timeout_s` seconds of CPU time on one answer (so that a busy machine
    changes no score; at most 10 times that by the clock) or its memory limit dies, and that answer
    scores 0. `timeouts` and `errors` count them. The workers start at the first answer that needs
    one. UserError if math-verify is missing and `rule` may need it.
    """

    def __init__(self, rule: str, mode: str = "correct", workers: int = 2, timeout_s: float = 5.0):
        if rule not in RULES or mode not in MODES:
            raise ValueError(
                f"rule {rule!r} must be one of {RULES} and mode {mode!r} one of {MODES}"
            )
        if rule != "hash" and importlib.util.find_spec("math_verify") is None:
            from drgrpo.types import UserError

            raise UserError("grading needs math-verify: pip install 'math-verify[antlr4_13_2]'")
        self.rule, self.mode = rule, mode
        self.timeouts = self.errors = 0
        self._workers = [_Worker(timeout_s) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(
            workers, thread_name_prefix="grader"
        )  # each waits on one worker

    def submit(self, text: str, answer: Answer) -> Future[Grade]:
        """Start grading a response. The future always holds a grade."""
        truths, given = _truths(answer), extract(text, self.rule)
        score = 0.0 if given is None else _quick(given, truths, self.rule)
        if score is None:
            return self._threads.submit(self._ask, given, truths)
        future: Future[Grade] = Future()
        future.set_result(Grade(score, parsed=given is not None))
        return future

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._stop()  # what they are at is no longer wanted
        self._threads.shutdown()
        self._stop()  # a thread may have started another in between

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _ask(self, given: str, truths: tuple[str, ...]) -> Grade:
        worker = self._idle.get()
        try:
            equal = worker.ask({"given": given, "truths": truths, "mode": self.mode})
        except TimeoutError:
            self.timeouts += 1
            equal = False
        except ChildProcessError:
            self.errors += 1
            equal = False
        finally:
            self._idle.put(worker)
        return Grade(float(equal), parsed=True)


class _Worker:
    """A child process that grades what it is sent, one line of JSON each way.

    A plain subprocess and not `multiprocessing`: that imports the caller's `__main__` in every
    worker, here train.py and with it torch; its forks are unsafe beside torch's threads; and it
    unpickles what the worker returns.
    """

    def __init__(self, timeout_s: float):
        self.timeout_s, self.process, self.asked = timeout_s, None, 0

    def ask(self, task: dict) -> bool:
        """TimeoutError or ChildProcessError if the worker did not survive the task; the next one
        gets a new worker."""
        if self.process is None or self.asked >= TASKS_PER_WORKER:
            self.stop()
            self._start()
        self.asked += 1
        reply = self._exchange(json.dumps(task) + "\n")
        if reply:
            return json.loads(reply)
        status = self.process.wait()
        self.process = None
        if status in (-signal.SIGPROF, -signal.SIGALRM):
            raise TimeoutError(signal.Signals(-status).name)
        raise ChildProcessError(f"a grader worker ended with status {status}")

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [*WORKER, str(self.timeout_s)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.asked = 0
        if self._exchange("") != "ready\n":
            raise RuntimeError(
                f"a grader worker did not start (its error is above): {' '.join(command)}"
            )

    def _exchange(self, line: str) -> str:
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self.process.stdout.readline()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _work(timeout_s: float) -> None:
    """The worker process: reads tasks from stdin until it closes, so no worker outlives the
    trainer."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(
            number, signal.SIG_IGN
        )  # sent to the whole job, they are the trainer's to handle
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody reads the reply: end without a traceback
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    _forbid_code()
    if not _equal(
        r"\frac{1}{2}", ("2/4",), "correct"
    ):  # pays for imports and tables ahead of the first answer
        raise RuntimeError("math-verify does not find 1/2 equal to 2/4")
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        # Nobody handles these signals, so the kernel ends the process, inside a long multiplication
        # too.
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        signal.setitimer(signal.ITIMER_REAL, 10 * timeout_s)
        equal = _equal(
            **json.loads(line)
        )  # what it raises ends the process too, and a fresh one is the best cleanup
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(equal) + "\n")
        replies.flush()


def _forbid_code() -> None:
    """Closes the two ways in which sympy turns text into code: `sympify` of a string, by which it
    also reads numbers, and `lambdify`, which pastes the names of symbols into the source of a
    function. math-verify 0.9.0 reaches both."""
    from sympy.parsing import sympy_parser

    evaluate = sympy_parser.eval_expr

    def evaluate_atoms(code, local_dict, global_dict):
        if not isinstance(code, str) or not _ATOMS.fullmatch(code):
            raise PermissionError("a grader evaluates numbers and names only")
        return evaluate(code, local_dict, global_dict)

    def refuse_lambdify(event, args):
        if event == "compile" and str(args[1]).startswith("<lambdify"):
            raise PermissionError("a grader compiles no functions")

    sympy_parser.eval_expr = evaluate_atoms
    sys.addaudithook(refuse_lambdify)


_ATOM = r"\s*(?:(?:Integer|Float|Rational)\s*\(\s*'?[\d.]+(?:[eE][+-]?\d+)?'?\s*\)|Symbol\s*\(\s*'\w+'\s*\)|E|I|pi|oo)\s*"
_ATOMS = re.compile(
    rf"{_ATOM}(?:[-+*/]{_ATOM})*"
)  # what sympy makes of "12", "3/2" and "x" before it evaluates them


if __name__ == "__main__":
    _work(float(sys.argv[1]))
