"""What a base model does before any training (paper, Sec. 2), from its responses alone. Does it
answer? Does it explore? Does it reflect on itself? How long are its answers?

No second model judges here. "Answers" means that an answer can be extracted in the form that the
template asks for. A model that solves the problem and ends in prose does not answer. "Reflects"
means that one of the paper's keywords occurs.
"""

import operator
import re
from collections import Counter
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table

from drgrpo.evaluation import responses
from drgrpo.evaluation.scores import mean, mean_pass_at_k, powers_of_two, sign_flip, values
from drgrpo.evaluation.tables import make_table, percent
from drgrpo.run.files import write_json
from drgrpo.run.log import Log, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEYWORDS = (
    *("recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "reevaluation", "re-examine"),
    *("reexamine", "reconsider", "reanalyze", "double-check", "check again", "think again"),
    *("verify again", "go over the steps"),
)
KEYWORD = re.compile(r"\b(?:" + "|".join(map(re.escape, KEYWORDS)) + ")", re.IGNORECASE)

KINDS = ("unformatted", "correct", "incorrect")


def analyze(path: str, out: str) -> None:
    """Print the tables. Write analysis.json and analysis.png to OUT, or beside the responses."""
    entries = entries_of(responses.read(path))
    log = Log(out or responses.find(path).parent, active=True)
    log.out.mkdir(parents=True, exist_ok=True)
    for table in tables(entries):
        log.console.print(table)
    write_json(log.out / "analysis.json", {"responses": path, "evaluations": entries})
    draw(entries).savefig(log.out / "analysis.png", dpi=130)
    log.say(f"wrote {log.out}/analysis.json and {log.out}/analysis.png")


def entries_of(rows: list[dict]) -> list[dict]:
    """One object for each template and temperature, all benchmarks together."""
    entries = []
    for (template, temperature), sets in responses.evaluations(rows).items():
        entry = describe([row for benchmark in sets.values() for row in benchmark])
        entries.append({"template": template, "temperature": temperature, **entry})
    return entries


def describe(rows: list[dict]) -> dict:
    rows = [r for r in rows if r["response"] is not None]
    questions = responses.groups(rows)
    samples = min(map(len, questions), default=0)
    kinds: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for r in rows:
        kind = "unformatted" if not r["parsed"] else "correct" if r["score"] > 0 else "incorrect"
        kinds[kind].append(r)
    entry = {
        "questions": len(questions),
        "responses": len(rows),
        "extractable": mean(values(rows, "parsed")),
        "accuracy": mean(values(rows, "score")),
        "truncated": mean(map(operator.not_, values(rows, "finished"))),
        "pass_at": {str(k): mean_pass_at_k(questions, k) for k in powers_of_two(samples)},
        "reflection": reflection(questions),
    }
    entry["tokens"] = {k: mean(values(part, "tokens")) for k, part in kinds.items()}
    entry["characters"] = {k: mean(map(len, values(part, "response"))) for k, part in kinds.items()}
    return entry


def reflection(questions: list[list[dict]]) -> dict:
    """How often keywords occur, by question (in any of its samples) and by response, and the
    accuracy of the responses with and without one.

    Hard questions draw more reflection, which alone lowers the accuracy with a keyword. `within`
    holds the question fixed. Over the questions with responses of both kinds, it is the mean
    difference (with minus without) and its sign-flip p-value."""
    count: Counter[str] = Counter()
    scores_with, scores_without, within = [], [], []
    reflecting = 0
    for question in questions:
        marked: list[float] = []
        plain: list[float] = []
        for r in question:
            words = keywords(r["response"])
            count.update(sorted(words))
            (marked if words else plain).append(r["score"])
        reflecting += bool(marked)
        scores_with += marked
        scores_without += plain
        if marked and plain:
            within.append(fmean(marked) - fmean(plain))
    responses_in_all = len(scores_with) + len(scores_without)
    return {
        "questions": reflecting / len(questions) if questions else None,
        "responses": len(scores_with) / responses_in_all if questions else None,
        "keywords": dict(count.most_common()),
        "n_with": len(scores_with),
        "accuracy_with": mean(scores_with),
        "n_without": len(scores_without),
        "accuracy_without": mean(scores_without),
        "within": {
            "questions": len(within),
            "difference": mean(within),
            "p": sign_flip(within) if within else None,
        },
    }


def keywords(text: str) -> set[str]:
    """The self-reflection keywords in a response, in any case. Inflected ones ("rechecking") are
    included."""
    return {match.lower() for match in KEYWORD.findall(text)}


# ---- tables


def tables(entries: list[dict]) -> list[Table]:
    answers = ["questions", "responses", "answer %", "right %", "cut %"]
    answers += ["len no answer", "len right", "len wrong"]
    reflects = ["questions", "responses", "with", "without", "within", "p", "commonest"]
    ks = list(dict.fromkeys(k for e in entries for k in e["pass_at"]))
    explores = ["k=" + k for k in ks]
    shown = {
        "Answers and their lengths (tokens; answer: one can be extracted)": (answers, answer_cells),
        "pass@k, %": (explores, lambda e: [percent(e["pass_at"].get(k)) for k in ks]),
        "Self-reflection: keyword in % of ..., % right with and without one, difference within a "
        "question": (reflects, reflection_cells),
    }
    result = []
    for title, (columns, cells) in shown.items():
        rows = [[name(e), *cells(e)] for e in entries]
        result.append(make_table(title, ["template, T", *columns], rows))
    return result


def name(entry: dict) -> str:
    temperature = entry["temperature"]
    return f"{entry['template']}, {format(temperature, 'g') if temperature else 'greedy'}"


def answer_cells(e: dict) -> list[str]:
    shares = [percent(e[share]) for share in ("extractable", "accuracy", "truncated")]
    lengths = [number(e["tokens"][kind]) for kind in KINDS]
    return [str(e["questions"]), str(e["responses"]), *shares, *lengths]


def reflection_cells(e: dict) -> list[str]:
    r = e["reflection"]
    shares = [r["questions"], r["responses"], r["accuracy_with"], r["accuracy_without"]]
    shares.append(r["within"]["difference"])
    common = [f"{word} {count}" for word, count in list(r["keywords"].items())[:3]]
    p = number(r["within"]["p"], ".2g")
    return [*map(percent, shares), p, ", ".join(common) or "-"]


# ---- figure


def draw(entries: list[dict]) -> "Figure":
    """Four panels: answering, exploration, self-reflection and lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (answers, explores), (reflects, lengths) = figure.subplots(2, 2)
    names = [name(e) for e in entries]
    shown = {"answer extracted": "extractable", "right": "accuracy"}
    bars(answers, names, {label: values(entries, k) for label, k in shown.items()})
    shown = {"keyword, of questions": "questions", "keyword, of responses": "responses"}
    shown |= {"right with": "accuracy_with", "right without": "accuracy_without"}
    found = values(entries, "reflection")
    bars(reflects, names, {label: values(found, k) for label, k in shown.items()})
    bars(lengths, names, {kind: values(values(entries, "tokens"), kind) for kind in KINDS})
    draw_pass_at_k(explores, entries)
    titles = ("answering", "exploration", "self-reflection", "tokens")
    for axes, title in zip((answers, explores, reflects, lengths), titles, strict=True):
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in (answers, explores, reflects):
        axes.set_ylim(0, 1)
    return figure


def draw_pass_at_k(axes: "Axes", entries: list[dict]) -> None:
    """A line over the temperatures for each template and k."""
    for template in dict.fromkeys(e["template"] for e in entries):
        same = [e for e in entries if e["template"] == template]
        same.sort(key=lambda e: e["temperature"])
        for k in same[0]["pass_at"]:
            points = [(e["temperature"], e["pass_at"][k]) for e in same if k in e["pass_at"]]
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{template}, pass@{k}")
    axes.set_xlabel("temperature")


def bars(axes: "Axes", names: list[str], series: dict[str, list[float | None]]) -> None:
    """Grouped bars. A missing value is a bar of no height."""
    width = 0.8 / len(series)
    for i, (label, shares) in enumerate(series.items()):
        heights = [share or 0.0 for share in shares]
        axes.bar([x + i * width for x in range(len(names))], heights, width, label=label)
    middles = [x + 0.4 - width / 2 for x in range(len(names))]
    axes.set_xticks(middles, names, rotation=20, ha="right", fontsize=8)
