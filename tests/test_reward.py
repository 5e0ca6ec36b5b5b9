"""A reward is math, a user's function or a sum of both. A function's mistake is one line before
training, or costs its own value and nothing else."""

import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT
from drgrpo import reward as reward_module
from drgrpo.data import Columns, load_problems
from drgrpo.grade import Grader
from drgrpo.reward import Term, check, parse
from drgrpo.run.files import append_jsonl, read_jsonl
from drgrpo.types import Completion, Grade, Problem, Rollout, UserError
from runs import assert_close_run, assert_same_run, finish, launch, metrics, run, small
from test_grade import running

FUNCTIONS = """
import mmap, os, signal, subprocess, sys, time

ENDINGS = {
    "raise": lambda: 1 / 0,
    "exit": lambda: sys.exit(3),
    "os exit": lambda: os._exit(3),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "sleep": lambda: time.sleep(30) or 1,
    "loop": lambda: [None for i in iter(int, 1) if i],
    "memory": lambda: len(mmap.mmap(-1, 6 << 30)),
    "recursion": lambda: ENDINGS["recursion"](),
    "nan": lambda: float("nan"),
    "inf": lambda: float("-inf"),
    "str": lambda: "1.0",
    "none": lambda: None,
    "prints": lambda: print("5") or 4,
    "bool": lambda: True,
    "negative": lambda: -2.5,
}

def ends(response, *, problem, answer, finished, **columns):
    return ENDINGS[response]()

def length(response, *, problem, answer, finished, **columns):
    return len(response)

def sees(response, *, problem, answer, finished, **columns):
    assert columns == {"level": 3, "tests": ["a", "b"], "when": "2026-01-31"}, columns
    assert problem == "q" and answer == ["1", "2"] and finished is False
    return columns["level"]

def starts_a_child(response, *, problem, answer, finished, **columns):
    child = subprocess.Popen(["sleep", "300"])
    open(response, "w").write(str(child.pid))
    os._exit(1)

def odd(response, *, problem, answer, finished, **columns):
    return 0.5 * (len(response) % 2)

def fussy(response, *, problem, answer, finished, **columns):
    return 1 / (sum(map(ord, response)) % 3)
"""
FAILURES = ("raise", "exit", "os exit", "segfault", "sleep", "loop", "memory", "recursion")
FAILURES += ("nan", "inf", "str", "none")


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> str:
    """A file with reward functions."""
    path = tmp_path_factory.mktemp("functions") / "mine.py"
    path.write_text(FUNCTIONS)
    return str(path)


def rollout(text: str, answer="1", finished=True, **columns) -> Rollout:
    problem = Problem(0, "q", answer, columns=columns)
    return Rollout(problem, Completion([1], [0.0], finished), text)


def grades_of(reward: str, *rollouts: Rollout, timeout_s: float = 5.0) -> list[Grade]:
    with Grader("hash", workers=1, timeout_s=timeout_s, reward=reward) as grader:
        return [grade.result() for grade in list(map(grader.grade, rollouts))]


# ---- what --reward names


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("math", [Term(1.0, "math")]),
        ("my.py:f", [Term(1.0, "f", "my.py")]),
        ("math + 0.2*a/my.py:f", [Term(1.0, "math"), Term(0.2, "f", "a/my.py")]),
        ("0.5 * math+-1*my.py:f", [Term(0.5, "math"), Term(-1.0, "f", "my.py")]),
        ("a:b.py:f + my.py:g", [Term(1.0, "f", "a:b.py"), Term(1.0, "g", "my.py")]),
    ],
)
def test_a_sum_is_parsed(spec, terms):
    assert parse(spec) == terms


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' is neither math nor FILE.py:FUNCTION"),
        ("maths", "'maths' is neither math"),
        ("my.py", "'my.py' is neither"),
        ("my.py:", "'my.py:' is neither"),
        ("my.py:a b", "'my.py:a b' is neither"),
        ("my.txt:f", "'my.txt:f' is neither"),
        ("math - 0.2*my.py:f", "'math - 0.2*my.py:f' is neither"),
        ("nan*math", "'nan*math' is neither math nor .* with a finite weight"),
        ("math + math", "two components are called 'math'"),
        ("a.py:f + b.py:f", "two components are called 'f'"),
    ],
)
def test_what_is_no_sum_is_refused(spec, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*").replace(r".\*", ".*")):
        parse(spec)


# ---- mistakes in a file, before training


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\n\ny = 1 / 0", "line 3: ZeroDivisionError: division by zero"),
        ("def f(:", "line 1: SyntaxError: invalid syntax"),
        ("raise SystemExit(0)", "line 1: SystemExit: 0"),
        ("import os; os._exit(7)", "a worker did not start: status 7"),
        ("import time; time.sleep(60)", "a worker did not start: SIGALRM"),
        ("def ff(response, **columns): ...", "'f'; did you mean 'ff'"),
        ("from os.path import join\ndef ff(**columns): ...", "did you mean 'ff'? there are ff"),
        ("f = 3", "wrong.py holds no function"),
        ("def f(response): ...", r"f(response) must take (response, *, problem, answer,"),
        ("def f(response, *, problem, answer, finished): ...", "'other_column'"),
        ("def f(response, *, problem, answer, finished, level, **c): ...", "'level'"),
        ("def f(*, response, problem, answer, finished, **c): ...", "too many positional"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, monkeypatch, code, message):
    monkeypatch.setattr(reward_module, "START_SECONDS", 1.5 if "sleep" in code else 60.0)
    path = tmp_path / "wrong.py"
    path.write_text(code)
    with pytest.raises(UserError) as error:
        check(f"math + {path}:f")
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"there is no file no/such\.py"):
        check("no/such.py:f")


def test_a_right_file_passes_and_may_import_its_neighbour(tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 3")
    header = "(response, *, problem, answer, finished, **columns)"
    (tmp_path / "math.py").write_text(
        f"import math, neighbour; print('loaded')\n"
        f"def f{header}: return neighbour.VALUE + 0 * math.pi\n"
        f"class C:\n    def __call__(self, **k): ...\ng = lambda *a, **k: math.pi"
    )
    check(f"{tmp_path}/math.py:f + {tmp_path}/math.py:g")
    (grade,) = grades_of(f"{tmp_path}/math.py:f", rollout("x"))
    assert grade.reward == 3


@pytest.mark.parametrize(
    "command", ["train.py --recipe tiny", "eval.py --model m --benchmarks arithmetic"]
)
def test_both_commands_answer_before_torch_is_imported(functions, command):
    argv = [*command.split(), "--reward", f"{functions}:lenght"]
    code = (
        f"import runpy, sys; sys.argv = {argv}\n"
        f"try: runpy.run_path({argv[0]!r}, run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False\n", done
    assert "did you mean 'length'" in done.stderr and done.stderr.count("\n") == 1


# ---- what a function is given, and what its value becomes


def test_a_function_sees_the_problem_and_the_other_columns(functions):
    import datetime

    columns = {"level": 3, "tests": ["a", "b"], "when": datetime.date(2026, 1, 31)}
    asked = rollout("r", ["1", "2"], finished=False, response="hidden", problem="old", **columns)
    (grade,) = grades_of(f"{functions}:sees", asked)
    assert grade.reward == 3.0


def test_the_other_columns_are_those_beside_question_and_answer(tmp_path):
    rows = [{"id": 7, "question": "1+1", "final": "2", "level": 3, "tests": ["a"]}]
    append_jsonl(tmp_path / "set.jsonl", rows)
    (problem,) = load_problems(str(tmp_path / "set.jsonl"), Columns(("question",), "final"))
    assert problem.columns == {"id": 7, "level": 3, "tests": ["a"]}


def test_a_sum_weighs_its_components(functions):
    right, cut, wrong = rollout("#1"), rollout("#1", finished=False), rollout("#22")
    grades = grades_of(f"2*math + 0.5*{functions}:length + -1*{functions}:odd", right, cut, wrong)
    assert [grade.reward for grade in grades] == [2 + 1, 0 + 1, 1.5 - 0.5]
    assert [grade.score for grade in grades] == [1, 1, 0]
    assert grades[1].components == {"math": 0.0, "length": 2.0, "odd": 0.0}


def test_math_alone_is_the_papers_reward():
    texts = (rollout("#1"), rollout("#1", finished=False), rollout("#2"), rollout("1"))
    grades = grades_of("math", *texts)
    assert [grade.reward for grade in grades] == [1.0, 0.0, 0.0, 0.0]
    assert [grade.parsed for grade in grades] == [True, True, True, False]


@pytest.mark.parametrize("ending", FAILURES)
def test_a_failure_costs_its_own_value(functions, ending, capsys):
    texts = [rollout("#1"), rollout(ending), rollout("negative")]
    grades = grades_of(f"math + {functions}:ends", *texts, timeout_s=0.3)
    assert [grade.components["ends"] for grade in grades] == [None, None, -2.5]
    assert [grade.reward for grade in grades] == [1.0, 0.0, -2.5], "math counts all the same"


@pytest.mark.parametrize(("ending", "value"), [("prints", 4.0), ("bool", 1.0), ("negative", -2.5)])
def test_any_finite_number_is_a_reward(functions, ending, value):
    (grade,) = grades_of(f"{functions}:ends", rollout(ending))
    assert grade.reward == value and math.isfinite(grade.reward)


def test_the_first_traceback_is_shown_once(functions, capfd):
    texts = [rollout(ending) for ending in ("raise", "raise", "nan", "os exit")]
    grades_of(f"{functions}:ends", *texts)
    shown = capfd.readouterr().err
    assert shown.count("ZeroDivisionError") == 1 and "mine.py" in shown and "'raise'" in shown
    assert shown.count("Traceback") == 1 and "nan" not in shown


def test_an_exit_has_a_traceback_and_the_worker_lives_on(functions, capfd):
    with Grader("hash", workers=1, reward=f"{functions}:ends") as grader:
        pids = set()
        for ending in ("exit", "raise", "negative"):
            grader.grade(rollout(ending)).result()
            pids |= {w.process.pid for w in grader.reward._pools["ends"].workers}
    assert len(pids) == 1 and "SystemExit: 3" in capfd.readouterr().err


def test_a_hang_says_which_limit_it_met(functions, capfd):
    grades_of(f"{functions}:ends", rollout("loop"), timeout_s=0.3)
    assert "limit of time (SIGPROF)" in capfd.readouterr().err


def test_what_a_function_has_started_dies_with_its_worker(functions, tmp_path):
    grades_of(f"{functions}:starts_a_child", rollout(str(tmp_path / "pid")))
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(child)


# ---- training


def mine(functions: str) -> str:
    return f"math + 0.5*{functions}:odd + {functions}:fussy"


@pytest.fixture(scope="module")
def trained(warm_model, functions, tmp_path_factory):
    """(folder, metrics) of a run with a reward of three components, one of which may fail."""
    out = tmp_path_factory.mktemp("runs") / "rewarded"
    config = small(warm_model, out, reward=mine(functions), save_every=1, eval_data="")
    return config, run(config)


def test_training_uses_and_logs_every_component(trained):
    config, rows = trained
    for row in rows:
        total = row["reward/math"] + 0.5 * row["reward/odd"] + row["reward/fussy"]
        assert row["reward_mean"] == pytest.approx(total)
        assert 0 < row["reward/odd"] < 0.5 and row["reward_error"] > 0
        assert row["accuracy"] >= row["reward/math"] and row["no_answer_frac"] < 1
    for row in read_jsonl(Path(config.out) / "samples.jsonl"):
        odd, parts = 0.5 * (len(row["response"]) % 2), row["components"]
        fussy = sum(map(ord, row["response"])) % 3
        assert parts["odd"] == odd and parts["fussy"] == (1 / fussy if fussy else None)
        assert row["reward"] == parts["math"] + 0.5 * odd + (parts["fussy"] or 0)


def test_an_evaluation_during_training_reports_the_reward(warm_model, functions, tmp_path, capsys):
    reward = f"math + {functions}:odd"
    run(small(warm_model, tmp_path / "run", reward=reward, steps=1, eval_samples=0))
    shown = capsys.readouterr().out
    for row in read_jsonl(tmp_path / "run" / "eval.jsonl"):
        assert row["reward"] == pytest.approx(row["reward/math"] + row["reward/odd"])
        assert row["reward_errors"] == 0 < row["accuracy"] < row["reward"]
        assert f"accuracy {row['accuracy']:.3f}  reward {row['reward']:.3f}" in shown


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(trained, tmp_path):
    config, _ = trained
    first = replace(config, out=str(tmp_path / "resumed"), steps=1)
    run(first)
    run(replace(first, steps=2))
    assert [row["step"] for row in metrics(first.out)] == [1, 2]
    (tmp_path / "resumed" / "eval.jsonl").write_text("")
    assert_same_run(Path(config.out), tmp_path / "resumed")


@pytest.mark.slow
def test_two_processes_give_the_same_rewards(trained, tmp_path):
    config, rows = trained
    two = replace(config, out=str(tmp_path / "two"))
    finish(launch(two, processes=2))
    assert_close_run(Path(config.out), tmp_path / "two")
    names = ("reward/math", "reward/odd", "reward/fussy", "reward_error", "accuracy")
    for ours, theirs in zip(rows, metrics(two.out), strict=True):
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names})
