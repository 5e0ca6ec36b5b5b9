"""What eval.py tells of several samples and of several seeds."""

import json
from pathlib import Path
from statistics import fmean, stdev

import pytest
from rich.console import Console

from drgrpo.evaluation.report import over_seeds, results, seeds_table, tables, write_seeds
from drgrpo.evaluation.tables import span
from rows import response_row


def rows_of(samples: int) -> list[dict]:
    """Ten easy and twenty hard problems."""
    return [
        response_row(
            benchmark=name, id=p, sample=k, score=float(p % samples > k if p > easy else p % 2)
        )
        for name, n, easy in (("first", 10, 5), ("second", 20, 2))
        for p in range(n)
        for k in range(samples)
    ]


def printed(table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize(("samples", "words"), [(1, "accuracy %"), (4, "mean@4 %")])
def test_a_mean_of_several_samples_is_named_so(samples, words):
    report = {"settings": {"model": "m", "grader": "correct"}, "counters": {}}
    report |= results(rows_of(samples))
    (table,) = tables(report)
    shown = printed(table)
    assert words in shown and ("same problems" in shown) == (samples > 1)
    if samples > 1:
        average = {key: report[f"average_{key}"] for key in ("interval", "interval_samples")}
        for name, part in [*report["benchmarks"].items(), ("average", average)]:
            (line,) = [line for line in shown.splitlines() if f"│ {name} " in line]
            cells = [cell.strip() for cell in line.split("│")]
            assert cells[3:5] == [span(part["interval"]), span(part["interval_samples"])]
            assert cells[3] != cells[4]
        assert "pass@4 %" in shown and "maj@4 %" in shown


def evaluation(template: str, a: float, b: float) -> dict:
    benchmarks = {"a": {"accuracy": a}, "b": {"accuracy": b}}
    shared = {"template": template, "temperature": 0.5, "average": (a + b) / 2}
    return shared | {"benchmarks": benchmarks}


def test_mean_and_sd_over_seeds():
    several = [(0.1, 0.5), (0.2, 0.4), (0.6, 0.6)]
    reports = [evaluation("r1", a, b) for a, b in several]
    (found,) = over_seeds(reports)
    assert (found["template"], found["temperature"]) == ("r1", 0.5)
    assert found["benchmarks"]["a"] == {
        "mean": pytest.approx(0.3),
        "sd": pytest.approx(stdev([0.1, 0.2, 0.6])),
        "by_seed": [0.1, 0.2, 0.6],
    }
    averages = [0.3, 0.3, 0.6]
    assert found["average"]["mean"] == pytest.approx(fmean(averages))
    assert found["average"]["sd"] == pytest.approx(stdev(averages))
    shown = printed(seeds_table("title", found))
    assert [line.split("│")[1:-1] for line in shown.splitlines() if "│ a " in line] == [
        [" a         ", "   30.0 ", " 26.5 ", "     10.0 ", "      60.0 "]
    ]
    assert "average" in shown


def test_seeds_of_several_templates(tmp_path, capsys):
    """Each template's seeds are put together, in the file and on the terminal."""
    folders: list[Path] = []
    for seed in (4, 5):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        (folder / "responses.jsonl").write_text("")
        parts = [evaluation("r1", 0.1 * seed, 0.5), evaluation("none", 0.2, 0.3)]
        report = {"settings": {"seed": seed, "model": "m"}, "evaluations": parts}
        (folder / "eval.json").write_text(json.dumps(report))
        folders.append(folder)
    write_seeds(tmp_path, folders)
    found = json.loads((tmp_path / "seeds.json").read_text())
    assert found["seeds"] == [4, 5]
    r1, none = found["evaluations"]
    assert r1["benchmarks"]["a"]["by_seed"] == [0.4, 0.5] and r1["benchmarks"]["b"]["sd"] == 0
    assert none["template"] == "none" and none["average"]["mean"] == 0.25
    assert "m, 'none', T=0.5, over 2 seeds" in " ".join(capsys.readouterr().out.split())
