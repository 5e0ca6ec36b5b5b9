"""Step lines, tables and records say what was measured."""

import importlib.util
import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from drgrpo.run.log import Log, Stopwatch, read_jsonl
from drgrpo.types import UserError

ROW = {
    "step": 7,
    "reward_mean": 0.25,
    "response_len_mean": 20.0,
    "response_len_correct": None,
    "response_len_incorrect": 21.0,
    "truncated_frac": 0.5,
    "entropy": 0.1,
    "clip_frac": None,
    "grad_norm": 0.125,
    "parity_max": 1e-6,
    "tokens_per_s": 12345.6,
    "hours_used": 0.5,
    "mfu": 0.451,
    "gb": {"rollout": 3.0, "train": 61.04},
    "seconds": {"rollout": 1.25, "grade": 0.001, "total": 2.5},
}


def test_the_stopwatch_adds_up_phases_and_total():
    watch = Stopwatch()
    for _ in range(2):
        with watch("rollout"):
            time.sleep(0.01)
    seconds = watch.read()
    assert 0.02 <= seconds["rollout"] <= seconds["total"]


def test_records_are_json_lines_and_refuse_nan(tmp_path):
    log = Log(tmp_path, active=True)
    log.record("metrics", {"a": 1}, {"a": None})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"a": 1}, {"a": None}]
    with pytest.raises(ValueError, match="JSON"):
        log.record("metrics", {"a": float("nan")})


def test_a_step_line_shows_phases_and_budget(tmp_path, capsys):
    Log(tmp_path, active=True).step(ROW, steps=100, budget_hours=27.0)
    line = capsys.readouterr().out
    for part in (
        "step    7/100",
        "reward 0.250",
        "right - wrong 21.0 cut 50%",
        "2.50 s (rollout 1.25)",
        "12,346 tok/s",
        "mfu 45.1%  61.0 GB",
    ):
        assert part in line
    assert line.endswith("0.500 of 27 h\n")


def test_trackers_get_the_numbers_flat(tmp_path):
    log, seen = Log(tmp_path, active=True), []
    log.trackers.append(lambda row, step: seen.append((step, row)))
    log.step(ROW, steps=100, budget_hours=27.0)
    ((step, row),) = seen
    assert (
        step == 7
        and row["seconds/rollout"] == 1.25
        and row["gb/train"] == 61.04
        and row["reward_mean"] == 0.25
    )
    assert "clip_frac" not in row and "seconds" not in row


class FakeWriter:
    """Stands for TensorBoard's writer, which is not installed here."""

    def __init__(self, folder):
        self.folder, self.scalars = folder, []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass


def test_tensorboard_and_wandb_get_every_step(tmp_path, monkeypatch):
    writers, logged = [], []
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder: writers.append(FakeWriter(folder)) or writers[-1]
    client = ModuleType("wandb")
    client.init = lambda **kwargs: SimpleNamespace(
        log=lambda row, step: logged.append((kwargs["project"], step, row))
    )
    for name, module in (("torch.utils.tensorboard", board), ("wandb", client)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    log = Log(tmp_path, active=True)
    log.track(tensorboard=True, wandb="math", config={"lr": 1})
    log.step(ROW, steps=100, budget_hours=27.0)
    assert (
        writers[0].folder == tmp_path / "tensorboard"
        and ("reward_mean", 0.25, 7) in writers[0].scalars
    )
    assert logged[0][:2] == ("math", 7) and logged[0][2]["seconds/rollout"] == 1.25


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_an_error(tmp_path, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    with pytest.raises(UserError, match=f"pip install {package}"):
        Log(tmp_path, active=True).track(
            tensorboard=package == "tensorboard", wandb="p" * (package == "wandb"), config={}
        )


def test_the_stopwatch_names_the_phase_before_it_begins_and_measures_memory():
    phases = []
    watch = Stopwatch(phases.append)
    with watch("train"):
        assert phases == ["train"]
    assert 0.01 < watch.gb["train"] < 100


def test_other_ranks_are_silent(tmp_path, capsys):
    log = Log(tmp_path, active=False)
    log.say("hello")
    log.record("metrics", {"a": 1})
    with log.steps(1, 2) as steps:
        assert list(steps) == [1, 2]
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_without_a_terminal_there_are_plain_lines_only(tmp_path, capsys):
    log = Log(tmp_path, active=True)
    with log.steps(3, 5) as steps:
        for step in steps:
            log.say(f"step {step}")
    assert capsys.readouterr().out == "step 3\nstep 4\nstep 5\n"


def test_the_table_shows_first_and_last_evaluation(tmp_path, capsys):
    rows = [
        {
            "step": s,
            "benchmark": "held_out",
            "temperature": 0.0,
            "samples": 1,
            "accuracy": a,
            "len_correct": 18.0,
            "len_incorrect": None,
            "truncated_frac": 0.0,
        }
        for s, a in ((0, 0.25), (10, 0.5), (20, 0.75))
    ]
    Log(tmp_path, active=True).table(rows, "run")
    shown = capsys.readouterr().out
    assert "0.250" in shown and "0.750" in shown and "0.500" not in shown and "step 20" in shown
    json.dumps(rows)
