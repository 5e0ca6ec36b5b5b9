"""Responses -> the scores in `eval.json` and the tables on the terminal."""

from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

from rich.table import Table

from drgrpo.answers import RULES, equal_as_strings, extract, truths_of
from drgrpo.evaluation.responses import evaluations, recorded
from drgrpo.evaluation.scores import average, score
from drgrpo.evaluation.tables import make_table, percent, span
from drgrpo.run.files import write_json
from drgrpo.run.log import Log, number

NEARLY_ALL = 0.9  # responses without an answer: the rule or the prompt is wrong


def write(log: Log, about: dict, rows: list[dict]) -> None:
    """Print the tables. Write `about` (settings, versions, ...) and the scores to OUT/eval.json."""
    report = about | results(rows)
    for table in tables(report):
        log.console.print(table)
    write_json(log.out / "eval.json", report)
    for line in no_answer(rows, log.out):
        log.say(line)
    log.say(f"wrote {log.out}/eval.json and {log.out}/responses.jsonl")


def write_seeds(out: Path, folders: list[Path]) -> None:
    """Print mean and standard deviation over the evaluations in `folders`, which differ in the seed
    only. Write them to OUT/seeds.json."""
    log = Log(out, active=True)
    reports = [recorded(folder) for folder in folders]
    seeds = [report["settings"]["seed"] for report in reports]
    found = over_seeds(reports)
    for part in found:
        title = f"{name(reports[0]['settings'])}, {part['template']!r}, T={part['temperature']:g}"
        log.console.print(seeds_table(f"{title}, over {len(seeds)} seeds", part))
    write_json(log.out / "seeds.json", {"seeds": seeds, "evaluations": found})
    log.say(f"wrote {log.out}/seeds.json")


def over_seeds(reports: list[dict]) -> list[dict]:
    """For each template and temperature, the spread of each benchmark's accuracy and of the
    average."""
    found = []
    for same in zip(*(report.get("evaluations", [report]) for report in reports), strict=True):
        benchmarks = {}
        for benchmark in same[0]["benchmarks"]:
            benchmarks[benchmark] = spread(
                [part["benchmarks"][benchmark]["accuracy"] for part in same]
            )
        about = {"template": same[0]["template"], "temperature": same[0]["temperature"]}
        averages = spread([part["average"] for part in same])
        found.append(about | {"benchmarks": benchmarks, "average": averages})
    return found


def spread(accuracies: list[float]) -> dict:
    """`sd` is the sample standard deviation, with n - 1. All seeds have the same problems, and so
    it shows the noise of sampling only."""
    return {"mean": fmean(accuracies), "sd": stdev(accuracies), "by_seed": accuracies}


def seeds_table(title: str, part: dict) -> Table:
    rows = []
    for benchmark, s in [*part["benchmarks"].items(), ("average", part["average"])]:
        shares = (s["mean"], s["sd"], min(s["by_seed"]), max(s["by_seed"]))
        rows.append([benchmark, *map(percent, shares)])
    columns = ["benchmark", "mean %", "sd", "lowest %", "highest %"]
    return make_table(title, columns, rows[:-1], rows[-1:])


def no_answer(rows: list[dict], out: Path) -> list[str]:
    """What to do where nearly no response holds an answer, a line for each template and
    temperature. Every rule is tried on the responses."""
    lines = []
    for (template, temperature), sets in evaluations(rows).items():
        written = [row for row in chain(*sets.values()) if row["response"] is not None]
        missing = [row for row in written if not row["parsed"]]
        if not written or len(missing) < NEARLY_ALL * len(written):
            continue
        found = {rule: count_answers(missing, rule) for rule in RULES}
        best = max(found, key=found.__getitem__)
        advice = (
            f"--answer {best} finds one in {found[best][1]} of them: evaluate or train with it, "
            f"or grade these again: eval.py --regrade {out}/responses.jsonl --answer {best}"
        )
        if found[best] == (0, 0):
            advice = (
                "No --answer finds one. The prompt may not fit the model, or the responses may be "
                "cut off: read some of them, then try --template chat or a larger --max-new-tokens"
            )
        which = f"{template!r} at T={temperature:g}"
        lines.append(f"no answer in {len(missing)} of {len(written)} responses, {which}. {advice}")
    return lines


def count_answers(rows: list[dict], rule: str) -> tuple[int, int]:
    """How many responses hold the truth under a rule, as strings, and how many hold an answer."""
    pairs = [(extract(row["response"], rule), truths_of(row["answer"])) for row in rows]
    given = [(answer, truths) for answer, truths in pairs if answer is not None]
    return sum(equal_as_strings(*pair, rule) is True for pair in given), len(given)


def results(rows: list[dict]) -> dict:
    """The scores of the only template and temperature. If there are several, a list of such scores
    under "evaluations"."""
    found = []
    for (template, temperature), sets in evaluations(rows).items():
        result = {"template": template, "temperature": temperature, **average(sets)}
        result["benchmarks"] = {name: score(part) for name, part in sets.items()}
        found.append(result)
    return found[0] if len(found) == 1 else {"evaluations": found}


def tables(report: dict) -> list[Table]:
    """One table for each template and temperature. If there are several, one more with the
    averages. The last of the detailed tables tells the counters."""
    *rest, last = report.get("evaluations", [report])
    settings = report["settings"]
    detailed = [detail(part, settings, {}) for part in rest]
    detailed.append(detail(last, settings, report["counters"]))
    return [*detailed, overview([*rest, last], settings)] if rest else detailed


def overview(parts: list[dict], settings: dict) -> Table:
    columns = ("template", "T", *parts[0]["benchmarks"], "average", "95% interval")
    rows = []
    for part in parts:
        accuracies = [percent(r["accuracy"]) for r in part["benchmarks"].values()]
        rows.append([part["template"], f"{part['temperature']:g}", *accuracies])
        rows[-1] += [percent(part["average"]), span(part["average_interval"])]
    return make_table(f"{name(settings)}: accuracy %", columns, rows)


def detail(part: dict, settings: dict, counters: dict[str, int]) -> Table:
    benchmarks = part["benchmarks"]
    samples = min(r["samples"] for r in benchmarks.values())
    k = str(min(max(map(int, r["pass_at"]), default=1) for r in benchmarks.values()))
    several = {f"pass@{k} %": "pass_at", f"maj@{k} %": "maj_at"} if samples > 1 else {}
    how = f"mean of {samples} at T={part['temperature']:g}" if part["temperature"] else "greedy"
    columns = ["benchmark", accuracy_name(samples), "95% interval"]
    columns += ["same problems"] * (samples > 1)
    columns += [*several, "n", "len right", "len wrong", "cut %", "no answer %"]
    rewarded = all("reward" in r for r in benchmarks.values())
    columns += ["reward"] * rewarded
    rows = []
    for benchmark, r in benchmarks.items():
        rows.append([benchmark, percent(r["accuracy"]), span(r["interval"])])
        rows[-1] += [span(r["interval_samples"])] if samples > 1 else []
        rows[-1] += [percent(r[column][k]) for column in several.values()]
        rows[-1] += [str(r["n"]), number(r["len_correct"]), number(r["len_incorrect"])]
        rows[-1] += [percent(r["truncated_frac"]), percent(r["unparsed_frac"])]
        rows[-1] += [number(r["reward"], ".3f")] if rewarded else []
    mean = ["average", percent(part["average"]), span(part["average_interval"])]
    mean += [span(part["average_interval_samples"])] if samples > 1 else []
    for column in several.values():
        mean.append(percent(fmean(r[column][k] for r in benchmarks.values())))
    mean.append(str(sum(r["n"] for r in benchmarks.values())))
    title = f"{name(settings)}, {part['template']!r}, {how}, grader {settings['grader']}"
    return make_table(title, columns, rows, [mean], caption=footer(part, counters))


def accuracy_name(samples: int) -> str:
    """The field's name of the mean score of `samples` answers."""
    return f"mean@{samples} %" if samples > 1 else "accuracy %"


def footer(part: dict, counters: dict[str, int]) -> str:
    """What a reader of the scores must know: prompts that do not fit, intervals without a spread,
    and comparisons that the graders gave up."""
    lines = [
        f"{benchmark}: {r['dropped']} of {r['n']} prompts are too long for the model and count as "
        "wrong."
        for benchmark, r in part["benchmarks"].items()
        if r["dropped"]
    ]
    lines += [rewards(*item) for item in part["benchmarks"].items() if "reward" in item[1]]
    if any("interval_samples" in r for r in part["benchmarks"].values()):
        lines.append(
            "95% interval: other problems of this kind. same problems: these, answered again."
        )
    if any(r["interval"][0] == r["interval"][1] for r in part["benchmarks"].values()):
        lines.append(
            "Where all problems score the same, resampling them shows no spread. That interval is "
            "too narrow."
        )
    lines += [f"{what.replace('_', ' ')}: {count}" for what, count in counters.items() if count]
    return "\n".join(lines)


def rewards(benchmark: str, r: dict) -> str:
    """The components of a reward, and how many calls of its functions failed."""
    means = {k: value for k, value in r.items() if k.startswith("reward/")}
    parts = ", ".join(f"{k.partition('/')[2]} {value:.3f}" for k, value in means.items())
    failed = f"; {r['reward_errors']} calls failed and count as 0" * (r["reward_errors"] > 0)
    return f"{benchmark}: reward of {parts}{failed}"


def name(settings: dict) -> str:
    return settings.get("model") or "unknown model"
