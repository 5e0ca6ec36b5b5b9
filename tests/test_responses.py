"""responses.jsonl: complete problems are kept, a torn end is cut off, and responses to other
settings are not continued."""

import pytest

from drgrpo.evaluation.responses import (
    evaluations,
    groups,
    key,
    read,
    recorded,
    resume_rows,
    too_long,
)
from drgrpo.run.files import append_jsonl, write_json
from drgrpo.types import Problem, UserError

REPORT = {"settings": {"model": "m", "samples": 2, "out": "a"}, "versions": {"torch": "2"}}


def rows_of(ids, samples: int = 2) -> list[dict]:
    tag = {"benchmark": "b", "template": "none", "temperature": 1.0}
    return [tag | row for id in ids for row in too_long(Problem(id, "é" * 3, "a"), samples)]


def write(out, rows: list[dict]) -> bytes:
    append_jsonl(out / "responses.jsonl", rows)
    write_json(out / "eval.json", REPORT | {"counters": {"grader_timeouts": 3}})
    return (out / "responses.jsonl").read_bytes()


def test_an_empty_folder_has_nothing(tmp_path):
    assert resume_rows(tmp_path, REPORT, set()) == ([], {})
    (tmp_path / "responses.jsonl").touch()
    assert resume_rows(tmp_path, REPORT, set()) == ([], {})


def test_rows_are_resumed_with_their_report(tmp_path):
    text = write(tmp_path, rows_of(range(3)))
    rows, saved = resume_rows(tmp_path, REPORT, set())
    assert rows == rows_of(range(3)) and saved["counters"] == {"grader_timeouts": 3}
    assert (tmp_path / "responses.jsonl").read_bytes() == text


def test_wherever_the_file_was_cut_complete_problems_remain(tmp_path):
    text = write(tmp_path, rows_of(range(3)))
    problem = len(text) // 3
    for cut in range(1, len(text), 7):
        (tmp_path / "responses.jsonl").write_bytes(text[:cut])
        rows, _ = resume_rows(tmp_path, REPORT, set())
        assert rows == rows_of(range(cut // problem))
        assert (tmp_path / "responses.jsonl").read_bytes() == text[: cut // problem * problem]


def test_other_settings_are_named(tmp_path):
    write(tmp_path, rows_of([0]))
    other = {"settings": {"model": "n", "samples": 2, "out": "b"}, "versions": {"torch": "3"}}
    message = 'model is "m" there and "n" now; torch is "2" there and "3" now'
    with pytest.raises(UserError, match=message) as error:
        resume_rows(tmp_path, other, may_change={"out"})
    assert "out is" not in str(error.value) and "another --out" in str(error.value)
    assert read(tmp_path) == rows_of([0]), "and nothing is lost"


def test_responses_of_unknown_origin_are_not_continued(tmp_path):
    write(tmp_path, rows_of([0]))
    (tmp_path / "eval.json").unlink()
    with pytest.raises(UserError, match=r"without the eval\.json"):
        resume_rows(tmp_path, REPORT, set())


def test_a_file_or_its_folder_can_be_read(tmp_path):
    write(tmp_path, rows_of([4]))
    for path in (tmp_path, tmp_path / "responses.jsonl"):
        assert read(path) == rows_of([4])
        assert recorded(path)["settings"] == REPORT["settings"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"id": 1}\n', "responses.jsonl:1 lacks benchmark, template"),
        ("7\n", "responses.jsonl:1 lacks benchmark"),
        ('{"id": 1', "responses.jsonl:1: broken JSON.*interrupted"),
    ],
    ids=["empty", "columns", "no object", "torn"],
)
def test_what_eval_did_not_write_is_refused(tmp_path, text, message):
    (tmp_path / "responses.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no responses at .*nowhere"):
        read(tmp_path / "nowhere")


def test_grouping():
    rows = rows_of([0, 1])
    rows += [r | {"template": "r1"} for r in rows_of([0])]
    rows += [r | {"benchmark": "c"} for r in rows_of([0])]
    assert [(k, list(sets)) for k, sets in evaluations(rows).items()] == [
        (("none", 1.0), ["b", "c"]),
        (("r1", 1.0), ["b"]),
    ]
    by_problem = [list(map(key, group)) for group in groups(rows)]
    assert by_problem == [
        [("none", 1.0, "b", 0)] * 2,
        [("none", 1.0, "b", 1)] * 2,
        [("none", 1.0, "c", 0)] * 2,
        [("r1", 1.0, "b", 0)] * 2,
    ]


@pytest.mark.parametrize(("name", "value"), [("temperature", []), ("id", "0"), ("tokens", None)])
def test_a_value_of_another_type_is_refused(tmp_path, name, value):
    write(tmp_path, [row | {name: value} for row in rows_of([0])])
    with pytest.raises(UserError, match=rf"jsonl:1 has .* for {name}; this takes files"):
        read(tmp_path)


def test_a_damaged_report_is_named(tmp_path):
    write(tmp_path, rows_of([0]))
    (tmp_path / "eval.json").write_text("[]")
    with pytest.raises(UserError, match=r"eval.json must hold a JSON object"):
        recorded(tmp_path)
    with pytest.raises(UserError, match=r"eval.json must hold a JSON object"):
        resume_rows(tmp_path, {"settings": {}, "versions": {}}, set())
