"""The grader finds the answer that each template asks for. It agrees with the listed behaviour of
the paper's grader, and with its Minerva bug only in `paper` mode. Every ground truth scores 1.0. An
answer that hangs, floods, crashes or tries to run code costs its own score and nothing else.

    pytest tests/test_grade.py
    DRGRPO_FUZZ=100000 pytest tests/test_grade.py -k fuzz      # all of it: an hour on two cores
    DRGRPO_ALL_TRUTHS=1 pytest tests/test_grade.py -k truth    # all of MATH-12K, not every tenth
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drgrpo import grade as grade_module
from drgrpo import workers as workers_module
from drgrpo.answers import (
    MAX_CHARS,
    MAX_NESTING,
    MODES,
    RULES,
    equal_as_strings,
    extract,
    normalize,
    too_complex,
    truths_of,
)
from drgrpo.data import EVAL_SETS
from drgrpo.grade import Grade, Grader
from drgrpo.types import UserError
from drgrpo.workers import Worker

ROOT = Path(__file__).parents[1]
DATA = ROOT / "../shared/data"
HUNG = "9^{9^9}"  # parses at once, and would take years to work out


def boxed(answer: str) -> str:
    return f"Hence \\boxed{{{answer}}}."


def tagged(answer: str) -> str:
    return f"so it is</think> <answer>{answer}</answer>"


def grade_all(grader: Grader, texts, truths) -> list[Grade]:
    grades = [grader.submit(text, truth) for text, truth in zip(texts, truths, strict=True)]
    return [grade.result() for grade in grades]


def scores(grader: Grader, texts, truths) -> list[float]:
    return [grade.score for grade in grade_all(grader, texts, truths)]


def run_python(code: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def graders():
    """One grader for every rule and mode."""
    with ExitStack() as stack:
        yield {
            (rule, mode): stack.enter_context(Grader(rule, mode))
            for rule, mode in product(("boxed", "tag"), MODES)
        }


# Finding the answer.


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *(("\\boxed{1} then \\boxed{2}", "2"), ("\\boxed{\\boxed{12}}", "12")),
        ("\\boxed{\\frac{1}{2}} and more {text}", "\\frac{1}{2}"),
        *(("\\boxed{\\{1,2\\}}", "\\{1,2\\}"), ("\\boxed{5} and an empty \\boxed{}", "")),
        ("\\boxed{\\left\\{ 1 \\right.}, {x}", "\\left\\{ 1 \\right."),
        ("\\boxed{\\frac{\\}{p}i2}, {x}", "\\frac{\\}{p}i2"),
        *(("\\boxed{90{square}", "90{square"), ("\\boxed{12", None), ("\\fbox{12}", None)),
        *(("\\boxed{5} but \\boxed12", None), ("\\boxed{5} but \\boxed {12}", None)),
        *(("12", None), ("", None)),
    ],
)
def test_extract_boxed(text, answer):
    assert extract(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *((tagged("12"), "12"), (tagged("12") + " and so on", "12"), ("\\boxed{12}", None)),
        *((tagged("12") + "<answer>13</answer>", "13"), ("<answer>12</answer>", None)),
        *((tagged("it is \\boxed{12}, of course"), "12"), (tagged("it is \\boxed12"), None)),
        *((f"x</think>{gap}<answer>12</answer>", None) for gap in ("", "\n", "  ")),
        ("x</think> <answer>12", None),
    ],
)
def test_extract_tag(text, answer):
    assert extract(text, "tag") == answer


@pytest.mark.parametrize(
    ("text", "answer"), [("1+1#2 ", "2"), ("#", ""), ("2", None), ("1#2#3", None)]
)
def test_extract_hash(text, answer):
    assert extract(text, "hash") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *(("12 apples, then 13.", "13"), ("it costs $1,234.50.", "1234.50"), ("5 and -3", "-3")),
        *(("1/2", "2"), ("so 18...", "18"), ("18, they say ...", "18"), ("\\boxed{7}", "7")),
        *(("#### 72\n", "72"), ("about .5", ".5"), ("x-1", "-1"), ("ten", None), ("", None)),
        *(("...", None), ("$", None), ("٣", None)),
    ],
)
def test_extract_number(text, answer):
    """As lm-evaluation-harness finds and cleans it, but for what it finds without a digit."""
    assert extract(text, "number") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *(("2 + 2 = 4\n#### 4", "4"), ("#### 1,000 eggs\nQuestion: 5", "1,000 eggs")),
        *(("#### 1\n#### 2", "2"), ("####", ""), ("### 4", None), ("4", None)),
    ],
)
def test_extract_gsm8k(text, answer):
    assert extract(text, "gsm8k") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        *(
            ("46-22", "24"),
            ("46-22=25 apples", "24"),
            (" (5+1)*2 ", "12"),
            ("2-5", "-3"),
            ("-3", "-3"),
        ),
        *(
            ("5/2=", "2.5"),
            ("0.1+0.2", "0.3"),
            ("10/3", "3.333333333"),
            ("1000000*1000000", "1" + 12 * "0"),
            ("0.1*100000000000", "1" + 10 * "0"),
        ),
        *(
            ("=24", None),
            ("", None),
            ("46-22 apples", None),
            ("x+1", None),
            ("1/0", None),
            ("2(3)", None),
        ),
        *(
            ("9**9", None),
            ("7//2", None),
            ("1..2", None),
            ("()", None),
            ("07+1", None),
            ("٣+1", None),
        ),
        *(("(1", None), ("9" * 101, None), ("(" * 50 + "1" + ")" * 50, None)),
    ],
)
def test_extract_formula(text, answer):
    assert extract(text, "formula") == answer


@given(st.text("0123456789+-*/(). =", max_size=120))
def test_a_calculator_never_fails(text):
    value = extract(text, "formula")
    assert value is None or float(value) is not None


@pytest.mark.parametrize("rule", ["number", "gsm8k"])
def test_a_number_is_compared_as_a_number(rule):
    texts = ["#### $1,000.", "#### 1000.0", "#### 1001", "no number"]
    with Grader(rule) as grader:
        assert scores(grader, texts, ["1000"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_an_unknown_rule_or_mode_is_refused():
    with pytest.raises(ValueError, match="boxed, tag, hash"):
        extract("1", "latex")
    with pytest.raises(ValueError, match="paper"):
        Grader("boxed", mode="Paper")


# Equal or not: what the paper's grader accepts and rejects, found by running it.

# (truth, answer)
ACCEPTED = [
    *(("142", "142.0"), (142.0, "142"), (7, "007"), ("025", "25"), ("6", "6.0e+00")),
    *(("10,000", "10000"), ("335{,}670", "335670"), ("335{,}670", "x=335{,}670")),
    *(("\\$32,\\!348", "32348"), ("32348", "\\$32,\\!348"), ("-5", "−5"), ("2516_8", "2516")),
    # fractions
    *(("\\frac12", "1/2"), ("0.5", "\\dfrac{1}{2}"), ("1/2", "2/4"), ("1/2", "1:2")),
    *(("\\frac{1}{3}", "0.33333333"), ("\\frac{5}{2}", "2\\frac{1}{2}"), ("0.5", "50\\%")),
    # units and words
    *(("5", "5\\text{ cm}"), ("5", "5 cm"), ("5", "5 \\text{ sq. units}"), ("50", "50\\%")),
    *(("90^\\circ", "90"), ("90", "90°"), ("\\text{(A)}", "A"), ("Monday", "\\text{monday}")),
    *(("\\text{Ann and Bob}", "ann and bob"), ("1 or 2", "1, 2")),
    # wrapping
    *(("5", "x=5"), ("5", "abc=5"), ("2x", "f(x)=2x"), ("[-2,7]", "x\\in[-2,7]")),
    *(("12", "12\\\\"), ("12", "\\boxed{12}"), ("\\boxed{12}", "12"), ("12", "The answer is 12")),
    *(("12", "the final answer is: $12$."), ("2", "so the length of $x$ is $2$")),
    *(("\\sqrt{2}", "\\sqrt{2}$"), ("{(-\\frac{3}{2}, 6)}", "(-\\frac32, 6)")),
    # mathematics
    *(("3\\sqrt{13}", "\\sqrt{117}"), ("y^3x^2z^4", "x^2y^3z^4"), ("2,-2", "\\pm 2")),
    *(("(1,2)", "1,2"), ("1,2", "2,1"), ("\\{1,2\\}", "\\{2, 1\\}")),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
    ("\\begin{pmatrix}6\\-17\\end{pmatrix}", "\\begin{pmatrix} 6 \\\\ -17 \\end{pmatrix}"),
    ("\\begin{pmatrix}6\\-17\\end{pmatrix}", "\\begin{pmatrix}6\\\\-17\\end{pmatrix}"),
    # several truths, and damaged ones
    *(("$\\frac{1}{2}$,$8$", "8, 0.5"), (["$221,$8$"], "$221,$8$")),
    *((["7.0 \\times 10^{37}\n", "3\n"], "7 \\cdot 10^{37}"), (["3\n", "-3/2\n"], "-\\frac{3}{2}")),
]
REJECTED = [
    *(("\\frac{1}{3}", "0.333"), ("50", "49.99"), ("8.7\\times10^{8}", "8.7e8"), ("6", "six")),
    *(("12", ""), ("12", "   "), ("12", "13"), ("12", "-12"), ("12", "12, 13"), ("10", "1010_2")),
    *(("(1,2)", "[1,2]"), ("[1,2]", "(1,2)"), ("1" * 40, "1" * 39 + "2")),
    *((["7 \\times 10^{37}\n"], "10"), (["-3/2\n"], "-3"), (["4.5e33\n"], "4.5")),
    *(("\\frac{3}{4}", "-$\\frac{3}{4}$"), ("\\text{Ann}", "\\text{Ann}\\text{ and Bob}")),
    ("\\text{Ann}", "\\text{Ann}\\text{ Bob}"),
]


@pytest.mark.parametrize(("truth", "answer"), ACCEPTED, ids=lambda value: str(value)[:40])
def test_accepted(graders, truth, answer):
    assert scores(graders["tag", "correct"], [tagged(answer)], [truth]) == [1.0]


@pytest.mark.parametrize(("truth", "answer"), REJECTED, ids=lambda value: str(value)[:40])
def test_rejected(graders, truth, answer):
    assert scores(graders["tag", "correct"], [tagged(answer)], [truth]) == [0.0]


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("7 \\times 10^{37}\n", "10", True),
        ("-3/2\n", "-3", True),
        ("4.5e33\n", "4.5", True),
        ("7 \\times 10^{37}\n", "7.0 \\times 10^{37}", False),
        ("-3/2\n", "-\\frac{3}{2}", False),
        ("7 \\times 10^{37}\n", "7 \\times 10^{37}", True),
        ("9.6\n", "9.6", True),
        ("3 \\times 10^{8}\n", "3.0 \\cdot 10^8", True),
        ("-3/2", "-\\frac{3}{2}", True),
    ],
)
def test_paper_mode_has_the_newline_bug_of_the_papers_grader(graders, truth, answer, right):
    assert scores(graders["tag", "paper"], [tagged(answer)], [[truth]]) == [float(right)]


def test_a_grade_says_whether_there_was_an_answer():
    right, wrong, missing = Grade(1.0, True), Grade(0.0, True), Grade(0.0, False)
    with Grader("boxed") as grader:
        texts = [boxed("12"), boxed("13"), "12"]
        assert grade_all(grader, texts, ["12"] * 3) == [right, wrong, missing]
    with Grader("hash") as grader:  # compares strings, not numbers
        assert grade_all(grader, ["1+1#2", "1+1#02", "2"], ["2"] * 3) == [right, wrong, missing]


# Every ground truth is right.


@pytest.mark.parametrize("mode", ["correct", "paper"])
@pytest.mark.parametrize("name", [*(f"eval/{name}" for name in EVAL_SETS), "train/math_12k"])
def test_truths_score_one(graders, name, mode):
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    every = 1 if name != "train/math_12k" or os.environ.get("DRGRPO_ALL_TRUTHS") else 10
    rows = [json.loads(line)["answer"] for line in path.read_text().splitlines()[::every]]
    pairs = [(truth, answer) for answer in rows for truth in truths_of(answer) if truth]
    texts, truths = zip(*pairs, strict=True)  # five rows of this copy of MATH have no truth
    right = scores(graders["boxed", mode], map(boxed, texts), truths)
    for written in (texts, map(boxed, texts)):
        tag = scores(graders["tag", mode], map(tagged, written), truths)
        right = map(min, right, tag)
    assert not [text for text, score in zip(texts, right, strict=True) if score != 1.0]


# The pool.


def test_the_pool_gives_every_response_its_own_grade(graders):
    truths, texts = zip(*ACCEPTED, *REJECTED, strict=True)
    expected = [1.0] * len(ACCEPTED) + [0.0] * len(REJECTED)
    assert scores(graders["boxed", "correct"], map(boxed, texts), truths) == expected


def test_a_hanging_answer_is_killed_counted_and_stalls_nobody():
    texts = [boxed(a) for a in (HUNG, "2/4", HUNG, "3/4", *["\\sqrt{117}"] * 3)]
    with Grader("boxed", workers=2, timeout_s=1.0) as grader:
        start = time.monotonic()
        found = scores(grader, texts, [*["1/2"] * 4, *["3\\sqrt{13}"] * 3])
        seconds = time.monotonic() - start
        assert found == [0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
        assert (grader.timeouts, grader.errors) == (2, 0), "a response each"
        # Both time-outs are one comparison of one second. The rest is starting workers.
        assert seconds < 12
        assert scores(grader, [boxed("4/8")], ["1/2"]) == [1.0], "the pool lives on"


@pytest.fixture
def compared(monkeypatch) -> list[str]:
    """The answers that workers compare. They find each of them right."""
    answers = []

    def ask(worker, task):
        answers.append(task["answer"])
        return True

    monkeypatch.setattr(Worker, "ask", ask)
    return answers


def test_equal_pairs_are_compared_once(compared):
    with Grader("boxed") as grader:
        texts = [boxed("2/4")] * 50 + [boxed("3/6")]
        assert scores(grader, texts, ["1/2"] * 51) == [1.0] * 51
        assert sorted(compared) == ["2/4", "3/6"]
        scores(grader, [boxed("2/4")], ["1/2"])
        assert len(compared) == 2, "in a later batch too"
        scores(grader, [boxed("2/4")], ["3/6"])
        assert len(compared) == 3, "another truth is another pair"


def test_ten_thousand_pairs_are_remembered_and_then_the_oldest_goes(compared):
    texts = [boxed(f"{i}/{2 * i}") for i in range(2, 10_003)]
    with Grader("boxed") as grader:
        scores(grader, texts[:10_000], ["1/2"] * 10_000)
        scores(grader, texts[:1], ["1/2"])
        assert len(compared) == 10_000
        scores(grader, texts[10_000:], ["1/2"])  # displaces 3/6, the one unused for longest
        scores(grader, texts[:2], ["1/2"] * 2)
        assert compared[10_000:] == ["10002/20004", "3/6"]


def test_a_remembered_time_out_is_counted_for_every_response(monkeypatch):
    def ask(worker, task):
        raise TimeoutError if task["answer"] == "2/4" else ChildProcessError

    monkeypatch.setattr(Worker, "ask", ask)
    with Grader("boxed") as grader:
        for _ in range(3):
            assert scores(grader, [boxed("2/4"), boxed("3/6")], ["1/2", "1/2"]) == [0.0, 0.0]
        assert (grader.timeouts, grader.errors) == (3, 3)


def test_cheap_decisions_ask_no_worker(monkeypatch):
    monkeypatch.setattr(Worker, "ask", lambda self, task: pytest.fail(str(task)))
    texts = ["no answer", boxed("12"), boxed("13"), boxed("\\dfrac 12"), boxed("")]
    texts += [boxed("10{,}000"), boxed("-0.0")]
    truths = ["12", "12", "12.0", "\\frac12", "12", "10000", "0"]
    hopeless = ["x+" * 600 + "1", "(" * 50 + "x" + ")" * 50, "9^{9^{9^9}}", "x^{99999}", "1" * 200]
    with Grader("boxed") as grader:
        assert scores(grader, texts, truths) == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
        assert not any(scores(grader, map(boxed, hopeless), ["y+1"] * 5))


def test_the_limits_of_what_a_parser_sees_are_exact():
    for length, decision in ((MAX_CHARS, None), (MAX_CHARS + 1, False)):
        assert equal_as_strings("x" * length, ("y",), "boxed") is decision
    nested = ["(" * depth + "x" + ")" * depth for depth in (MAX_NESTING, MAX_NESTING + 1)]
    assert [too_complex(text) for text in nested] == [False, True]
    assert [too_complex("1" * digits) for digits in (99, 100)] == [False, True]


def test_hash_needs_no_library():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['math_verify', 'sympy', 'torch']))\n"
        "from drgrpo.grade import Grader; grader = Grader('hash')\n"
        "print([grader.submit(text, '2').result() for text in ('1+1#2', '1#3', '2')])"
    )
    expected = [Grade(1.0, parsed=True), Grade(0.0, parsed=True), Grade(0.0, parsed=False)]
    run = run_python(code)
    assert run.stdout.strip() == str(expected), run


def test_a_worker_imports_no_torch():
    code = (
        "import sys; from drgrpo import answers, grade; grade.forbid_code()\n"
        "assert answers.equal_as_mathematics('2/4', ('1/2',), 'correct')\n"
        "print('torch' in sys.modules, 'sympy' in sys.modules)"
    )
    run = run_python(code)
    assert run.stdout.split() == ["False", "True"], run


def test_missing_math_verify_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        Grader("boxed")


def worker_that_runs(monkeypatch, code: str) -> None:
    """Replaces the worker's comparison of 2/4 and 1/2 by `code`."""
    fake = (
        "import os, sys, time; from drgrpo import grade; real = grade.equal_as_mathematics\n"
        "def compare(answer, truths, mode):\n"
        f"    if answer == '2/4' and truths != ('2/4',): {code}\n"
        "    return real(answer, truths, mode)\n"
        "grade.equal_as_mathematics = compare; grade.work(float(sys.argv[1]))"
    )
    monkeypatch.setattr(grade_module, "WORKER", (sys.executable, "-W", "ignore", "-c", fake))


@pytest.mark.parametrize(
    ("code", "timeouts", "errors"),
    [
        ("os._exit(3)", 0, 1),
        ("os.kill(os.getpid(), 9)", 0, 1),
        ("bytearray(4 << 30)", 0, 1),
        ("compare(answer, truths, mode)", 0, 1),
        ("time.sleep(60)", 1, 0),
        ("exec('while True: pass')", 1, 0),
        ("print('garbage')", 0, 0),
    ],
    ids=["exit", "killed", "memory", "recursion", "sleep", "loop", "prints"],
)
def test_a_worker_may_die_in_any_way(monkeypatch, code, timeouts, errors):
    worker_that_runs(monkeypatch, code)
    with Grader("boxed", workers=1, timeout_s=0.2) as grader:
        right = float(timeouts + errors == 0)
        assert scores(grader, [boxed("2/4"), boxed("3/6")], ["1/2", "1/2"]) == [right, 1.0]
        assert (grader.timeouts, grader.errors) == (timeouts, errors)


@pytest.mark.parametrize(
    ("code", "limit"), [("time.sleep(60)", "SIGALRM"), ("exec('while True: pass')", "SIGPROF")]
)
def test_both_clocks_are_limited(monkeypatch, code, limit):
    worker_that_runs(monkeypatch, code)
    with pytest.raises(TimeoutError, match=limit):
        task = {"answer": "2/4", "truths": ["1/2"], "mode": "correct"}
        Worker((*grade_module.WORKER, "0.2")).ask(task)


def test_a_worker_may_wait_for_its_next_answer_longer_than_the_limit():
    worker = Worker((*grade_module.WORKER, "0.05"))
    task = {"answer": "2/4", "truths": ["1/2"]}
    try:
        assert worker.ask(task | {"mode": "correct"})
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(timeout=0.7)  # the limit by the clock is 0.5 s
    finally:
        worker.stop()


def test_a_worker_that_cannot_start_is_fatal(monkeypatch):
    monkeypatch.setattr(grade_module, "WORKER", (sys.executable, "-c", "raise SystemExit(1)"))
    with Grader("boxed") as grader, pytest.raises(RuntimeError, match="did not start"):
        grader.submit(boxed("2/4"), "1/2").result()


def test_workers_do_not_outlive_the_trainer():
    code = (
        "import os, time; from drgrpo.grade import Grader\n"
        "grader = Grader('boxed', workers=2, timeout_s=2)\n"
        f"grader.submit({boxed('2/4')!r}, '1/2').result(); grader.submit({boxed(HUNG)!r}, 'x')\n"
        "time.sleep(0.7); pids = [w.process.pid for w in grader._pool.workers if w.process]\n"
        "print(*pids, flush=True)\n"
        "os._exit(1)"
    )
    run = run_python(code)
    pids = [int(pid) for pid in run.stdout.split()]
    assert pids, run
    deadline = time.monotonic() + 10
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, pids))


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_leaving_the_pool_stops_its_workers_at_once():
    with Grader("boxed", workers=2, timeout_s=30) as grader:
        grader.submit(boxed("2/4"), "1/2").result()
        for _ in range(3):
            grader.submit(boxed(HUNG), "x")
        start = time.monotonic()
        pids = [worker.process.pid for worker in grader._pool.workers if worker.process]
    assert time.monotonic() - start < 5
    assert pids and not any(map(running, pids))


def test_workers_are_replaced_after_a_while(monkeypatch):
    monkeypatch.setattr(workers_module, "TASKS_PER_WORKER", 2)
    pids = set()
    with Grader("boxed", workers=1) as grader:
        for i in range(2, 6):
            assert scores(grader, [boxed(f"{i}/{2 * i}")], ["1/2"]) == [1.0]
            pids.add(grader._pool.workers[0].process.pid)
    assert len(pids) == 2


# Hostile text.

CODE_IN_A_NAME = "\\sum_{n=0}^{\\infty} \\frac{1}{(1+n \\cdot x_{(a)if(exit(7))else(b)}) 2^n}"


@pytest.mark.parametrize("guard", ["names", "functions", "strings"])
def test_no_guard_against_code_is_alone(guard):
    """sympy pastes the name of a symbol into the source of a function to sum a series. Each guard
    holds by itself."""
    check = {
        "names": f"assert answers.math_verify()[0]({CODE_IN_A_NAME!r}) == []",
        "functions": "from sympy.parsing import sympy_parser; free = sympy_parser.eval_expr\n"
        "grade.forbid_code(); sympy_parser.eval_expr = free; answers.harmless = lambda name: True\n"
        f"assert answers.math_verify()[0]({CODE_IN_A_NAME!r})\n"
        f"answers.equal_as_mathematics({CODE_IN_A_NAME!r}, ('\\\\pi',), 'correct')",
        "strings": "grade.forbid_code(); import sympy\n"
        "assert sympy.sympify('12') == 12; assert sympy.Number('1.5')\n"
        "from sympy.physics import units; assert sympy.S('3/2') == sympy.Rational(3, 2)\n"
        "for text in ('exit(7)', 'x.args', '9**9', 'x(1)', '[x]', 'lambda: x'):\n"
        "    try: sympy.sympify(text)\n"
        "    except (PermissionError, sympy.SympifyError): continue\n"
        "    raise AssertionError(text)",
    }
    run = run_python("from drgrpo import answers, grade; " + check[guard], "-W", "ignore")
    assert run.returncode == 0, run


def test_the_attack_is_real():
    """The unguarded library runs the code. If this test fails, the guards above can go."""
    code = (
        "from drgrpo import answers; import sympy; answers.harmless = lambda expression: True\n"
        "parse, verify = answers.math_verify()\n"
        f"verify([sympy.pi], parse({CODE_IN_A_NAME!r}))"
    )
    run = run_python(code, "-W", "ignore")
    assert run.returncode == 7, run


def words(text: str) -> list[str]:
    return text.split()


ENDLESS = (HUNG, *words(r"99999999! ((((9!)!)!)!)! 10^{-10^{9}} (x+y+z)^{999}"))
ENDLESS += ("\\int_0^1 x^{x} dx",)
FRAGMENTS = [
    *words(r"9**9**9**9 9^{9^{9^{9}}} \binom{10^9}{10^8} 1e999999 \frac{ ^{9999}"),
    *("\\sqrt{" * 30, "{" * 500, "}" * 500, "(" * 300, "[" * 99 + "]" * 99, "\\left(" * 40),
    *("__import__('os').system('touch PWNED')", "lambda: 0", CODE_IN_A_NAME),
    *words(r"__class__.__mro__ eval(1) exec(exit(7)) x.__dict__ x_{(a)if(exit(7))else(b)}"),
    *words(r"\text{__import__} \operatorname{exit}(7) f_{\text{exit(7)}}(x)"),
    *("\x00", "\x07\x1b[2J", "\ud800", "\udfff\ud800", "\u202e", "\u2028", "\ufeff"),
    *("٣", "½", "∞", "𝟙", "\n", "\r\n", "\t", " or ", "\\lim_{x\\to 0} x^x", "\\text{ cm}"),
    *("\\sum_{n=1}^{\\infty} \\frac{1}{n^{n}}", "\\prod_{k=1}^{999999999} k"),
    *words(r"\begin{pmatrix}1&2\\3&4\end{pmatrix} \sin(\cos( x+y = < \in \cup , ; \pm"),
    *words(r"$ $$ \$ % \% ^\circ \boxed{ \boxed # ~ </answer> \\"),
    "</think> <answer>",
    *words(r"1 12 -3.5 1/2 x \pi e i 0 \frac{1}{2} 1,234 (1,2] \{1,2\} &"),
    *words(r"\begin{pmatrix} \text{ _{ ^ ! | : \dot \overline{ \log_ \cdot"),
]
NOISE = "\\\\{}{}()^_$#%,.0123456789abcdefxyz=+-*/<>!|[] \n'\"é½∞"


def hostile(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return "".join(rng.choices(NOISE, k=rng.randint(0, 30)))
    pieces = []
    for _ in range(rng.randint(1, 6)):
        pieces.append(rng.choice(FRAGMENTS) * rng.choice((1, 1, 1, 1, 2, 5)))
    if rng.random() < 0.005:
        pieces.insert(rng.randint(0, len(pieces)), rng.choice(ENDLESS))
    return "".join(pieces)


def test_fuzz_pool(tmp_path, monkeypatch):
    """No crash, no hang, no leak, no code run. Fragments hold "1/2", so that a few answers are
    right."""
    count = int(os.environ.get("DRGRPO_FUZZ", 150))
    monkeypatch.chdir(tmp_path)  # where PWNED would appear
    rng = random.Random(count)
    truths = ["\\frac{1}{2}", "x+y", "(1,2]", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"]
    truths += ["\\frac{\\pi^2}{6}", "5\n", "2^{2017}"]
    right = done = 0
    with Grader("boxed", timeout_s=0.25) as grader:
        while done < count:
            texts = [boxed(hostile(rng)) for _ in range(min(1000, count - done))]
            right += sum(scores(grader, texts, rng.choices(truths, k=len(texts))))
            done += len(texts)
            stopped = f"{grader.timeouts} timeouts, {grader.errors} errors"
            print(f"{done} inputs, {right:.0f} right, {stopped}", flush=True)
        assert scores(grader, [boxed("2/4")], ["1/2"]) == [1.0]
        pids = [worker.process.pid for worker in grader._pool.workers if worker.process]
    assert not any(map(running, pids))
    assert grader.errors == 0, "a worker may reach its time limit, and nothing here may crash it"
    assert right < done / 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["{" * 2_000_000, "\\boxed{" + "{" * 2_000_000, "\\boxed{" + "x+" * 1_000_000 + "}"]
)
def test_megabytes_are_no_work(text):
    start = time.process_time()
    with Grader("boxed") as grader:
        assert scores(grader, [text], ["12"]) == [0.0]
    assert time.process_time() - start < 5


@settings(max_examples=300, deadline=None)
@given(
    st.text()
    | st.text("\\{}$^_#%,.0123456789abx=()[] -+<>/\n")
    | st.lists(st.sampled_from(FRAGMENTS)).map("".join)
)
def test_fuzz_strings(text):
    for rule in RULES:
        extract(text, rule)
        extract(boxed(text), rule)
        extract(tagged(text), rule)
    equal = equal_as_strings(text, (text,), "boxed")
    assert equal == (normalize(text) != "") or len(text) > MAX_CHARS
    too_complex(text)


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_fuzz_integers(a, b):
    assert equal_as_strings(f"{a:,}", [str(b)], "boxed") == (a == b)
    assert equal_as_strings(f"{a}.0", [str(a)], "boxed")
    assert equal_as_strings(f"\\text{{{a}}}", [str(a)], "boxed")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name
)
def test_a_signal_to_the_whole_job_is_the_trainers(number):
    with Grader("boxed", workers=1) as grader:
        grader.submit(boxed("2/4"), "1/2").result()
        grader._pool.workers[0].process.send_signal(number)
        assert scores(grader, [boxed("3/6")], ["1/2"]) == [1.0]
        assert grader.errors == 0
