"""Is the difference noise? A run against the paper's rows, and two runs against each other on the
same problems."""

from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from drgrpo.data import BENCHMARKS
from drgrpo.evaluation import responses
from drgrpo.evaluation.published import (
    PROTOCOL,
    PUBLISHED,
    REEVALUATED,
    SOBER_SETS,
    N,
    Published,
    Reevaluation,
    same_model,
)
from drgrpo.evaluation.scores import (
    SEED,
    bootstrap,
    interval,
    mcnemar,
    problem_scores,
    sign_flip,
    two_proportions,
    values,
)
from drgrpo.evaluation.tables import make_table, percent
from drgrpo.run.files import write_json
from drgrpo.run.log import Log
from drgrpo.types import UserError

NOISE = 0.05  # a difference with a larger p-value is within noise


def compare(runs: list[str], out: str) -> None:
    """Print the comparison of two runs, or of a run and "paper". With `out`, write it to
    OUT/compare.json too."""
    ours = [run for run in runs if run != "paper"]
    result, tables = with_paper(*ours) if len(ours) == 1 else paired(*ours)
    log = Log(out or ".", active=True)
    for table in tables:
        log.console.print(table)
    if out:
        log.out.mkdir(parents=True, exist_ok=True)
        write_json(log.out / "compare.json", result)
        log.say(f"wrote {log.out}/compare.json")


# ---- a run and the paper


def with_paper(run: str) -> tuple[dict, list[Table]]:
    """A run's evaluations next to every published row."""
    settings = responses.recorded(run).get("settings", {})
    found, tables = [], []
    for (template, temperature), sets in responses.evaluations(responses.read(run)).items():
        found.append(next_to_paper(sets, settings, template, temperature))
        tables.append(paper_table(found[-1], settings.get("model", run)))
    return {"run": run, "evaluations": found}, tables


def next_to_paper(
    benchmarks: dict[str, list[dict]], settings: dict, template: str, temperature: float
) -> dict:
    """By benchmark, and on average where all five were run: the published score, ours minus it, the
    p-value of a two-proportion test, and whether that makes it noise. The paper's rows and the
    re-evaluations, each with those about this model first."""
    if not benchmarks.keys() & set(BENCHMARKS):
        raise UserError(
            f"the paper has no scores on {', '.join(benchmarks)}; it has {', '.join(BENCHMARKS)}"
        )
    scores = {name: problem_scores(rows) for name, rows in benchmarks.items() if name in SOBER_SETS}
    counts = {name: len(by_id) for name, by_id in scores.items()}
    ours = {name: fmean(by_id.values()) for name, by_id in scores.items()}
    papers = [name for name in ours if name in BENCHMARKS]
    complete = len(papers) == len(BENCHMARKS)

    def compared(row: Published | Reevaluation) -> dict:
        same = same_model(row, settings.get("model", ""), template)
        return {"name": row.name, "same_model": same, "scores": cells(row, ours, counts)}

    published = [compared(row) | {"table": row.table} for row in PUBLISHED]
    others = [
        compared(row) | {"source": row.source, "protocol": row.protocol, "sd": row.sd}
        for row in REEVALUATED
    ]
    return {
        "template": template,
        "temperature": temperature,
        "ours": ours | ({"average": fmean(ours[name] for name in papers)} if complete else {}),
        "published": sorted(published, key=lambda row: not row["same_model"]),
        "reevaluated": sorted(others, key=lambda row: not row["same_model"]),
        "departures": departures(settings | {"temperature": temperature}, counts),
    }


def cells(
    row: Published | Reevaluation, ours: dict[str, float], counts: dict[str, int]
) -> dict[str, dict]:
    """The comparison with a row by each benchmark that both have, and on average if both have the
    paper's five."""
    pairs = {
        name: (ours[name], counts[name], published / 100, row.n(name))
        for name, published in row.by_benchmark.items()
        if name in ours
    }
    result = {name: cell([pair]) for name, pair in pairs.items()}
    if pairs.keys() >= set(BENCHMARKS):
        result["average"] = cell([pairs[name] for name in BENCHMARKS])
    return result


def cell(pairs: list[tuple[float, int, float, int]]) -> dict:
    """The mean over pairs of (our score, its problems, the published score, its problems)."""
    published = fmean(q for _, _, q, _ in pairs)
    difference = fmean(p - q for p, _, q, _ in pairs)
    p = two_proportions(pairs)
    return {"published": published, "difference": difference, "p": p, "within_noise": p >= NOISE}


def departures(settings: dict, counts: dict[str, int]) -> list[str]:
    """In what this run is not the paper's protocol."""
    found = []
    for name, value in PROTOCOL.items():
        if settings.get(name) != value:
            found.append(f"{name} is {settings.get(name, 'not recorded')}, the paper's is {value}")
    for name, n in counts.items():
        if n != N.get(name, n):
            found.append(f"{name} has {n} problems here, the paper's has {N[name]}")
    return found


def paper_table(result: dict, model: str) -> Table:
    names = list(result["ours"])
    ours = ["ours", *(f"{100 * result['ours'][name]:.1f}      " for name in names)]
    groups: list[list[list[str]]] = [[], [], []]
    for row in result["published"]:
        groups[not row["same_model"]].append(shown(row, names))
    groups[2] = [shown(row, names) for row in result["reevaluated"]]
    caption = [
        f"* beyond noise: p < {NOISE} in a two-proportion test; without it, within noise. "
        "4-shot AMC and Sober Look's are of 40 problems."
    ]
    caption += [f"Not the paper's protocol: {text}." for text in result["departures"]]
    caption.append("Below the paper's rows is what others measured on the released models.")
    caption += dict.fromkeys(f"{r['source']}: {r['protocol']}." for r in result["reevaluated"])
    title = (
        f"{model}, {result['template']!r}, next to the paper's Tables 1 and 4: published %, and "
        "ours minus it"
    )
    return make_table(title, ["", *names], [ours], *groups, caption="\n".join(caption))


def shown(row: dict, names: list[str]) -> list[str]:
    """The cells of a published row. A benchmark that it lacks is a dash."""
    label = f"this model: {row['name']}" if row["same_model"] else row["name"]
    found = [row["scores"].get(name) for name in names]
    return [label, *(show_cell(c) if c else "-      " for c in found)]


def show_cell(c: dict) -> str:
    mark = " " if c["within_noise"] else "*"
    return f"{100 * c['published']:.1f} {100 * c['difference']:+5.1f}{mark}"


# ---- two runs


def paired(run_a: str, run_b: str) -> tuple[dict, list[Table]]:
    """Two runs on the same problems: their evaluations of one template and temperature."""
    a = responses.evaluations(responses.read(run_a))
    b = responses.evaluations(responses.read(run_b))
    found, tables = [], []
    for key_a, key_b in pair_up(a, b):
        result = difference(a[key_a], b[key_b])
        found.append({"a": [run_a, *key_a], "b": [run_b, *key_b]} | result)
        tables.append(paired_table(found[-1]))
    return {"evaluations": found}, tables


def difference(a: dict[str, list[dict]], b: dict[str, list[dict]]) -> dict:
    """Two evaluations on the same problems, by benchmark and on average: B minus A, its paired
    bootstrap interval, and a p-value.

    With one sample per problem the test is McNemar's exact test. With several, and for the average,
    it is a paired sign-flip permutation test."""
    shared = [name for name in a if name in b]
    if not shared:
        raise UserError(f"nothing to compare: one run has {', '.join(a)}, the other {', '.join(b)}")
    rows, weighted, draws = {}, [], []
    for i, name in enumerate(shared):
        check_same_problems(name, a[name], b[name])
        scores_a, scores_b = problem_scores(a[name]), problem_scores(b[name])
        differences = [scores_b[id] - scores_a[id] for id in scores_a]
        weighted += [d / len(differences) / len(shared) for d in differences]
        draws.append(bootstrap(differences, seed=(SEED, i)))
        rows[name] = benchmark_row(list(scores_a.values()), list(scores_b.values()), differences)
        rows[name]["interval"] = interval(draws[-1])
    benchmarks = list(rows.values())
    average: dict[str, Any] = {k: fmean(values(benchmarks, k)) for k in ("a", "b", "difference")}
    average |= {k: sum(values(benchmarks, k)) for k in ("n", "a_better", "b_better")}
    average["interval"] = interval(np.mean(draws, axis=0))
    average |= {"p": sign_flip(weighted), "test": "sign flip"}
    left_out = sorted((a.keys() | b.keys()) - set(shared))
    return {"benchmarks": rows, "average": average, "left_out": left_out}


def benchmark_row(a: list[float], b: list[float], differences: list[float]) -> dict:
    """The comparison of one benchmark, without its interval."""
    a_better = sum(d < 0 for d in differences)
    b_better = sum(d > 0 for d in differences)
    single = {*a, *b} <= {0.0, 1.0}
    return {
        "n": len(a),
        "a": fmean(a),
        "b": fmean(b),
        "difference": fmean(differences),
        "a_better": a_better,
        "b_better": b_better,
        "p": mcnemar(a_better, b_better) if single else sign_flip(differences),
        "test": "McNemar" if single else "sign flip",
    }


def check_same_problems(name: str, a: list[dict], b: list[dict]) -> None:
    ours = {r["id"]: r["problem"] for r in a}
    theirs = {r["id"]: r["problem"] for r in b}
    differ = [id for id in ours.keys() | theirs.keys() if ours.get(id) != theirs.get(id)]
    if differ:
        raise UserError(
            f"{name}: the two runs did not answer the same problems: {len(differ)} differ or are "
            f"in one run only, the first is id {min(differ)}. A paired comparison needs both runs "
            "on one data set"
        )


def pair_up(a: dict, b: dict) -> list[tuple[tuple, tuple]]:
    """Which evaluation of A goes with which of B. They have the same template and temperature,
    unless each run has a single evaluation."""
    same = [(key, key) for key in a if key in b]
    if not same and len(a) == len(b) == 1:
        return [(next(iter(a)), next(iter(b)))]
    if not same:
        raise UserError(
            f"no evaluation is in both runs: one has {keys_of(a)}, the other {keys_of(b)}"
        )
    return same


def keys_of(run: dict) -> str:
    return ", ".join(f"{template} at T={temperature:g}" for template, temperature in run)


def paired_table(result: dict) -> Table:
    rows = [paired_cells(name, r) for name, r in result["benchmarks"].items()]
    names = []
    for side in ("a", "b"):
        run, template, temperature = result[side]
        names.append(f"{side.upper()}: {run}, {template!r}, T={temperature:g}")
    caption = "Paired by problem; p is of no difference, two-sided."
    if result["left_out"]:
        caption += f" Not in both runs: {', '.join(result['left_out'])}."
    columns = ["benchmark", "n", "A %", "B %", "B - A", "95% interval", "A better", "B better"]
    return make_table(
        "\n".join(names),
        [*columns, "p", "test"],
        rows,
        [paired_cells("average", result["average"])],
        caption=caption,
        left=("test",),
    )


def paired_cells(name: str, r: dict) -> list[str]:
    low, high = r["interval"]
    shares = [percent(r["a"]), percent(r["b"]), f"{100 * r['difference']:+.1f}"]
    shares.append(f"{100 * low:+.1f} to {100 * high:+.1f}")
    better = [str(r["a_better"]), str(r["b_better"])]
    return [name, str(r["n"]), *shares, *better, f"{r['p']:.3g}", r["test"]]
