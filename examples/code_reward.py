"""Unit tests of generated Python as a reward, for data whose answers are lists of assertions.

    python train.py --recipe oat_zero_1_5b --train-data mbpp.jsonl --problem-field text \\
        --answer-field test_list --reward examples/code_reward.py:passes_tests

The code runs in a child process: `python -I` in an empty folder, without the environment's
variables, with limits of CPU time, memory, file size, processes and time by the clock. Where
`unshare` may make namespaces, the child has no network and sees no other process.

This protects from accidents, not from attacks. The code can read every file that you can, and
change those that you may change. As root the limit of processes does not hold. Code that inspects
its caller or overloads `==` can pass tests that it does not solve. Run the trainer in a container
if that matters.
"""

import functools
import json
import re
import secrets
import subprocess
import sys
import tempfile
from typing import Any

CLOCK_SECONDS = 5.0
NAMESPACES = (
    *("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
    "--mount-proc",
)

HARNESS = """
import json, os, resource, sys
task = json.load(sys.stdin)
limits = {"CPU": 2, "AS": 1 << 30, "FSIZE": 1 << 20, "NPROC": 0, "CORE": 0}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
reply, names, passed = os.dup(1), {"__name__": "generated"}, 0
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
try:
    exec(task["code"], names)
    for test in task["tests"]:
        try:
            exec(test, names)
            passed += 1
        except Exception:
            pass
except BaseException:
    passed = 0
os.write(reply, f"{task['password']} {passed}".encode())
"""
"""Runs the code and then each test. The password shows that the end was reached, and not an exit
of the code."""


def passes_tests(
    response: str, *, problem: str, answer: Any, finished: bool, **columns: Any
) -> float:
    """The share of the tests in `answer` that the response's last block of code passes."""
    tests = answer if isinstance(answer, list) else [answer]
    blocks = re.findall(r"```(?:python|py)?\n(.*?)```", response, re.DOTALL)
    return run_tests(blocks[-1], tests) / len(tests) if blocks else 0.0


def run_tests(code: str, tests: list[str]) -> int:
    """How many tests pass."""
    password = secrets.token_hex(16)
    task = json.dumps({"code": code, "tests": tests, "password": password})
    with tempfile.TemporaryDirectory() as folder:
        try:
            child = subprocess.run(
                [*sandbox(), sys.executable, "-I", "-c", HARNESS],
                input=task.encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=CLOCK_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return 0
    reply = child.stdout.decode(errors="replace").split()
    return int(reply[1]) if len(reply) == 2 and reply[0] == password else 0


@functools.cache
def sandbox() -> tuple[str, ...]:
    """What goes before the command: new namespaces, or nothing where they are not allowed."""
    try:
        allowed = not subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode
    except FileNotFoundError:
        allowed = False
    if not allowed:
        print("code_reward: unshare is not allowed, so the code has a network", file=sys.stderr)
    return NAMESPACES if allowed else ()
