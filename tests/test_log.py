"""Step lines and records show what was measured."""

import importlib.util
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from drgrpo.run.files import read_jsonl
from drgrpo.run.log import Log, Stopwatch
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


def test_a_step_line_shows_what_was_measured_and_records_it(tmp_path, capsys):
    Log(tmp_path, active=True).step(ROW, [{"response": "#4"}], steps=100)
    line = capsys.readouterr().out
    for part in (
        "step    7/100",
        "reward 0.250",
        "right - wrong 21.0 cut 50%",
        "2.50 s (rollout 1.25)",
        "12,346 tok/s",
        "mfu 45.1%  61.0 GB  0.500 h  eta 0.06 h",
    ):
        assert part in line
    assert read_jsonl(tmp_path / "metrics.jsonl") == [ROW]
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"response": "#4"}]


def test_trackers_get_the_numbers_flat(tmp_path):
    log, seen = Log(tmp_path, active=True), []
    log.trackers.append(lambda numbers, step: seen.append((step, numbers)))
    log.step(ROW, [], steps=100)
    ((step, numbers),) = seen
    assert step == 7 and numbers["reward_mean"] == 0.25
    assert numbers["seconds/rollout"] == 1.25 and numbers["gb/train"] == 61.04
    assert "clip_frac" not in numbers and "seconds" not in numbers


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

    def init(**kwargs):
        return SimpleNamespace(log=lambda row, step: logged.append((kwargs["project"], step, row)))

    client.init = init
    for name, module in (("torch.utils.tensorboard", board), ("wandb", client)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    log = Log(tmp_path, active=True)
    log.track(tensorboard=True, wandb="math", config={"lr": 1})
    log.step(ROW, [], steps=100)
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


def test_on_a_gpu_memory_is_what_the_gpu_has_in_use_once_its_work_is_done(monkeypatch):
    """vLLM sleeps in the second phase: its 46 GiB are free for CUDA and allocated for PyTorch."""
    gib, notes, free = 2**30, [], iter([4, 50, 30])

    def mem_get_info():
        notes.append("memory")
        return next(free) * gib, 80 * gib

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: notes.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70 * gib)
    watch = Stopwatch()
    for phase in ("rollout", "train", "train"):
        with watch(phase):
            notes.append(phase)
    assert watch.gb == {"rollout": 76.0, "train": 50.0}
    assert notes[:3] == ["rollout", "synchronize", "memory"]


def test_an_evaluation_line_says_how_it_sampled(tmp_path, capsys):
    row = {"step": 20, "benchmark": "held_out", "accuracy": 0.5, "len_correct": 18.0}
    row |= {"len_incorrect": None, "truncated_frac": 0.0, "samples": 3}
    log = Log(tmp_path, active=True)
    for temperature in (0.0, 1.0):
        log.evaluation(row | {"temperature": temperature})
    greedy, sampled = capsys.readouterr().out.splitlines()
    assert "held_out greedy: accuracy 0.500  len right 18.0 wrong -" in greedy
    assert "held_out T=1 x3: accuracy 0.500" in sampled
    assert len(read_jsonl(tmp_path / "eval.jsonl")) == 2


def test_square_brackets_are_no_markup(tmp_path, capsys):
    Log(tmp_path, active=True).say("weights [bold]q[/bold] [0]")
    assert capsys.readouterr().out == "weights [bold]q[/bold] [0]\n"


def test_other_ranks_are_silent(tmp_path, capsys):
    log = Log(tmp_path, active=False)
    log.say("hello")
    log.step(ROW, [{}], steps=1)
    log.evaluation({})
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
