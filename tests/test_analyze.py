"""The base-model analyses of a responses file whose counts are known by hand."""

import json

import pytest
from matplotlib.figure import Figure

from drgrpo.evaluation.analyze import analyze, bars, draw, entries_of, keywords
from drgrpo.evaluation.scores import sign_flip
from drgrpo.run.files import append_jsonl
from rows import response_row


def response(id, sample, text, score, parsed, tokens, **other) -> dict:
    row = {"id": id, "sample": sample, "response": text, "score": score, "parsed": parsed}
    return response_row(**row, tokens=tokens, **other)


ROWS = [
    response(0, 0, "Let me recheck this. Recheck done.", 1.0, True, 10),
    response(0, 1, "plain", 0.0, True, 20),
    response(1, 0, "plain", 0.0, False, 90, finished=False),
    response(1, 1, "plain", 1.0, True, 30),
    response(2, 0, "I will RETHINK and double-check", 0.0, True, 40),
    response(2, 1, "rechecking", 0.0, False, 50),
    response(0, 0, "of another benchmark", 0.0, True, 60, benchmark="c"),
    response(0, 1, "of another benchmark", 0.0, True, 80, benchmark="c"),
    response(3, 0, None, 0.0, False, 0),
    response(3, 1, None, 0.0, False, 0),
    response(0, 0, "x" * 7, 1.0, True, 5, template="none", temperature=0.2),
]


@pytest.fixture
def entries():
    return entries_of(ROWS)


def test_answers_by_template(entries):
    qwen, none = entries
    assert (qwen["template"], qwen["temperature"]) == ("qwen_math", 1.0)
    assert (none["template"], none["temperature"]) == ("none", 0.2)
    assert (qwen["questions"], qwen["responses"]) == (4, 8)
    assert (qwen["extractable"], qwen["accuracy"], qwen["truncated"]) == (6 / 8, 2 / 8, 1 / 8)
    assert (none["questions"], none["extractable"]) == (1, 1.0)


def test_lengths_of_the_three_kinds(entries):
    assert entries[0]["tokens"] == {"unformatted": 70, "correct": 20, "incorrect": 50}
    assert entries[1]["tokens"] == {"unformatted": None, "correct": 5, "incorrect": None}
    assert entries[1]["characters"]["correct"] == 7


def test_exploration(entries):
    assert entries[0]["pass_at"] == {"1": 0.25, "2": 0.5}, (
        "problem 0 of one benchmark is not problem 0 of the other"
    )
    assert entries[1]["pass_at"] == {"1": 1.0}


def test_self_reflection(entries):
    r = entries[0]["reflection"]
    assert (r["questions"], r["responses"]) == (2 / 4, 3 / 8)
    assert r["keywords"] == {"recheck": 2, "double-check": 1, "rethink": 1}
    assert (r["n_with"], r["accuracy_with"]) == (3, 1 / 3)
    assert (r["n_without"], r["accuracy_without"]) == (5, 1 / 5)
    within = {"questions": 1, "difference": 1.0, "p": sign_flip([1.0])}
    assert r["within"] == within, "only question 0 has both kinds"
    other = entries[1]["reflection"]
    assert other["accuracy_with"] is None and other["within"]["p"] is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Let's CHECK AGAIN.", {"check again"}),
        (
            "we re-evaluate, reevaluated and a reevaluation",
            {"re-evaluate", "reevaluate", "reevaluation"},
        ),
        ("go over the steps; reconsidering", {"go over the steps", "reconsider"}),
        ("check it again, unreconsidered prethink", set()),
    ],
)
def test_keywords(text, found):
    assert keywords(text) == found


def test_nothing_but_prompts_that_do_not_fit():
    (entry,) = entries_of(ROWS[8:10])
    assert entry["responses"] == 0 and entry["extractable"] is None and entry["pass_at"] == {}


def test_the_table_the_json_and_the_figure(tmp_path, capsys, entries):
    append_jsonl(tmp_path / "responses.jsonl", ROWS)
    analyze(str(tmp_path / "responses.jsonl"), "")
    shown = capsys.readouterr().out
    for text in ("qwen_math, 1", "none, 0.2", "recheck 2", "75.0"):
        assert text in shown
    assert json.loads((tmp_path / "analysis.json").read_text())["evaluations"] == entries
    assert (tmp_path / "analysis.png").read_bytes()[:4] == b"\x89PNG"


def test_the_figure_shows_the_numbers(entries):
    figure = draw(entries)
    answers, explores, reflects, lengths = figure.axes
    assert [bar.get_height() for bar in answers.patches] == [0.75, 1.0, 0.25, 1.0]
    assert [bar.get_height() for bar in lengths.patches] == [70, 0, 20, 5, 50, 0]
    assert reflects.patches[0].get_height() == 0.5
    assert {line.get_label(): line.get_ydata().tolist() for line in explores.lines} == {
        "qwen_math, pass@1": [0.25],
        "qwen_math, pass@2": [0.5],
        "none, pass@1": [1.0],
    }


def test_a_missing_value_has_no_bar():
    axes = Figure().subplots()
    bars(axes, ["a"], {"x": [None]})
    assert axes.patches[0].get_height() == 0
