"""Rewards: the sum that `--reward` names.

    math                               1 for a right answer, 0 for a wrong one, 0 if truncated
    my.py:function                     a function of yours
    math + 0.2*my.py:function          a weighted sum

    def function(response: str, *, problem: str, answer, finished: bool, **columns) -> float

`columns` are the other columns of the problem's row. `finished` is False for a truncated response.
Any finite number is a reward. The function runs in processes of its own while the model samples
(`drgrpo/workers.py`). An exception, a hang or a crash costs this one value, which counts as 0.

Nothing here imports torch, so that a mistake in a function is answered at once.
"""

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drgrpo.types import Grade, Rollout, UserError, check_name
from drgrpo.workers import Pool, Worker, serve

MEMORY = 4 << 30  # bytes of address space of a process that runs a function
START_SECONDS = 60.0  # for the imports of a function's file
LARGEST = 1e30  # what float32 can still average and square
SIGNATURE = "(response, *, problem, answer, finished, **columns)"


@dataclass(frozen=True, slots=True)
class Term:
    """One component of a reward. `file` is empty for `math`."""

    weight: float
    name: str
    file: str = ""

    def command(self, timeout_s: float) -> tuple[str, ...]:
        """What starts a worker that calls the function."""
        limits = (str(timeout_s), str(START_SECONDS))
        return (sys.executable, "-m", "drgrpo.reward", self.file, self.name, *limits)


def parse(spec: str) -> list[Term]:
    """The components of a reward. UserError for anything but `[WEIGHT*]WHAT + ...`, with `math` or
    FILE.py:FUNCTION for WHAT."""
    terms = [_parse_term(text.strip()) for text in spec.split("+")]
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--reward {spec}: two components are called {name!r}; rename one")
    return terms


def _parse_term(text: str) -> Term:
    factor, _, what = text.rpartition("*")
    file, _, name = what.strip().rpartition(":")
    try:
        weight = float(factor) if factor else 1.0
    except ValueError:
        weight = math.nan
    known = name == "math" if not file else file.endswith(".py") and name.isidentifier()
    if not known or not math.isfinite(weight):
        raise UserError(
            f"--reward: {text!r} is neither math nor FILE.py:FUNCTION, nor one of them with a "
            "finite weight, as 0.2*FILE.py:FUNCTION; + joins several"
        )
    return Term(weight, name, file)


def check(spec: str, timeout_s: float = 5.0) -> None:
    """UserError unless the workers of every component can start."""
    for term in parse(spec):
        if not term.file:
            continue
        worker = Worker(term.command(timeout_s))
        try:
            worker.start()
        except RuntimeError as error:
            raise UserError(f"--reward {term.file}:{term.name}: {error}") from error
        finally:
            worker.stop()


class Reward:
    """Adds up the components of a reward. Their functions run in worker processes.

    timeout_s: CPU time of a call in seconds. workers: processes of each function."""

    def __init__(self, spec: str, workers: int, timeout_s: float) -> None:
        self.terms = parse(spec)
        self._pools = {t.name: Pool(t.command(timeout_s), workers) for t in self.terms if t.file}
        self._failed: set[str] = set()

    def start(self, rollout: Rollout) -> dict[str, Future[dict]]:
        """Call every function."""
        problem = rollout.problem
        columns = {name: cell for name, cell in problem.columns.items() if name != "response"}
        columns |= {"problem": problem.question, "answer": problem.answer}
        columns["finished"] = rollout.completion.finished
        task = {"response": rollout.text, "columns": columns}
        return {name: pool.submit(task) for name, pool in self._pools.items()}

    def add(self, grade: Grade, calls: dict[str, Future[dict]], rollout: Rollout) -> Grade:
        """The grade with the components and their sum. A function that fails is None there and
        counts as 0."""
        values: dict[str, float | None] = {"math": grade.score * rollout.completion.finished}
        values |= {name: self._value(name, call, rollout.text) for name, call in calls.items()}
        total = sum(term.weight * (values[term.name] or 0.0) for term in self.terms)
        components = {term.name: values[term.name] for term in self.terms}
        return replace(grade, reward=total, components=components)

    def _value(self, name: str, call: Future[dict], response: str) -> float | None:
        """What a call gave. A function's first failure is shown."""
        try:
            reply = call.result()
        except (TimeoutError, ChildProcessError) as error:
            reply = {"error": str(error)}
        if "error" in reply and name not in self._failed:
            self._failed.add(name)
            shown = f"the reward function {name} failed on {response[:500]!r}:\n{reply['error']}"
            print(
                f"{shown}\nThis failure counts as 0. Further ones are only counted.",
                file=sys.stderr,
            )
        return reply.get("value")

    def close(self) -> None:
        """End the workers."""
        for pool in self._pools.values():
            pool.close()


# ---- the worker process


def load(file: str, name: str) -> Callable[..., Any]:
    """The function in the file. UserError if it cannot be imported, is missing or takes other
    arguments."""
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(f"there is no file {file}")
    sys.path.insert(0, str(path.parent))  # as `python FILE` has it
    spec = importlib.util.spec_from_file_location("reward_file", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # sys.exit too
        raise UserError(f"{file} cannot be imported: {_where(error, str(path))}") from error
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    if not functions:
        raise UserError(f"{file} holds no function")
    if name not in functions:  # what the file imports may be a reward, and is not offered
        own = [key for key, value in functions.items() if value.__module__ == spec.name]
        check_name(f"function of {file}:", name, own or functions)
    signature = inspect.signature(functions[name])
    try:
        signature.bind("", problem="", answer="", finished=True, other_column="")
    except TypeError as error:
        raise UserError(f"{name}{signature} must take {SIGNATURE}: {error}") from error
    return functions[name]


def _where(error: BaseException, path: str) -> str:
    """The error, with the line of the file where it happened."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    line = frames[-1].lineno if frames else getattr(error, "lineno", None)
    message = traceback.format_exception_only(error)[-1].strip()
    return f"line {line}: {message}" if line else message


def call(function: Callable[..., Any], response: str, columns: dict[str, Any]) -> dict[str, Any]:
    """{"value": the function's number}, or {"error": a traceback} if it gives none."""
    try:
        value = function(response, **columns)
        number = math.nan if isinstance(value, str | bytes) else float(value)
        if not abs(number) < LARGEST:
            raise ValueError(f"returned {value!r}; a reward is a finite number below {LARGEST:g}")
        return {"value": number}
    except BaseException:  # sys.exit too
        return {"error": traceback.format_exc()[-4000:]}


def work(file: str, name: str, timeout_s: float, start_s: float) -> None:
    """Call the function for whatever stdin asks."""

    def prepare() -> Callable[..., Any]:
        function = load(file, name)
        return lambda response, columns: call(function, response, columns)

    serve(prepare, timeout_s, MEMORY, start_s)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
