"""A run folder belongs to one config, records every start, and holds no step twice."""

import json
from dataclasses import asdict, replace

import pytest

from drgrpo.config import RECIPES
from drgrpo.run import folder
from drgrpo.types import UserError


@pytest.fixture
def config(tmp_path):
    return replace(RECIPES["tiny"](), out=str(tmp_path / "run"))


def test_a_new_or_empty_folder_is_free(config):
    folder.check(config)
    config.folder.mkdir()
    folder.check(config)


def test_a_run_that_was_killed_as_it_wrote_its_config_begins_again(config, monkeypatch):
    def killed(path, value):
        path.with_name(f"{path.name}.partial").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.open_run(config, 0, {})
    folder.check(config)
    (config.folder / "thesis.tex").write_text("the only copy")
    with pytest.raises(UserError, match="holds no run"):
        folder.check(config)


def test_a_folder_with_something_else_in_it_is_refused(config):
    config.folder.mkdir()
    (config.folder / "thesis.tex").write_text("the only copy")
    with pytest.raises(UserError, match="holds no run"):
        folder.check(config)


@pytest.mark.parametrize(
    ("changes", "suggestion"),
    [
        ({"algo": "grpo"}, "run-grpo"),
        ({"seed": 4}, "run-seed4"),
        ({"lr": 1e-5, "algo": "rloo"}, "run-rloo-lr1e-05"),
        ({"train_data": "math_12k"}, "run-2"),
    ],
    ids=["algo", "seed", "two", "data"],
)
def test_another_config_is_refused_with_a_name_for_its_own_folder(config, changes, suggestion):
    folder.open_run(config, 0, {})
    with pytest.raises(UserError, match="another config") as error:
        folder.check(replace(config, **changes))
    assert str(error.value).endswith(suggestion)


def test_a_run_from_before_a_field_existed_resumes_with_its_default(config):
    folder.open_run(config, 0, {})
    saved = asdict(config)
    del saved["lora_rank"]
    (config.folder / "config.json").write_text(json.dumps(saved))
    folder.check(config)
    with pytest.raises(UserError, match="lora_rank=0 there, 8 now"):
        folder.check(replace(config, lora_rank=8))


def test_fields_that_decide_only_when_and_how_may_change(config):
    folder.open_run(config, 0, {})
    folder.check(replace(config, steps=500, save_every=7, keep=9, max_hours=2.0))


def test_resume_never_refuses_a_folder_with_checkpoints(config):
    folder.open_run(config, 0, {})
    folder.check(replace(config, resume="never"))
    (config.folder / "checkpoints" / "step-000001").mkdir()
    with pytest.raises(UserError, match="--resume is never"):
        folder.check(replace(config, resume="never"))


def test_checkpoints_are_listed_newest_first_and_partial_ones_are_not(config):
    for name in ("step-000002", "step-000010", "step-000011.partial"):
        (config.folder / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in folder.list_checkpoints(config.folder)] == [
        "step-000010",
        "step-000002",
    ]


def test_records_are_cut_back_to_the_checkpoint_and_torn_lines_go(config):
    folder.open_run(config, 0, {})
    metrics = config.folder / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "re')
    folder.open_run(config, 2, {})
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_run_without_a_checkpoint_evaluates_again(config):
    folder.open_run(config, 0, {})
    (config.folder / "eval.jsonl").write_text('{"step": 0}\n')
    folder.open_run(config, 0, {})
    assert (config.folder / "eval.jsonl").read_text() == ""


def test_the_config_is_written_as_it_is_used_and_every_start_is_recorded(config):
    folder.open_run(config, 0, {"commit": "abc"})
    folder.open_run(config, 7, {"commit": "def-dirty"})
    assert json.loads((config.folder / "config.json").read_text()) == asdict(config)
    starts = json.loads((config.folder / "run.json").read_text())
    assert [(s["resumed_step"], s["commit"]) for s in starts] == [(0, "abc"), (7, "def-dirty")]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config_is_named(config, content):
    folder.open_run(config, 0, {})
    (config.folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json (is not readable as|must hold a) JSON"):
        folder.check(config)
