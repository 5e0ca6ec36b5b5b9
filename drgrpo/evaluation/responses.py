"""responses.jsonl: one line per response, from which every table, comparison and analysis is
computed.

    benchmark  template  temperature  id  sample     which response this is; `id` is the problem's row in its benchmark
    problem  answer  response                        the question, its ground truth and what the model wrote
    score  parsed  vote                              the grade; the first sample with an equal answer (None: no answer)
    tokens  finished                                 length, the end token included; False if it hit the limit

A prompt too long for the model has rows too, with `response` None and score 0. The file is appended
as batches finish, and `eval.json` beside it holds the settings that produced it, so that an
interrupted evaluation can go on.
"""

import json
import os
from collections import Counter
from pathlib import Path

from drgrpo.evaluation.scores import by_problem
from drgrpo.types import Problem, UserError

COLUMNS = (
    "benchmark",
    "template",
    "temperature",
    "id",
    "sample",
    "problem",
    "answer",
    "response",
    "score",
    "parsed",
    "vote",
    "tokens",
    "finished",
)


def too_long(problem: Problem, samples: int) -> list[dict]:
    """The rows of a problem whose prompt does not fit."""
    blank = {
        "id": problem.id,
        "problem": problem.question,
        "answer": problem.answer,
        "response": None,
        "score": 0.0,
        "parsed": False,
        "vote": None,
        "tokens": 0,
        "finished": False,
    }
    return [blank | {"sample": k} for k in range(samples)]


def key(row: dict) -> tuple:
    """Of the problem under its template and temperature: what is answered, and resumed, as one."""
    return row["template"], row["temperature"], row["benchmark"], row["id"]


def claim(out: Path, asked: dict, free: set[str]) -> tuple[list[dict], dict]:
    """The rows that are in OUT already and were produced by these settings and versions, and their
    `eval.json`. Half a problem at the end of the file, left by an interruption, is cut off.
    UserError if other settings than `free` ones differ."""
    path, report = out / "responses.jsonl", out / "eval.json"
    if not path.exists() or not path.stat().st_size:
        return [], {}
    if not report.exists():
        raise UserError(
            f"{out} holds responses.jsonl without the eval.json that says what they answer; choose another --out"
        )
    there = json.loads(report.read_text())
    changed = [
        f"{name} is {show(there.get(part, {}).get(name))} there and {show(value)} now"
        for part in ("settings", "versions")
        for name, value in asked[part].items()
        if name not in free and there.get(part, {}).get(name) != value
    ]
    if changed:
        raise UserError(
            f"{out} holds responses to other settings: {'; '.join(changed)}. Choose another --out, or delete it"
        )
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    count = Counter(map(key, rows))
    whole = [count[key(row)] == asked["settings"]["samples"] for row in rows]
    kept = b"".join(line for line, keep in zip(lines, whole, strict=True) if keep)
    if kept != text:
        replace_file(path, kept)
    return [row for row, keep in zip(rows, whole, strict=True) if keep], there


def show(value) -> str:
    """Short enough for a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read(path: str | Path) -> list[dict]:
    """The rows of a file, or of the run folder that holds it."""
    path = Path(path) / "responses.jsonl" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(
            f"no responses at {path}; name a responses.jsonl that eval.py wrote, or its folder"
        )
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: broken JSON: {error}; was eval.py interrupted? The same call goes on, and mends it"
            ) from error
        if not isinstance(row, dict) or (missing := [c for c in COLUMNS if c not in row]):
            missing = missing if isinstance(row, dict) else COLUMNS
            raise UserError(
                f"{path}:{number} lacks {', '.join(missing)}; this takes files that eval.py wrote"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty: no response to read")
    return rows


def folder(path: str | Path) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent


def recorded(path: str | Path) -> dict:
    """The `eval.json` beside these responses; empty if there is none."""
    file = folder(path) / "eval.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def evaluations(rows: list[dict]) -> dict[tuple[str, float], dict[str, list[dict]]]:
    """(template, temperature) -> benchmark -> rows, in the order of the file."""
    parts: dict[tuple[str, float], dict[str, list[dict]]] = {}
    for row in rows:
        parts.setdefault((row["template"], row["temperature"]), {}).setdefault(
            row["benchmark"], []
        ).append(row)
    return parts


def groups(rows: list[dict]) -> list[list[dict]]:
    """The samples of each problem of each evaluation and benchmark."""
    return [
        g
        for sets in evaluations(rows).values()
        for part in sets.values()
        for g in by_problem(part).values()
    ]


def write_json(path: Path, value: dict) -> None:
    """Whole or not at all."""
    replace_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
