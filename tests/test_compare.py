"""Differences with known answers: a made-up run next to the paper's rows, and two made-up runs."""

import json

import pytest

from drgrpo.data import BENCHMARKS
from drgrpo.evaluation.compare import (
    compare,
    difference,
    next_to_paper,
    pair_up,
    paired,
    with_paper,
)
from drgrpo.evaluation.published import PROTOCOL, PUBLISHED, N
from drgrpo.evaluation.scores import mcnemar, sign_flip, two_proportions
from drgrpo.run.files import append_jsonl
from drgrpo.types import UserError
from rows import response_row

# problems solved, of 30, 83, 500, 272, 675
OAT_ZERO_7B = dict(zip(BENCHMARKS, (13, 52, 400, 82, 277), strict=True))
PAPER = {"model": "sail/Qwen2.5-Math-7B-Oat-Zero"} | PROTOCOL


def benchmark(name: str, scores: list, template: str = "qwen_math") -> list[dict]:
    """Responses with these scores, one per problem. A score may be a list, one per sample."""
    rows = []
    for id, group in enumerate(scores):
        for k, score in enumerate(group if isinstance(group, list) else [group]):
            tag = {"benchmark": name, "template": template, "temperature": 0.0, "id": id}
            tag |= {"sample": k, "problem": f"{name} {id}", "score": float(score)}
            rows.append(response_row(**tag))
    return rows


def solved(counts: dict[str, int]) -> dict[str, list[dict]]:
    scores = {name: [1] * count + [0] * (N[name] - count) for name, count in counts.items()}
    return {name: benchmark(name, scores[name]) for name in counts}


def write(folder, sets: dict[str, list[dict]], settings: dict | None = None) -> str:
    folder.mkdir()
    for rows in sets.values():
        append_jsonl(folder / "responses.jsonl", rows)
    if settings:
        (folder / "eval.json").write_text(json.dumps({"settings": settings}))
    return str(folder)


def row(result: dict, name: str) -> dict:
    return next(r for r in result["published"] if r["name"] == name)


def test_the_papers_own_numbers_differ_by_rounding_only():
    result = next_to_paper(solved(OAT_ZERO_7B), PAPER, "qwen_math", 0.0)
    assert result["departures"] == []
    first = result["published"][0]
    assert first["name"] == "Oat-Zero-7B" and first["same_model"]
    assert len(result["published"]) == len(PUBLISHED)
    assert list(first["scores"]) == [*BENCHMARKS, "average"]
    for cell in first["scores"].values():
        assert abs(cell["difference"]) < 0.0005 + 1e-9 and cell["within_noise"]


def test_noise_is_what_two_proportions_say():
    """5 of 30 and 13 of 30 differ beyond noise, 8 of 30 and 13 of 30 do not."""
    result = next_to_paper(solved(OAT_ZERO_7B), PAPER, "qwen_math", 0.0)
    base = row(result, "Qwen2.5-Math-7B, qwen_math")["scores"]
    assert base["aime24"]["published"] == pytest.approx(0.167)
    assert base["aime24"]["difference"] == pytest.approx(13 / 30 - 0.167)
    assert base["aime24"]["p"] == pytest.approx(two_proportions([(13 / 30, 30, 0.167, 30)]))
    assert base["aime24"]["p"] < 0.05 and not base["aime24"]["within_noise"]
    assert not base["math500"]["within_noise"] and base["math500"]["p"] < 1e-9
    simple_rl = row(result, "SimpleRL-Zero-7B")["scores"]
    assert simple_rl["aime24"]["within_noise"], "5 problems of 30 apart"
    assert base["average"]["difference"] == pytest.approx(result["ours"]["average"] - 0.2648)


def test_four_shot_amc_is_of_forty_problems():
    result = next_to_paper(solved(OAT_ZERO_7B), PAPER, "qwen_math", 0.0)
    cell = row(result, "Qwen2.5-Math-7B, 4-shot")["scores"]["amc"]
    assert cell["p"] == two_proportions([(52 / 83, 83, 0.225, 40)])


def test_departures_from_the_protocol_are_named():
    some = {"aime24": benchmark("aime24", [1, 0])}
    result = next_to_paper(some, PAPER | {"grader": "correct", "samples": 4}, "none", 0.6)
    assert result["departures"] == [
        "temperature is 0.6, the paper's is 0.0",
        "samples is 4, the paper's is 1",
        "grader is correct, the paper's is paper",
        "aime24 has 2 problems here, the paper's has 30",
    ]
    assert "average" not in result["ours"], "not of one benchmark"


def test_re_evaluations_stand_beside_the_papers_rows():
    """AIME25 is compared where a source has it. It is no part of the average."""
    sets = solved(OAT_ZERO_7B) | {"aime25": benchmark("aime25", [1] * 3 + [0] * 27)}
    result = next_to_paper(sets, PAPER, "qwen_math", 0.0)
    assert result["departures"] == []
    assert result["ours"]["average"] == pytest.approx(
        sum(OAT_ZERO_7B[name] / N[name] for name in BENCHMARKS) / 5
    )
    assert "aime25" not in result["published"][0]["scores"]
    assert [r["same_model"] for r in result["reevaluated"]] == [True] * 4 + [False] * 3
    by_name = {r["name"]: r for r in result["reevaluated"]}
    sober = by_name["Oat-Zero-7B, Sober Look"]
    assert sober["scores"]["aime25"]["difference"] == pytest.approx(0.1 - 0.088)
    assert sober["scores"]["amc"]["p"] == two_proportions([(52 / 83, 83, 0.662, 40)])
    assert sober["sd"]["aime24"] == 3.1 and "2504.07086" in sober["source"]
    assert sober["scores"]["average"]["published"] == pytest.approx(0.5036)
    issue = by_name["Oat-Zero-7B, mean@32"]
    assert issue["scores"]["aime24"]["published"] == 0.257
    assert list(issue["scores"]) == ["aime24"] and "vLLM 0.9.0" in issue["protocol"]


def test_aime25_alone_is_not_the_papers():
    with pytest.raises(UserError, match="no scores on aime25"):
        next_to_paper({"aime25": benchmark("aime25", [1])}, {}, "none", 0.0)


def test_paper_on_the_terminal_and_as_json(tmp_path, capsys):
    run = write(tmp_path / "run", solved(OAT_ZERO_7B), PAPER)
    compare(["paper", run], str(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert "this model: Oat-Zero-7B" in shown and "43.3  +0.0 " in shown and "80.0  +0.0 " in shown
    assert "50.6 +29.4*" in shown and "beyond noise" in shown and "20.0 +23.3 " in shown
    words = " ".join(shown.split())
    assert "28.0 +15.3 " in shown and "- │" in shown and "arXiv 2504.02546, the table" in words
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert report["evaluations"][0]["ours"]["aime24"] == pytest.approx(13 / 30)


def test_a_run_without_recorded_settings_says_so(tmp_path):
    result, _ = with_paper(write(tmp_path / "run", solved({"aime24": 3})))
    assert "grader is not recorded, the paper's is paper" in result["evaluations"][0]["departures"]


def test_the_paper_has_no_scores_on_other_sets():
    with pytest.raises(UserError, match="no scores on mine; it has aime24"):
        next_to_paper({"mine": benchmark("mine", [1])}, {}, "none", 0.0)


# ---- two runs


def one_benchmark(a: list, b: list) -> dict:
    return difference({"m": benchmark("m", a)}, {"m": benchmark("m", b)})["benchmarks"]["m"]


def test_single_answers_are_compared_by_mcnemars_test():
    result = one_benchmark([1] * 12 + [0] * 18, [1] * 10 + [0] * 2 + [1] * 9 + [0] * 9)
    assert (result["a_better"], result["b_better"], result["test"]) == (2, 9, "McNemar")
    assert result["p"] == mcnemar(2, 9) and result["difference"] == pytest.approx(7 / 30)
    low, high = result["interval"]
    error = ((11 / 30 - (7 / 30) ** 2) / 30) ** 0.5
    assert (high - low) / 3.92 == pytest.approx(error, rel=0.08)


def test_pairing_sees_what_two_proportions_cannot():
    """Of 100 problems both runs solve the same 50. The second run solves 6 more and loses none,
    which is far from noise."""
    assert one_benchmark([1] * 50 + [0] * 50, [1] * 56 + [0] * 44)["p"] == 2 / 2**6
    assert two_proportions([(0.5, 100, 0.56, 100)]) > 0.3


def test_several_answers_are_compared_by_permutation():
    """B gains 1 on three problems and loses 1/2 on three: a tie by count, and not by size."""
    a = [[0, 0]] * 3 + [[1, 1]] * 3 + [[0, 1]] * 4
    result = one_benchmark(a, [[1, 1]] * 3 + [[0, 1]] * 3 + [[0, 1]] * 4)
    assert (result["test"], result["a_better"], result["b_better"]) == ("sign flip", 3, 3)
    assert result["difference"] == pytest.approx(0.15)
    assert result["p"] == sign_flip([1.0] * 3 + [-0.5] * 3 + [0.0] * 4)
    assert result["p"] < 0.7 < mcnemar(3, 3)


def test_the_average_weighs_benchmarks_and_not_problems():
    a = {"small": benchmark("small", [0] * 10), "large": benchmark("large", [1] * 100)}
    b = {"small": benchmark("small", [1] * 5 + [0] * 5)}
    b |= {"large": benchmark("large", [1] * 90 + [0] * 10)}
    result = difference(a, b)
    assert result["average"]["difference"] == pytest.approx((0.5 - 0.1) / 2)
    assert result["average"]["n"] == 110 and result["left_out"] == []
    assert result["average"]["p"] < 0.2 < difference(a, a)["average"]["p"] == 1


def test_benchmarks_are_resampled_apart():
    """The average of two like benchmarks is surer by sqrt 2. Drawn alike, it would be as unsure as
    one."""
    a, b = benchmark("m", [0, 1] * 200), benchmark("m", [1, 1, 0, 0] * 100)
    result = difference({"x": a, "y": a}, {"x": b, "y": b})
    average, single = result["average"]["interval"], result["benchmarks"]["x"]["interval"]
    ratio = (average[1] - average[0]) / (single[1] - single[0])
    assert ratio == pytest.approx(0.5**0.5, rel=0.08)


def test_runs_on_other_problems_are_refused():
    a = {"m": benchmark("m", [1, 0, 1])}
    message = r"m: the two runs did not answer the same problems: 1 differ.*id 2"
    with pytest.raises(UserError, match=message):
        difference(a, {"m": benchmark("m", [1, 0])})
    changed = benchmark("m", [1, 0, 1])
    changed[0]["problem"] = "another"
    with pytest.raises(UserError, match="id 0"):
        difference(a, {"m": changed})
    with pytest.raises(UserError, match="nothing to compare: one run has m, the other x"):
        difference(a, {"x": benchmark("x", [1])})


def test_a_benchmark_of_one_run_only_is_named(tmp_path, capsys):
    a = write(tmp_path / "a", {"m": benchmark("m", [1, 0]), "x": benchmark("x", [1])})
    b = write(tmp_path / "b", {"m": benchmark("m", [1, 1])})
    compare([a, b], "")
    shown = capsys.readouterr().out
    assert "Not in both runs: x" in shown and "McNemar" in shown and "+50.0" in shown
    assert not (tmp_path / "b" / "compare.json").exists()


def test_which_evaluations_are_paired():
    one, two, three = ("none", 0.0), ("r1", 0.0), ("r1", 1.0)
    assert pair_up({one: 1, two: 1}, {two: 1, three: 1}) == [(two, two)]
    assert pair_up({one: 1}, {three: 1}) == [(one, three)], "a single one goes with a single one"
    with pytest.raises(UserError, match="one has none at T=0, r1 at T=0, the other r1 at T=1"):
        pair_up({one: 1, two: 1}, {three: 1})


def test_runs_are_paired_by_template_and_temperature(tmp_path):
    runs = []
    for name, up in (("a", 0), ("b", 1)):
        sets = {t: benchmark("m", [1, up], template=t) for t in ("none", "r1")}
        runs.append(write(tmp_path / name, sets))
    result, tables = paired(*runs)
    assert [e["a"][1] for e in result["evaluations"]] == ["none", "r1"] and len(tables) == 2
    assert all(e["average"]["difference"] == 0.5 for e in result["evaluations"])


LLAMA = "<s>[INST] {q}\n[/INST]"
"""A prompt of two lines with brackets, which the terminal must not take for its own markup."""


@pytest.mark.parametrize("other", ["paper", "b"])
def test_a_title_shows_a_prompt_on_one_line_and_as_it_is(tmp_path, capsys, other):
    sets = {"aime24": benchmark("aime24", [1, 0], template=LLAMA)}
    runs = [write(tmp_path / name, sets) for name in ("a", "b")]
    compare([runs[0], "paper" if other == "paper" else runs[1]], "")
    titles = [line for line in capsys.readouterr().out.splitlines() if "INST" in line]
    assert len(titles) == (1 if other == "paper" else 2)
    assert all(repr(LLAMA) in title for title in titles)
