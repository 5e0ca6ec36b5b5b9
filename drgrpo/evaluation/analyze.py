"""What a base model does before any training (paper, Sec. 2), from responses alone: does it answer,
does it explore, does it reflect on itself, and how long are its answers?

No second model judges here. "Answers" means that an answer can be extracted in the form its
template asks for, which a model that solves the problem and ends in prose fails; "reflects" means
that one of the paper's keywords occurs.
"""

import re
from collections import Counter
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from drgrpo.evaluation import responses
from drgrpo.evaluation.report import percent
from drgrpo.evaluation.scores import by_problem, mean, pass_at_k, powers_of_two, sign_flip
from drgrpo.run.log import Log, number

KEYWORDS = (
    "recheck",
    "rethink",
    "reassess",
    "reevaluate",
    "re-evaluate",
    "reevaluation",
    "re-examine",
    "reexamine",
    "reconsider",
    "reanalyze",
    "double-check",
    "check again",
    "think again",
    "verify again",
    "go over the steps",
)

FOUND = re.compile(r"\b(?:" + "|".join(map(re.escape, KEYWORDS)) + ")", re.IGNORECASE)


KINDS = ("unformatted", "correct", "incorrect")


def keywords(text: str) -> set[str]:
    """The self-reflection keywords in a response, whatever their case, inflected ones
    ("rechecking") included."""
    return {match.lower() for match in FOUND.findall(text)}


def analyze(path: str, out: str) -> None:
    """Print the tables; write analysis.json and analysis.png to OUT, or beside the responses."""
    entries = entries_of(responses.read(path))
    log = Log(out or responses.folder(path), active=True)
    log.out.mkdir(parents=True, exist_ok=True)
    for shown in tables(entries):
        log.console.print(shown)
    responses.write_json(log.out / "analysis.json", {"responses": path, "evaluations": entries})
    figure = draw(entries)
    figure.savefig(log.out / "analysis.png", dpi=130)
    plt.close(figure)
    log.say(f"wrote {log.out}/analysis.json and {log.out}/analysis.png")


def entries_of(rows: list[dict]) -> list[dict]:
    """One object for each template and temperature, all benchmarks together."""
    return [
        {"template": template, "temperature": temperature}
        | describe([r for rows in sets.values() for r in rows])
        for (template, temperature), sets in responses.evaluations(rows).items()
    ]


def describe(rows: list[dict]) -> dict:
    rows = [r for r in rows if r["response"] is not None]
    questions = [
        by
        for name in dict.fromkeys(r["benchmark"] for r in rows)
        for by in by_problem(r for r in rows if r["benchmark"] == name).values()
    ]
    parts = (
        [r for r in rows if not r["parsed"]],
        [r for r in rows if r["parsed"] and r["score"] > 0],
        [r for r in rows if r["parsed"] and r["score"] <= 0],
    )
    kinds = dict(zip(KINDS, parts, strict=True))
    samples = min(map(len, questions), default=0)
    solved = [(len(q), sum(r["score"] > 0 for r in q)) for q in questions]
    return {
        "questions": len(questions),
        "responses": len(rows),
        "extractable": mean(r["parsed"] for r in rows),
        "accuracy": mean(r["score"] for r in rows),
        "truncated": mean(not r["finished"] for r in rows),
        "pass_at": {
            str(k): fmean(pass_at_k(n, c, k) for n, c in solved) for k in powers_of_two(samples)
        },
        "reflection": reflection(questions),
        "tokens": {kind: mean(r["tokens"] for r in those) for kind, those in kinds.items()},
        "characters": {
            kind: mean(len(r["response"]) for r in those) for kind, those in kinds.items()
        },
    }


def reflection(questions: list[list[dict]]) -> dict:
    """How often keywords occur, by question (in any of its samples) and by response; and the
    accuracy of the responses with and without one. Hard questions draw more reflection, which alone
    makes the first look worse. `within` holds the question fixed: over those with responses of both
    kinds, the mean difference (with minus without) and its sign-flip p-value."""
    marked = [[(keywords(r["response"]), r["score"]) for r in q] for q in questions]
    split = [([s for found, s in q if found], [s for found, s in q if not found]) for q in marked]
    hits, rest = ([score for pair in split for score in pair[side]] for side in (0, 1))
    within = [fmean(a) - fmean(b) for a, b in split if a and b]
    return {
        "questions": mean(bool(a) for a, _ in split),
        "responses": len(hits) / len(hits + rest) if hits + rest else None,
        "keywords": dict(
            Counter(word for q in marked for found, _ in q for word in sorted(found)).most_common()
        ),
        "n_with": len(hits),
        "accuracy_with": mean(hits),
        "n_without": len(rest),
        "accuracy_without": mean(rest),
        "within": {
            "questions": len(within),
            "difference": mean(within),
            "p": sign_flip(within) if within else None,
        },
    }


def name(entry: dict) -> str:
    return f"{entry['template']}, {'greedy' if entry['temperature'] == 0 else format(entry['temperature'], 'g')}"


def tables(entries: list[dict]) -> list[Table]:
    answers = table(
        "Answers and their lengths (tokens; answer: one can be extracted)",
        "questions",
        "responses",
        "answer %",
        "right %",
        "cut %",
        "len no answer",
        "len right",
        "len wrong",
    )
    for e in entries:
        answers.add_row(
            name(e),
            str(e["questions"]),
            str(e["responses"]),
            percent(e["extractable"]),
            percent(e["accuracy"]),
            percent(e["truncated"]),
            *(number(e["tokens"][kind]) for kind in KINDS),
        )
    reflects = table(
        "Self-reflection: keyword in % of ..., % right with and without one, difference within a question",
        "questions",
        "responses",
        "with",
        "without",
        "within",
        "p",
        "commonest",
    )
    for e in entries:
        r = e["reflection"]
        common = (
            ", ".join(f"{word} {count}" for word, count in list(r["keywords"].items())[:3]) or "-"
        )
        reflects.add_row(
            name(e),
            percent(r["questions"]),
            percent(r["responses"]),
            percent(r["accuracy_with"]),
            percent(r["accuracy_without"]),
            percent(r["within"]["difference"]),
            number(r["within"]["p"], ".2g"),
            common,
        )
    ks = list(dict.fromkeys(k for e in entries for k in e["pass_at"]))
    explores = table("pass@k, %", *(f"k={k}" for k in ks))
    for e in entries:
        explores.add_row(name(e), *(percent(e["pass_at"].get(k)) for k in ks))
    return [answers, explores, reflects]


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column("template, T")
    for column in columns:
        made.add_column(column, justify="right")
    return made


def draw(entries: list[dict]) -> Figure:
    figure, ((answers, explores), (reflects, lengths)) = plt.subplots(
        2, 2, figsize=(12, 8), constrained_layout=True
    )
    names = [name(e) for e in entries]
    bars(
        answers,
        names,
        {
            "answer extracted": [e["extractable"] for e in entries],
            "right": [e["accuracy"] for e in entries],
        },
    )
    bars(
        reflects,
        names,
        {
            "keyword, of questions": [e["reflection"]["questions"] for e in entries],
            "keyword, of responses": [e["reflection"]["responses"] for e in entries],
            "right with": [e["reflection"]["accuracy_with"] for e in entries],
            "right without": [e["reflection"]["accuracy_without"] for e in entries],
        },
    )
    bars(lengths, names, {kind: [e["tokens"][kind] for e in entries] for kind in KINDS})
    for template in dict.fromkeys(e["template"] for e in entries):
        mine = sorted(
            (e for e in entries if e["template"] == template), key=lambda e: e["temperature"]
        )
        for k in mine[0]["pass_at"]:
            points = [(e["temperature"], e["pass_at"][k]) for e in mine if k in e["pass_at"]]
            explores.plot(*zip(*points, strict=True), marker="o", label=f"{template}, pass@{k}")
    explores.set_xlabel("temperature")
    for axis, title in (
        (answers, "answering"),
        (explores, "exploration"),
        (reflects, "self-reflection"),
        (lengths, "tokens"),
    ):
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in (answers, explores, reflects):
        axis.set_ylim(0, 1)
    return figure


def bars(axis, names: list[str], series: dict[str, list[float | None]]) -> None:
    """Grouped bars; a value that is not there is a bar of no height."""
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        axis.bar(
            [x + i * width for x in range(len(names))],
            [v or 0.0 for v in values],
            width,
            label=label,
        )
    axis.set_xticks(
        [x + 0.4 - width / 2 for x in range(len(names))], names, rotation=20, ha="right", fontsize=8
    )
