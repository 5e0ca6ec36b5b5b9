"""One page about a run, from its records alone: `python -m drgrpo.run.report runs/tiny`.

The page is OUT/report.html. It needs no other file and makes no request. A run writes it with each
checkpoint. What a model wrote is hostile input. It reaches the page as text, and a policy in the
page lets no other script run than the page's own.
"""

import json
import re
import secrets
import sys
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

from jinja2 import Environment, FileSystemLoader

from drgrpo.run.accuracy import HEADINGS, before_and_after, sampling
from drgrpo.run.cli import user_errors
from drgrpo.run.files import read_jsonl, write_atomically
from drgrpo.run.folder import changed_settings
from drgrpo.run.log import Log, number
from drgrpo.run.plot import PHASES
from drgrpo.types import UserError

Row = dict[str, Any]

MEGABYTES = 8  # of samples in the page, so that a phone opens it
SAMPLES_SHOWN = 8  # of a step, if it has so many

CHARTS = {
    "Reward": {"reward_mean": "mean of the responses"},
    "Response length, tokens": {"response_len_incorrect": "wrong", "response_len_correct": "right"},
    "Shares of the responses": {
        "truncated_frac": "truncated",
        "zero_adv_frac": "without advantage",
        "no_answer_frac": "without an answer",
    },
    "Entropy, nats a token": {"entropy": "of the sampled tokens"},
    "Gradient norm": {"grad_norm": "before clipping"},
    "Tokens at the clip, share": {"clip_frac": "of the response tokens"},
    "Trainer and sampler differ by, nats": {"parity_mean": "mean of a token"},
    "Sampled tokens per second": {"tokens_per_s": "of the whole step"},
}
"""Title of a chart -> columns of metrics.jsonl -> their names in the chart."""


def refresh(log: Log) -> None:
    """Write the page of a run that goes on. For rank 0. A failure is logged, since the run counts
    for more than the page."""
    try:
        write(log.out)
    except Exception as error:
        log.say(f"WARNING: no report.html ({type(error).__name__}: {error}); the run goes on")


def write(out: str | Path) -> Path:
    """Write the page. Returns its path. UserError if `out` holds no run."""
    out = Path(out)
    if not (out / "config.json").is_file():
        raise UserError(f"{out} holds no config.json; name the --out folder of a run")
    write_atomically(out / "report.html", render(out))
    return out / "report.html"


def render(out: Path) -> str:
    settings = json.loads((out / "config.json").read_text())
    rows, evals = read_jsonl(out / "metrics.jsonl"), read_jsonl(out / "eval.jsonl")
    shown, steps = choose_samples(out / "samples.jsonl")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=visible
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template("report.html.jinja").render(
        nonce=secrets.token_urlsafe(16),  # a response cannot know it
        out=str(out),
        settings=settings,
        changed=changed_settings(settings),
        step=rows[-1]["step"] if rows else 0,
        hours=number(rows[-1]["hours_used"] if rows else None, ".2f"),
        starts=json.loads((out / "run.json").read_text()),
        headings=HEADINGS,
        scores=before_and_after(evals),
        phases=phase_cells(rows),
        steps_sampled=steps,
        samples_shown=SAMPLES_SHOWN,
        data={"charts": [*charts(rows, evals), time_chart(rows)], "samples": shown},
    )


def visible(value: Any) -> Any:
    """A text in which every character can be seen: control characters, marks that change the
    direction of text, and halves of surrogate pairs show as their code. Other values stay."""
    if not isinstance(value, str) or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else f"⟨U+{ord(c):04X}⟩" for c in value)


# ---- charts and phases


def charts(rows: list[Row], evals: list[Row]) -> list[Row]:
    """Titles, and lines of [step, value] or [step, value, low, high]."""
    found = [chart(title, rows, names) for title, names in CHARTS.items()]
    found.insert(1, {"title": "Accuracy on problems held out", "lines": accuracy_lines(evals)})
    return [each for each in found if each["lines"]]


def chart(title: str, rows: list[Row], names: dict[str, str]) -> Row:
    lines = []
    for column, name in names.items():
        points = [[row["step"], row[column]] for row in rows if row.get(column) is not None]
        lines += [{"name": name, "points": points}] if points else []
    return {"title": title, "lines": lines}


def accuracy_lines(evals: list[Row]) -> list[Row]:
    """One line for each benchmark and way to sample, with its intervals."""
    lines: dict[str, list[list[float]]] = {}
    for row in evals:
        point = [row["step"], row["accuracy"], *row.get("interval", ())]
        lines.setdefault(f"{row['benchmark']}, {sampling(row)}", []).append(point)
    return [{"name": name, "points": points} for name, points in lines.items()]


def time_chart(rows: list[Row]) -> Row:
    """Seconds of a step, one phase upon the other."""
    lines = []
    for phase in phases_of(rows):
        points = [[row["step"], row["seconds"].get(phase, 0.0)] for row in rows]
        lines.append({"name": phase, "points": points})
    return {"title": "Seconds of a step by phase", "lines": lines, "stacked": True}


def phases_of(rows: list[Row]) -> list[str]:
    """The phases that took any time."""

    def took_time(phase: str) -> bool:
        return any(row["seconds"].get(phase) for row in rows)

    return list(filter(took_time, PHASES))


def phase_cells(rows: list[Row]) -> list[list[str]]:
    """Phase, mean seconds of a step, share of the time, most memory in use at its end."""
    whole, cells = sum(row["seconds"]["total"] for row in rows), []
    for phase in phases_of(rows):
        seconds = [row["seconds"].get(phase, 0.0) for row in rows]
        most = max(row["gb"].get(phase, 0.0) for row in rows)
        share = f"{sum(seconds) / whole:.1%}"
        cells.append([phase, f"{fmean(seconds):.3f}", share, f"{most:.2f}"])
    return cells


# ---- samples


def choose_samples(path: Path) -> tuple[list[Row], int]:
    """The samples of the page, and of how many steps there are any. Rows of an older version have
    no tokens and are left out.

    Small files go in with every step. Of larger ones as many steps go in as MEGABYTES hold, evenly
    spaced, the first and the last among them. Only their lines are kept and parsed, because the
    file of a long run has hundreds of megabytes."""
    starts: dict[int, list[int]] = {}  # step -> where its lines start in the file
    position = count = 0
    with open(path, "rb") as file:
        for line in file:
            match = re.match(rb'\{"step": (\d+)', line)
            if match and line.endswith(b"\n"):  # the run may be writing the last one
                starts.setdefault(int(match[1]), []).append(position)
                count += 1
            position += len(line)
        bytes_of_step = SAMPLES_SHOWN * position / max(1, count)
        room = max(2, int(MEGABYTES * 1e6 / max(1, bytes_of_step)))
        shown = []
        for step in evenly_spaced(list(starts), room):
            rows = [json.loads(line_at(file, start)) for start in starts[step]]
            shown += [sample(row) for row in mixed(rows) if "pieces" in row]
    return shown, len(starts)


def line_at(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.readline()


def evenly_spaced(items: list[int], count: int) -> list[int]:
    """At most `count` items, the first and the last among them. `count` is 2 or more."""
    if len(items) <= count:
        return items
    last = len(items) - 1
    return [items[round(i * last / (count - 1))] for i in range(count)]


def mixed(rows: list[Row]) -> list[Row]:
    """At most SAMPLES_SHOWN rows, right and wrong ones by turns as long as there are both."""
    right = [row for row in rows if row.get("right")]
    wrong = [row for row in rows if not row.get("right")]
    turns = chain.from_iterable(zip_longest(right, wrong))
    return list(filter(None, turns))[:SAMPLES_SHOWN]


def sample(row: Row) -> Row:
    """A row of samples.jsonl as the page shows it. Tokens that add no text go with the next piece
    of text, and their log-probs add up. Those at the end have an empty text."""
    texts, logprobs = [], []
    total, pending = 0.0, False
    for piece, logprob in zip(row["pieces"], row["logprobs"], strict=True):
        total, pending = total + logprob, not piece
        if piece:
            texts.append(visible(piece))
            logprobs.append(round(total, 2))
            total = 0.0
    if pending:
        texts.append("")
        logprobs.append(round(total, 2))
    same = ("step", "reward", "advantage", "right", "finished", "tokens", "components")
    return {name: row[name] for name in same} | {
        "prompt": visible(row["prompt"]),
        "answer": visible(str(row["answer"])),
        "texts": texts,
        "logprobs": logprobs,
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m drgrpo.run.report RUN")
    with user_errors():
        print(write(sys.argv[1]))
