"""responses.jsonl: one line per response. Every table, comparison and analysis is computed from it.

    benchmark  template  temperature  id  sample     which response this is
    problem  answer  response                        question, ground truth, what the model wrote
    score  parsed  vote                              the grade, and the majority vote
    tokens  finished                                 length with the end token; False at the limit

With `--reward`, `reward` and its `components` come on top.

`id` is the problem's row in its benchmark. `vote` is the first sample of the problem with an equal
answer, or None without an answer. A prompt too long for the model has rows too, with `response`
None and score 0. The file grows as batches finish. `eval.json` beside it holds the settings that
produced it, so that an interrupted evaluation can continue.
"""

import json
from collections import Counter
from itertools import compress
from pathlib import Path
from typing import Any

from drgrpo.evaluation.scores import by_problem
from drgrpo.run.files import read_object, write_atomically
from drgrpo.types import Problem, UserError, parse_json

NUMBER = int | float
COLUMNS: dict[str, Any] = {
    **{"benchmark": str, "template": str, "temperature": NUMBER, "id": int, "sample": int},
    **{"problem": str, "answer": object, "response": str | None, "score": NUMBER},
    **{"parsed": bool, "vote": object, "tokens": int, "finished": bool},
}


def too_long(problem: Problem, samples: int) -> list[dict]:
    """The rows of a problem whose prompt does not fit."""
    question = {"id": problem.id, "problem": problem.question, "answer": problem.answer}
    nothing = {"response": None, "score": 0.0, "parsed": False, "vote": None, "tokens": 0}
    return [question | nothing | {"finished": False, "sample": k} for k in range(samples)]


def key(row: dict) -> tuple[str, float, str, int]:
    """The problem of a row, under its template and temperature: what is resumed as one."""
    return row["template"], row["temperature"], row["benchmark"], row["id"]


# ---- an interrupted evaluation


def resume_rows(out: Path, report: dict, may_change: set[str]) -> tuple[list[dict], dict]:
    """The rows that OUT holds already, and their `eval.json`.

    Rows of an incomplete problem at the end of the file are cut off. UserError if the rows come
    from other settings or versions than those of `report`, except for the fields in
    `may_change`."""
    path, report_path = out / "responses.jsonl", out / "eval.json"
    if not path.exists() or not path.stat().st_size:
        return [], {}
    if not report_path.exists():
        raise UserError(
            f"{out} holds responses.jsonl without the eval.json that tells their settings; "
            "choose another --out"
        )
    saved = read_object(report_path)
    changed = changes(saved.get("settings", {}), report["settings"], may_change)
    changed += changes(saved.get("versions", {}), report["versions"], may_change)
    if changed:
        raise UserError(
            f"{out} holds responses to other settings: {'; '.join(changed)}. "
            "Choose another --out, or delete it"
        )
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    samples = Counter(map(key, rows))
    complete = [samples[key(row)] == report["settings"]["samples"] for row in rows]
    kept = b"".join(compress(lines, complete))
    if kept != content:
        write_atomically(path, kept)
    return list(compress(rows, complete)), saved


def changes(saved: dict, now: dict, may_change: set[str]) -> list[str]:
    """The differences, in words."""
    return [
        f"{name} is {shorten(saved.get(name))} there and {shorten(value)} now"
        for name, value in now.items()
        if name not in may_change and saved.get(name) != value
    ]


def shorten(value: Any) -> str:
    """A value, short enough for a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- a complete evaluation


def find(path: str | Path) -> Path:
    """The file at `path`, or in the run folder at `path`. UserError if there is none."""
    file = Path(path) / "responses.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(
            f"no responses at {file}; name a responses.jsonl that eval.py wrote, or its folder"
        )
    return file


def read(path: str | Path) -> list[dict]:
    """The rows of a file, or of the run folder that holds it. UserError for a file that is not
    whole or that eval.py did not write."""
    path, rows = find(path), []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: broken JSON: {error}; if eval.py was interrupted, the same call "
                "continues and mends the file"
            ) from error
        missing = [name for name in COLUMNS if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(
                f"{path}:{number} lacks {', '.join(missing)}; this takes files that eval.py wrote"
            )
        wrong = [name for name, kind in COLUMNS.items() if not isinstance(row[name], kind)]
        if wrong:
            raise UserError(
                f"{path}:{number} has {shorten(row[wrong[0]])} for {wrong[0]}; this takes files "
                "that eval.py wrote"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty: no response to read")
    return rows


def recorded(path: str | Path) -> dict:
    """The `eval.json` beside these responses; empty if there is none."""
    file = find(path).parent / "eval.json"
    return read_object(file) if file.is_file() else {}


def evaluations(rows: list[dict]) -> dict[tuple[str, float], dict[str, list[dict]]]:
    """(template, temperature) -> benchmark -> rows, in the order of the file."""
    parts: dict[tuple[str, float], dict[str, list[dict]]] = {}
    for row in rows:
        sets = parts.setdefault((row["template"], row["temperature"]), {})
        sets.setdefault(row["benchmark"], []).append(row)
    return parts


def groups(rows: list[dict]) -> list[list[dict]]:
    """The samples of each problem of each evaluation and benchmark."""
    return [
        group
        for sets in evaluations(rows).values()
        for benchmark in sets.values()
        for group in by_problem(benchmark).values()
    ]
