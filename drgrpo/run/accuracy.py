"""Accuracy before and after training, as the cells of a table."""

from typing import Any

from drgrpo.run.log import number

HEADINGS = (
    *("benchmark", "sampling", "when", "accuracy", "95% interval"),
    *("len right", "len wrong", "cut"),
)


def before_and_after(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The first and the last evaluation of every benchmark, from the rows of eval.jsonl. Rows of an
    older version have no interval."""
    evaluations: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["benchmark"], row["temperature"], row["samples"])
        evaluations.setdefault(key, []).append(row)
    cells = []
    for (benchmark, _, _), history in evaluations.items():
        for row in history[:1] + history[1:][-1:]:  # there may be one only
            when = f"step {row['step']}" if row["step"] else "before"
            interval = " to ".join(f"{bound:.3f}" for bound in row.get("interval", ())) or "-"
            lengths = number(row["len_correct"]), number(row["len_incorrect"])
            cut = number(row["truncated_frac"], ".1%")
            accuracy = f"{row['accuracy']:.3f}"
            cells.append([benchmark, sampling(row), when, accuracy, interval, *lengths, cut])
    return cells


def sampling(row: dict[str, Any]) -> str:
    """How an evaluation sampled, in words."""
    if row["temperature"] == 0:
        return "greedy"
    return f"T={row['temperature']:g}, {row['samples']} each"
