"""Is the difference noise? A run against the paper's rows, and two runs against each other on the
same problems."""

from statistics import fmean

import numpy as np
from rich.table import Table

from drgrpo.data import BENCHMARKS
from drgrpo.evaluation import responses
from drgrpo.evaluation.published import PROTOCOL, PUBLISHED, N, same_model
from drgrpo.evaluation.scores import (
    bootstrap,
    interval,
    mcnemar,
    problem_scores,
    sign_flip,
    two_proportions,
)
from drgrpo.run.log import Log
from drgrpo.types import UserError

NOISE = 0.05  # a difference with a larger p-value is within noise


def compare(runs: list[str], out: str) -> None:
    """Print the comparison of two runs, or of a run and the paper; with `out`, write it to
    OUT/compare.json too."""
    ours = [run for run in runs if run != "paper"]
    if len(runs) != 2 or not ours:
        raise UserError(
            f"--compare {' '.join(runs)} must name two, RUN_A RUN_B or RUN paper, or one next to --model"
        )
    result, tables = with_paper(*ours) if len(ours) == 1 else paired(*ours)
    log = Log(out or ".", active=True)
    for table in tables:
        log.console.print(table)
    if out:
        log.out.mkdir(parents=True, exist_ok=True)
        responses.write_json(log.out / "compare.json", result)
        log.say(f"wrote {log.out}/compare.json")


def with_paper(run: str) -> tuple[dict, list[Table]]:
    """A run's evaluations next to every published row."""
    settings = responses.recorded(run).get("settings", {})
    found = [
        next_to_paper(sets, settings, *key)
        for key, sets in responses.evaluations(responses.read(run)).items()
    ]
    return {"run": run, "evaluations": found}, [
        paper_table(result, settings.get("model", run)) for result in found
    ]


def next_to_paper(
    benchmarks: dict[str, list[dict]], settings: dict, template: str, temperature: float
) -> dict:
    """By benchmark, and on average where all five were run: the published score, ours minus it, the
    p-value of a two-proportion test, and whether that makes it noise. Rows about this very model
    and template come first."""
    ours = {name: problem_scores(rows) for name, rows in benchmarks.items() if name in BENCHMARKS}
    if not ours:
        raise UserError(
            f"the paper has no scores on {', '.join(benchmarks)}; it has {', '.join(BENCHMARKS)}"
        )
    mine, complete = (
        {name: fmean(scores.values()) for name, scores in ours.items()},
        len(ours) == len(BENCHMARKS),
    )
    rows = []
    for row in PUBLISHED:
        pairs = {b: (mine[b], len(ours[b]), row.score(b) / 100, row.n(b)) for b in ours}
        cells = {b: cell([pair]) for b, pair in pairs.items()} | (
            {"average": cell(list(pairs.values()))} if complete else {}
        )
        same = same_model(row, settings.get("model", ""), template)
        rows.append({"name": row.name, "table": row.table, "same_model": same, "scores": cells})
    rows.sort(key=lambda row: not row["same_model"])
    mine |= {"average": fmean(mine.values())} if complete else {}
    departs = departures(
        settings | {"temperature": temperature},
        {name: len(scores) for name, scores in ours.items()},
    )
    return {
        "template": template,
        "temperature": temperature,
        "ours": mine,
        "published": rows,
        "departures": departs,
    }


def cell(pairs: list[tuple[float, int, float, int]]) -> dict:
    p = two_proportions(pairs)
    published, difference = fmean(q for _, _, q, _ in pairs), fmean(p - q for p, _, q, _ in pairs)
    return {"published": published, "difference": difference, "p": p, "within_noise": p >= NOISE}


def departures(settings: dict, counts: dict[str, int]) -> list[str]:
    """In what this run is not the paper's protocol."""
    found = [
        f"{name} is {settings.get(name, 'not recorded')}, the paper's is {value}"
        for name, value in PROTOCOL.items()
        if settings.get(name) != value
    ]
    return found + [
        f"{b} has {n} problems here, the paper's has {N[b]}" for b, n in counts.items() if n != N[b]
    ]


def paper_table(result: dict, model: str) -> Table:
    columns = list(result["ours"])
    table = Table(
        title=f"{model}, {result['template']}, next to the paper's Tables 1 and 4: published %, and ours minus it",
        title_justify="left",
        caption=legend(result),
        caption_justify="left",
    )
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(
        "ours", *(f"{100 * result['ours'][name]:.1f}      " for name in columns), end_section=True
    )
    matched = sum(row["same_model"] for row in result["published"])
    for i, row in enumerate(result["published"], 1):
        cells = [row["scores"][name] for name in columns]
        shown = [
            f"{100 * c['published']:.1f} {100 * c['difference']:+5.1f}{' ' if c['within_noise'] else '*'}"
            for c in cells
        ]
        table.add_row(
            ("this model: " if row["same_model"] else "") + row["name"],
            *shown,
            end_section=i == matched,
        )
    return table


def legend(result: dict) -> str:
    lines = [
        f"* beyond noise: p < {NOISE} in a two-proportion test; without it, within noise. 4-shot AMC is of 40 problems."
    ]
    return "\n".join(
        lines + [f"Not the paper's protocol: {text}." for text in result["departures"]]
    )


# ---- two runs


def paired(run_a: str, run_b: str) -> tuple[dict, list[Table]]:
    """Two runs on the same problems: their evaluations of one template and temperature."""
    a, b = (responses.evaluations(responses.read(run)) for run in (run_a, run_b))
    found, tables = [], []
    for key_a, key_b in pair_up(a, b):
        result = difference(a[key_a], b[key_b])
        found.append({"a": [run_a, *key_a], "b": [run_b, *key_b]} | result)
        tables.append(
            paired_table(
                result,
                *(
                    f"{run}, {template}, T={t:g}"
                    for run, template, t in ((run_a, *key_a), (run_b, *key_b))
                ),
            )
        )
    return {"evaluations": found}, tables


def difference(a: dict[str, list[dict]], b: dict[str, list[dict]]) -> dict:
    """Two evaluations on the same problems, by benchmark and on average: B minus A with its paired
    bootstrap interval, and a p-value. One sample per problem: McNemar's exact test. Several, and
    the average: a paired sign-flip permutation test."""
    shared = [name for name in a if name in b]
    if not shared:
        raise UserError(f"nothing to compare: one run has {', '.join(a)}, the other {', '.join(b)}")
    rows, weighted, draws = {}, [], []
    for i, name in enumerate(shared):
        ours, theirs = problem_scores(a[name]), problem_scores(b[name])
        check_same_problems(name, a[name], b[name])
        differences = [theirs[id] - ours[id] for id in ours]
        only_a, only_b = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
        single = set(ours.values()) | set(theirs.values()) <= {0.0, 1.0}
        draws.append(bootstrap(differences, seed=(0, i)))
        weighted += [d / len(differences) / len(shared) for d in differences]
        rows[name] = {
            "n": len(ours),
            "a": fmean(ours.values()),
            "b": fmean(theirs.values()),
            "difference": fmean(differences),
            "interval": interval(draws[-1]),
            "a_better": only_a,
            "b_better": only_b,
            "p": mcnemar(only_a, only_b) if single else sign_flip(differences),
            "test": "McNemar" if single else "sign flip",
        }
    mean = {k: fmean(r[k] for r in rows.values()) for k in ("a", "b", "difference")}
    mean |= {k: sum(r[k] for r in rows.values()) for k in ("n", "a_better", "b_better")}
    mean |= {
        "interval": interval(np.mean(draws, axis=0)),
        "p": sign_flip(weighted),
        "test": "sign flip",
    }
    return {
        "benchmarks": rows,
        "average": mean,
        "left_out": sorted((a.keys() | b.keys()) - set(shared)),
    }


def check_same_problems(name: str, a: list[dict], b: list[dict]) -> None:
    questions = [{r["id"]: r["problem"] for r in rows} for rows in (a, b)]
    differ = [
        id
        for id in questions[0].keys() | questions[1].keys()
        if questions[0].get(id) != questions[1].get(id)
    ]
    if differ:
        raise UserError(
            f"{name}: the two runs did not answer the same problems: {len(differ)} differ or are in one run only, the first is "
            f"id {min(differ)}. A paired comparison needs both runs on one data set"
        )


def pair_up(a: dict, b: dict) -> list[tuple[tuple, tuple]]:
    """Which evaluation of A goes with which of B: those of one template and temperature; or, where
    each run has a single one, these, whatever they are."""
    same = [(key, key) for key in a if key in b]
    if not same and len(a) == len(b) == 1:
        return [(next(iter(a)), next(iter(b)))]
    if not same:
        names = [
            ", ".join(f"{template} at T={temperature:g}" for template, temperature in run)
            for run in (a, b)
        ]
        raise UserError(f"no evaluation is in both runs: one has {names[0]}, the other {names[1]}")
    return same


def paired_table(result: dict, a: str, b: str) -> Table:
    table = Table(
        title=f"A: {a}\nB: {b}",
        title_justify="left",
        caption=paired_caption(result),
        caption_justify="left",
    )
    for column in (
        "benchmark",
        "n",
        "A %",
        "B %",
        "B - A",
        "95% interval",
        "A better",
        "B better",
        "p",
        "test",
    ):
        table.add_column(column, justify="left" if column in ("benchmark", "test") else "right")
    for name, r in (result["benchmarks"] | {"average": result["average"]}).items():
        if name == "average":
            table.add_section()
        low, high = r["interval"]
        table.add_row(
            name,
            str(r["n"]),
            f"{100 * r['a']:.1f}",
            f"{100 * r['b']:.1f}",
            f"{100 * r['difference']:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            str(r["a_better"]),
            str(r["b_better"]),
            f"{r['p']:.3g}",
            r["test"],
        )
    return table


def paired_caption(result: dict) -> str:
    left_out = f" Not in both runs: {', '.join(result['left_out'])}." if result["left_out"] else ""
    return f"Paired by problem; p is of no difference, two-sided.{left_out}"
