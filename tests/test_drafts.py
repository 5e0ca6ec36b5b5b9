"""What bench/experiments/drafts.py counts, on made-up tokens."""

import json
import sys

from bench.experiments import drafts
from bench.experiments.drafts import Match, Text, measure, replay
from drgrpo.types import Completion, Problem, Rollout

MATCH = Match(shortest=2, longest=3, draft=4)


def rollout(prompt: list[int], response: list[int]) -> Rollout:
    return Rollout(
        Problem(0, "", "", prompt), Completion(response, [0.0] * len(response), True), ""
    )


def text(*tokens: int) -> Text:
    return Text(list(tokens), MATCH)


def test_a_draft_is_what_followed_the_longest_and_latest_match():
    assert text(1, 2, 5, 6, 1, 2).draft([]) == [5, 6, 1, 2]
    assert text(1, 2, 5, 1, 2, 6, 1, 2).draft([]) == [6, 1, 2], "the latest of two"
    assert text(9, 1, 2, 5, 8, 1, 2, 6, 9, 1, 2).draft([]) == [5, 8, 1, 2], "three before two"
    assert text(1, 2, 3, 4).draft([]) == [], "the end itself is no match"
    assert text(2, 5, 6, 2).draft([]) == [], "one token is too short"


def test_a_longer_match_elsewhere_comes_before_the_texts_own():
    own = text(1, 2, 5, 9, 1, 2)
    assert own.draft([text(1, 2, 7)]) == [5, 9, 1, 2]
    assert own.draft([text(9, 1, 2, 7)]) == [7]


def test_a_step_brings_the_right_tokens_and_one_more():
    """Draft of the second step: 3 4 5 6. The third token of it is wrong."""
    case = rollout([1, 2, 3, 4, 5, 6, 1], [2, 3, 4, 9, 9, 8])
    assert replay(case, [], [], Text(case.problem.prompt_ids, MATCH)) == {
        "tokens": 6,
        "steps": 4,
        "drafted": 4,
        "right": 2,
    }
    started = Text([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 9], MATCH)
    assert replay(case, [], [], started) == {"tokens": 2, "steps": 2, "drafted": 0, "right": 0}


def test_a_response_may_end_inside_a_draft():
    case = rollout([1, 2, 3, 4, 5, 6, 1], [2, 3, 4])
    counts = replay(case, [], [], Text(case.problem.prompt_ids, MATCH))
    assert counts == {"tokens": 3, "steps": 2, "drafted": 4, "right": 2}


def test_a_response_of_the_group_is_looked_up_once_it_is_finished():
    case = rollout([0], [1, 2, 3, 4, 5, 6])
    counts = {}
    for length in (4, 5):
        other = Text([1, 2, 3, 4, 5][:length], MATCH)
        counts[length] = replay(case, [], [other], Text([0], MATCH))["right"]
    assert counts == {4: 0, 5: 0}
    assert replay(case, [], [text(3, 4, 5, 6)], Text([0], MATCH))["right"] == 2
    assert replay(case, [text(1, 2, 3, 4, 5)], [], Text([0], MATCH))["right"] == 3


def test_every_kind_of_draft_gets_its_counts(monkeypatch):
    monkeypatch.setattr(drafts, "TAIL", 1)
    today = [rollout([0], [2, 3, 7]), rollout([0], [1, 2, 9, 1, 2, 3, 7, 8])]
    earlier = [rollout([0], [7, 7, 7]), rollout([0], [2, 3, 7, 8])]
    rows = measure(today, earlier, 2, MATCH)
    assert [row["kind"] for row in rows] == list(drafts.KINDS)
    assert {row["tokens"] for row in rows} == {11}
    assert {row["tail"] for row in rows} == {5}
    assert [row["right"] for row in rows] == [0, 3, 1, 3]
    assert [row["tail_with_drafts"] for row in rows] == [5, 4, 4, 4]


def test_it_replaces_the_row_of_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drafts, "sample", lambda config, path, step: [rollout([0], [1, 2, 3])] * 8)
    out = tmp_path / "drafts.json"
    for name in ("one", "two", "one"):
        given = ["drafts", "a", "b", "--name", name, "--out", str(out), "--recipe", "tiny"]
        monkeypatch.setattr(sys, "argv", given)
        drafts.main()
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == ["two", "one"]
    assert rows[0]["kinds"][0]["tokens"] == 24
    assert "| own, group |" in capsys.readouterr().out
