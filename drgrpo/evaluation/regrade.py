"""Grade responses again, without a model: with the other grader, or after a grader has changed."""

from itertools import product

from drgrpo.evaluation import report
from drgrpo.evaluation.evaluate import Graders, counters, group_equal_answers, make_graders
from drgrpo.evaluation.responses import find, groups, read, recorded
from drgrpo.evaluation.scores import values
from drgrpo.run import provenance
from drgrpo.run.files import append_jsonl
from drgrpo.run.log import Log
from drgrpo.templates import OWN_RULE, TEMPLATES
from drgrpo.types import UserError


def regrade(path: str, mode: str, answer: str, out: str) -> None:
    """Write the responses with new grades, and their scores, to OUT (default: regraded-MODE, or
    regraded-MODE-ANSWER, beside them)."""
    rows, saved = read(path), recorded(path)
    settings = saved.get("settings", {})
    where = f"regraded-{mode}" if answer == "auto" else f"regraded-{mode}-{answer}"
    log = Log(out or find(path).parent / where, active=True)
    if (log.out / "responses.jsonl").exists():
        raise UserError(
            f"{log.out} holds responses.jsonl already; choose another --out, or delete it"
        )
    rule = settings.get("answer", "auto") if answer == "auto" else answer
    graded, counts = regraded(rows, mode, rule)
    changes = [new["score"] - old["score"] for old, new in zip(rows, graded, strict=True)]
    rose = sum(change > 0 for change in changes)
    fell = sum(change < 0 for change in changes)
    log.say(f"{path}: of {len(rows)} grades {rose} rose and {fell} fell, grader {mode}")
    log.out.mkdir(parents=True, exist_ok=True)
    append_jsonl(log.out / "responses.jsonl", graded)
    about = {
        "regraded": path,
        "settings": settings | {"grader": mode, "answer": rule},
        "versions": saved.get("versions", {}) | provenance.versions(),
        "counters": counts,
    }
    report.write(log, about, graded)


def regraded(rows: list[dict], mode: str, rule: str) -> tuple[list[dict], dict[str, int]]:
    """Copies of the rows with new grades and votes, and the graders' counters. `rule` is where the
    answers stand, "auto" for the templates' own rules. A row without a response keeps its score of
    0. Rewards are left out: they were made of the old grades."""
    rule_of = {row["template"]: rule for row in rows}
    if rule == "auto":
        rule_of = {t: TEMPLATES[t].answer if t in TEMPLATES else OWN_RULE for t in rule_of}
    copies = [row.copy() for row in rows]
    for row, column in product(copies, ("reward", "components")):
        row.pop(column, None)
    written = [row for row in copies if row["response"] is not None]
    with make_graders(set(rule_of.values()), mode) as graders:
        for template, own in rule_of.items():
            grade_rows([row for row in written if row["template"] == template], graders[own])
        return copies, counters(graders)


def grade_rows(rows: list[dict], graders: Graders) -> None:
    """Set the score, parsed and vote of rows of one template."""
    grades = [graders.truth.submit(row["response"], row["answer"]) for row in rows]
    for row, grade in zip(rows, grades, strict=True):
        row |= {"score": grade.result().score, "parsed": grade.result().parsed, "vote": None}
    sampled = [group for group in groups(rows) if len(group) > 1]
    texts = [values(group, "response") for group in sampled]
    for group, votes in zip(sampled, group_equal_answers(graders.peers, texts), strict=True):
        for row, vote in zip(group, votes, strict=True):
            row["vote"] = vote
