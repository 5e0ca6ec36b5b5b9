"""A run that is killed, interrupted, damaged or crashed resumes as if nothing had happened."""

import json
import os
import random
import signal

import pytest
import torch

from drgrpo.engine_torch import TorchEngine
from drgrpo.run.folder import list_checkpoints
from runs import assert_close_run, assert_same_run, finish, launch, metrics, run, small

SETTINGS = {"save_every": 1, "eval_every": 2, "steps": 4, "keep": 3}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(warm_model, tmp_path_factory):
    """Four steps without interruption."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    run(small(warm_model, out, **SETTINGS))
    return out


@pytest.fixture(autouse=True)
def default_handlers(restored_handlers):
    """The tests send this process signals."""


@pytest.mark.parametrize("old_logprob", ["recompute", "sampler"])
def test_a_resumed_run_continues_as_if_it_had_never_stopped(
    warm_model, straight, tmp_path, old_logprob
):
    settings = SETTINGS | {"old_logprob": old_logprob}
    run(small(warm_model, tmp_path / "halves", **settings | {"steps": 2}))
    with open(tmp_path / "halves" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "torn')  # killed while it wrote a step that no checkpoint holds
    run(small(warm_model, tmp_path / "halves", **settings))
    if old_logprob == "recompute":
        straight = tmp_path / "straight"
        run(small(warm_model, straight, **settings))
    assert_same_run(straight, tmp_path / "halves")
    left = sorted(p.name for p in (tmp_path / "halves" / "checkpoints").iterdir())
    assert left == ["latest", "step-000002", "step-000003", "step-000004"]


KILL = """
import os, signal, torch
from drgrpo.run import checkpoint
from drgrpo.engine_torch import TorchEngine

def kill_at(owner, name, count):
    original, calls = getattr(owner, name), []
    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, patched)

kill_at({owner}, {name!r}, {count})
"""


@pytest.mark.parametrize(
    ("owner", "name", "most"),
    [
        ("TorchEngine", "_forward", 150),  # some token of some rollout or evaluation
        ("torch.optim.AdamW", "step", 7),  # some update
        ("checkpoint", "save_hf", 3),  # half a checkpoint is written
        ("checkpoint", "commit", 3),  # it is complete, with its records, but has no name yet
        ("checkpoint", "replace_symlink", 5),  # it has its name, and `latest` is older
    ],
    ids=["rollout", "update", "save", "before commit", "in commit"],
)
def test_killed_at_a_random_moment_it_resumes_bit_for_bit(
    warm_model, straight, tmp_path, owner, name, most
):
    count = random.Random(f"{owner}.{name}").randint(2, most)
    config = small(warm_model, tmp_path / "killed", **SETTINGS)
    prelude = KILL.format(owner=owner, name=name, count=count)
    shown = finish(launch(config, prelude=prelude), status=None)
    assert "SIGKILL" in shown or "exitcode: -9" in shown or "Signal 9" in shown, shown
    assert not (tmp_path / "killed" / "checkpoints" / "step-000004").exists(), (
        "it was not killed in time"
    )
    run(config)
    assert_same_run(straight, tmp_path / "killed")


CARRY = SETTINGS | {"carry_over": 0.25, "carry_steps": 2, "steps": 5}


@pytest.fixture(scope="module")
def carried(warm_model, tmp_path_factory):
    """Five steps that leave responses to the next one, without interruption."""
    out = tmp_path_factory.mktemp("runs") / "carried"
    rows = run(small(warm_model, out, **CARRY))
    assert all(row["carried"] and row["waiting"] for row in rows[:4]), "nothing was carried"
    return out


def test_a_time_limit_between_any_two_steps_changes_no_bit_of_what_is_carried(
    warm_model, carried, tmp_path
):
    for step in range(1, 6):
        rows = run(small(warm_model, tmp_path / "limited", **CARRY, max_hours=1e-9))
        assert len(rows) == step
    assert_same_run(carried, tmp_path / "limited")


@pytest.mark.parametrize("count", [240, 470, 510])  # tokens: in the rollouts of steps 2, 3 and 4
def test_killed_while_it_goes_on_with_responses_it_resumes_bit_for_bit(
    warm_model, carried, tmp_path, count
):
    config = small(warm_model, tmp_path / "killed", **CARRY)
    prelude = KILL.format(owner="TorchEngine", name="_forward", count=count)
    shown = finish(launch(config, prelude=prelude), status=None)
    assert "SIGKILL" in shown or "exitcode: -9" in shown or "Signal 9" in shown, shown
    assert (list_checkpoints(tmp_path / "killed")[0] / "pending.jsonl").exists()
    run(config)
    assert_same_run(carried, tmp_path / "killed")


def test_another_number_of_processes_goes_on_with_what_is_carried(warm_model, tmp_path):
    """Nothing is lost and nothing doubled, in either direction."""
    out = tmp_path / "moved"
    for processes in (2, 1, 2):
        config = small(warm_model, out, **CARRY, max_hours=1e-9)  # one step
        finish(launch(config, processes=processes))
        assert metrics(out)[-1]["carried"] and metrics(out)[-1]["waiting"]
    run(small(warm_model, out, **CARRY))
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert sum(row["responses"] for row in rows) == 5 * 64
    trained = sum(row["responses"] * row["response_len_mean"] for row in rows)
    assert sum(row["tokens"] for row in rows) == pytest.approx(trained)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_asked_to_stop_it_saves_and_ends_in_good_order(
    warm_model, straight, tmp_path, monkeypatch, capsys, number
):
    original, calls = TorchEngine.sync, []

    def signal_in_second_step(self, named_weights):
        calls.append(original(self, named_weights))
        if len(calls) == 3:  # the first sync is at the start
            os.kill(os.getpid(), number)

    settings = SETTINGS | {"save_every": 0}
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "sync", signal_in_second_step)
        run(small(warm_model, tmp_path / "asked", **settings))
    assert f"stopping after step 2: {number.name}" in capsys.readouterr().out
    assert [p.name for p in list_checkpoints(tmp_path / "asked")] == ["step-000002"]
    run(small(warm_model, tmp_path / "asked", **settings))
    assert_same_run(straight, tmp_path / "asked")


@pytest.mark.parametrize("pattern", ["state/*.distcp", "trainer.json"])
def test_a_damaged_checkpoint_costs_one_step_and_nothing_else(
    warm_model, straight, tmp_path, capsys, pattern
):
    run(small(warm_model, tmp_path / "hurt", **SETTINGS | {"steps": 3}))
    (file,) = (tmp_path / "hurt" / "checkpoints" / "step-000003").glob(pattern)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    run(small(warm_model, tmp_path / "hurt", **SETTINGS))
    shown = capsys.readouterr().out
    assert (
        "WARNING" in shown
        and "step-000003 is damaged" in shown
        and "resumed from" in shown
        and "step-000002" in shown
    )
    assert_same_run(straight, tmp_path / "hurt")


def test_resuming_on_another_number_of_processes(warm_model, straight, tmp_path):
    config = small(warm_model, tmp_path / "two", **SETTINGS | {"steps": 2})
    finish(launch(config, processes=2))
    run(small(warm_model, tmp_path / "two", **SETTINGS))
    assert_close_run(straight, tmp_path / "two")


CRASH_ONCE = """
import os
from drgrpo.engine_torch import TorchEngine
original, calls = TorchEngine.generate, []
def generate(self, *args):
    calls.append(1)  # the seventh is the rollout of step 3, after four evaluations
    first = os.environ["RANK"] == os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if len(calls) == 7 and first:
        raise RuntimeError("illegal memory access")
    return original(self, *args)
TorchEngine.generate = generate
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_crashed_sampler_ends_the_run_and_torchrun_starts_it_again(
    warm_model, straight, tmp_path, processes
):
    config = small(warm_model, tmp_path / "crashed", **SETTINGS)
    restart = ("--standalone", "--max-restarts=1")
    shown = finish(launch(config, processes, prelude=CRASH_ONCE, torchrun=restart))
    assert "RuntimeError: illegal memory access" in shown and "after step 2" in shown
    same = {1: assert_same_run, 2: assert_close_run}[processes]  # sums have another order
    same(straight, tmp_path / "crashed")
    starts = json.loads((tmp_path / "crashed" / "run.json").read_text())
    assert [start["resumed_step"] for start in starts] == [0, 2]


def test_non_finite_gradients_are_skipped_counted_kept_and_stop_the_run(
    warm_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *a, **k: torch.tensor(float("nan"))
    )
    with pytest.raises(FloatingPointError, match="3 optimizer steps in a row"):
        run(small(warm_model, tmp_path / "nan"))
    rows = metrics(tmp_path / "nan")
    assert [r["skipped_updates"] for r in rows] == [2] and rows[0]["grad_norm"] is None
    batches = torch.load(
        tmp_path / "nan" / "nonfinite-step-000002-update-0-rank-0.pt", weights_only=False
    )
    assert batches and len(batches[0].target_N) > 0


def test_a_single_bad_step_is_skipped_and_training_goes_on(warm_model, tmp_path, monkeypatch):
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def once(*args, **kwargs):
        calls.append(1)
        return torch.tensor(float("inf")) if len(calls) == 2 else original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", once)
    rows = run(small(warm_model, tmp_path / "once"))
    assert [r["skipped_updates"] for r in rows] == [1, 0] and rows[1]["grad_norm"] > 0
