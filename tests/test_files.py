"""Files are written completely or not at all, and hold valid JSON."""

import pytest

from drgrpo.run.files import append_jsonl, read_jsonl, read_object, write_atomically, write_json
from drgrpo.types import UserError


def test_rows_come_back_in_order_and_nan_is_refused(tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", [{"a": 1}])
    append_jsonl(tmp_path / "metrics.jsonl", [{"a": None}])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"a": 1}, {"a": None}]
    with pytest.raises(ValueError, match="JSON"):
        append_jsonl(tmp_path / "metrics.jsonl", [{"a": float("nan")}])
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "run.json", float("inf"))


@pytest.mark.parametrize("content", ["text", b"bytes"])
def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch, content):
    path = tmp_path / "eval.json"
    write_atomically(path, "old")

    def fail(self, target):
        raise OSError("killed before the rename")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", fail)
        with pytest.raises(OSError, match="killed"):
            write_atomically(path, content)
    assert path.read_text() == "old"
    write_atomically(path, content)
    assert path.read_bytes() in (b"text", b"bytes")


def test_a_line_that_is_not_complete_does_not_count(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"step": 1}]
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"step": 1}, {"step": 2}]
    (tmp_path / "rows.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="delimiter"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_files_that_differ_in_their_ending_do_not_share_a_partial(tmp_path):
    (tmp_path / "eval.json.partial").write_text("another writer's")
    write_atomically(tmp_path / "eval.jsonl", "rows")
    assert (tmp_path / "eval.json.partial").read_text() == "another writer's"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON: Expecting property name"),
        ("[" * 5000, "not readable as JSON: it nests too deeply"),
        (b"\xff{}", "not readable as JSON"),
        ("[1]", "must hold a JSON object, not a list"),
    ],
    ids=["broken", "deep", "no text", "no object"],
)
def test_what_holds_no_object_is_one_line(tmp_path, content, message):
    path = tmp_path / "config.json"
    write_atomically(path, '{"a": 1}')
    assert read_object(path) == {"a": 1}
    write_atomically(path, content)
    with pytest.raises(UserError, match=message):
        read_object(path)
    with pytest.raises(UserError, match="Is a directory"):
        read_object(tmp_path)
