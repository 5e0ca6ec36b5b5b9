"""Grade responses again, without a model: under the other grader, or after a grader has changed."""

from drgrpo.evaluation import report
from drgrpo.evaluation.evaluate import counters, judges, vote
from drgrpo.evaluation.responses import folder, groups, read, recorded
from drgrpo.run import provenance
from drgrpo.run.log import Log
from drgrpo.templates import get_template
from drgrpo.types import UserError


def regrade(path: str, mode: str, out: str) -> None:
    """Write the responses with fresh grades, and their scores, to OUT (default: regraded-MODE
    beside them)."""
    rows, before = read(path), recorded(path)
    log = Log(out or folder(path) / f"regraded-{mode}", active=True)
    if (log.out / "responses.jsonl").exists():
        raise UserError(
            f"{log.out} holds responses.jsonl already; choose another --out, or delete it"
        )
    graded, gave_up = regraded(rows, mode)
    changes = [new["score"] - old["score"] for old, new in zip(rows, graded, strict=True)]
    log.say(
        f"{path}: of {len(rows)} grades {sum(c > 0 for c in changes)} rose and {sum(c < 0 for c in changes)} fell, "
        f"grader {mode}"
    )
    log.out.mkdir(parents=True, exist_ok=True)
    log.record("responses", *graded)
    about = {
        "regraded": path,
        "settings": before.get("settings", {}) | {"grader": mode},
        "versions": before.get("versions", {}) | provenance.versions(),
        "counters": gave_up,
    }
    report.write(log, about, graded)


def regraded(rows: list[dict], mode: str) -> tuple[list[dict], dict[str, int]]:
    """The rows with fresh grades and votes, and what the graders gave up on. Without a response the
    score of 0 stays."""
    rules = {name: get_template(name).answer for name in dict.fromkeys(r["template"] for r in rows)}
    fresh: dict[int, dict] = {}
    with judges(set(rules.values()), mode) as judge:
        for name, rule in rules.items():
            asked = [r for r in rows if r["template"] == name and r["response"] is not None]
            grades = judge[rule].grader(
                [r["response"] for r in asked], [r["answer"] for r in asked]
            )
            fresh |= {
                id(r): {"score": g.score, "parsed": g.parsed, "vote": None}
                for r, g in zip(asked, grades, strict=True)
            }
            several = [g for g in groups(asked) if len(g) > 1]
            votes = vote(judge[rule].ballot, [[r["response"] for r in g] for g in several])
            for row, v in (
                (r, v)
                for g, vs in zip(several, votes, strict=True)
                for r, v in zip(g, vs, strict=True)
            ):
                fresh[id(row)]["vote"] = v
        return [row | fresh.get(id(row), {}) for row in rows], counters(judge)
