"""Files of a run: JSON lines, and writes that are complete or absent."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from drgrpo.types import UserError, parse_json


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, so that a kill leaves the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """One indented JSON value, in one step. ValueError for NaN and infinity."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_object(path: Path) -> dict:
    """The JSON object in a file. UserError if it holds something else."""
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON: {error}; restore the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line, at the end of the file. ValueError for NaN and infinity."""
    with open(path, "a") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def read_jsonl(path: str | Path) -> list[dict]:
    """Every line. The last one is left out if a kill tore it off, or if it is being written."""
    *lines, last = Path(path).read_text().split("\n")
    rows = [json.loads(line) for line in lines]
    with suppress(json.JSONDecodeError):
        rows.append(json.loads(last))
    return rows
