"""Grade responses again, without a model: with the other grader, or after a grader has changed."""

from drgrpo.evaluation import report
from drgrpo.evaluation.evaluate import Graders, counters, group_equal_answers, make_graders
from drgrpo.evaluation.responses import find, groups, read, recorded
from drgrpo.evaluation.scores import values
from drgrpo.run import provenance
from drgrpo.run.log import Log
from drgrpo.templates import get_template
from drgrpo.types import UserError


def regrade(path: str, mode: str, out: str) -> None:
    """Write the responses with new grades, and their scores, to OUT (default: regraded-MODE beside
    them)."""
    rows, saved = read(path), recorded(path)
    log = Log(out or find(path).parent / f"regraded-{mode}", active=True)
    if (log.out / "responses.jsonl").exists():
        raise UserError(
            f"{log.out} holds responses.jsonl already; choose another --out, or delete it"
        )
    graded, counts = regraded(rows, mode)
    changes = [new["score"] - old["score"] for old, new in zip(rows, graded, strict=True)]
    rose = sum(change > 0 for change in changes)
    fell = sum(change < 0 for change in changes)
    log.say(f"{path}: of {len(rows)} grades {rose} rose and {fell} fell, grader {mode}")
    log.out.mkdir(parents=True, exist_ok=True)
    log.record("responses", *graded)
    about = {
        "regraded": path,
        "settings": saved.get("settings", {}) | {"grader": mode},
        "versions": saved.get("versions", {}) | provenance.versions(),
        "counters": counts,
    }
    report.write(log, about, graded)


def regraded(rows: list[dict], mode: str) -> tuple[list[dict], dict[str, int]]:
    """Copies of the rows with new grades and votes, and the graders' counters. A row without a
    response keeps its score of 0."""
    rule_of = {row["template"]: get_template(row["template"]).answer for row in rows}
    copies = [row.copy() for row in rows]
    with make_graders(set(rule_of.values()), mode) as graders:
        for template, rule in rule_of.items():
            written = [
                row for row in copies if row["template"] == template and row["response"] is not None
            ]
            grade_rows(written, graders[rule])
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
