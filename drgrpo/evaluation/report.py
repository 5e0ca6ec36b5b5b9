"""Responses -> the scores in `eval.json` and the table on the terminal."""

from statistics import fmean

from rich.table import Table

from drgrpo.evaluation.responses import evaluations, write_json
from drgrpo.evaluation.scores import average, score
from drgrpo.run.log import Log, number


def write(log: Log, about: dict, rows: list[dict]) -> None:
    """The tables on the terminal, and OUT/eval.json: `about` (settings, versions, ...) and the
    scores."""
    report = about | results(rows)
    for shown in tables(report):
        log.console.print(shown)
    write_json(log.out / "eval.json", report)
    log.say(f"wrote {log.out}/eval.json and {log.out}/responses.jsonl")


def results(rows: list[dict]) -> dict:
    """The scores of the only template and temperature; of several, a list of such scores under
    "evaluations"."""
    found = [
        {
            "template": template,
            "temperature": t,
            **average(sets),
            "benchmarks": {b: score(part) for b, part in sets.items()},
        }
        for (template, t), sets in evaluations(rows).items()
    ]
    return found[0] if len(found) == 1 else {"evaluations": found}


def tables(report: dict) -> list[Table]:
    """One for each template and temperature, and one with nothing but the averages if there are
    several."""
    parts = report.get("evaluations", [report])
    made = [
        table(
            part, report["settings"], footer(part, report["counters"] if part is parts[-1] else {})
        )
        for part in parts
    ]
    if len(parts) > 1:
        overview = Table(title=f"{name(report['settings'])}: accuracy %", title_justify="left")
        for column in ("template", "T", *parts[0]["benchmarks"], "average", "95% interval"):
            overview.add_column(column, justify="left" if column == "template" else "right")
        for part in parts:
            accuracies = (percent(r["accuracy"]) for r in part["benchmarks"].values())
            overview.add_row(
                part["template"],
                f"{part['temperature']:g}",
                *accuracies,
                percent(part["average"]),
                span(part["average_interval"]),
            )
        made.append(overview)
    return made


def table(part: dict, settings: dict, caption: str) -> Table:
    benchmarks = part["benchmarks"]
    k = min(max(map(int, r["pass_at"]), default=1) for r in benchmarks.values())
    extra = [("pass_at", f"pass@{k} %"), ("maj_at", f"maj@{k} %")] if k > 1 else []
    samples = min(r["samples"] for r in benchmarks.values())
    how = (
        "greedy" if part["temperature"] == 0 else f"mean of {samples} at T={part['temperature']:g}"
    )
    table = Table(
        title=f"{name(settings)}, {part['template']}, {how}, grader {settings['grader']}",
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
    )
    for column in (
        "benchmark",
        "accuracy %",
        "95% interval",
        *(shown for _, shown in extra),
        "n",
        "len right",
        "len wrong",
        "cut %",
        "no answer %",
    ):
        table.add_column(
            column, justify="left" if column == "benchmark" else "right", overflow="fold"
        )
    for benchmark, r in benchmarks.items():
        table.add_row(
            benchmark,
            percent(r["accuracy"]),
            span(r["interval"]),
            *(percent(r[at][str(k)]) for at, _ in extra),
            str(r["n"]),
            number(r["len_correct"]),
            number(r["len_incorrect"]),
            percent(r["truncated_frac"]),
            percent(r["unparsed_frac"]),
        )
    table.add_section()
    table.add_row(
        "average",
        percent(part["average"]),
        span(part["average_interval"]),
        *(percent(fmean(r[at][str(k)] for r in benchmarks.values())) for at, _ in extra),
        str(sum(r["n"] for r in benchmarks.values())),
    )
    return table


def footer(part: dict, counters: dict[str, int]) -> str:
    """What a reader of the scores must know, if it happened: prompts that did not fit, no spread,
    graders that gave up."""
    lines = [
        f"{benchmark}: {r['dropped']} of {r['n']} prompts are too long for the model and count as wrong."
        for benchmark, r in part["benchmarks"].items()
        if r["dropped"]
    ]
    if any(r["interval"][0] == r["interval"][1] for r in part["benchmarks"].values()):
        lines.append(
            "Where all problems score the same, resampling them shows no spread: that interval is too narrow."
        )
    return "\n".join(
        lines + [f"{what.replace('_', ' ')}: {count}" for what, count in counters.items() if count]
    )


def name(settings: dict) -> str:
    return settings.get("model") or "unknown model"


def span(interval: list[float]) -> str:
    return " to ".join(map(percent, interval))


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)
