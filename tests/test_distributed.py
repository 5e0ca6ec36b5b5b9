"""Several processes do what one does, on one node and on two."""

import os
import runpy
import socket
import subprocess
import sys
from itertools import chain
from textwrap import indent

import pytest
import torch
import torch.distributed as dist

from drgrpo import distributed
from drgrpo.distributed import any_rank, check_restarts, gather, rank_zero_first, shard
from drgrpo.types import UserError
from runs import ROOT, assert_close_run, finish, launch, small


@pytest.mark.slow
def test_two_processes_equal_one(base, warm_model, tmp_path):
    finish(launch(small(warm_model, tmp_path / "two"), processes=2))
    assert_close_run(base[0], tmp_path / "two")


@pytest.mark.slow
def test_two_nodes_of_two_processes_with_a_copy_each_equal_one(base, warm_model, tmp_path):
    """A real rendezvous between two torchruns on this machine, FSDP2 inside a node and replication
    across (HSDP), and the paper's recomputed log-probs: more collectives, in the same order
    everywhere."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    config = small(warm_model, tmp_path / "nodes", dp_replicate=2)
    rendezvous = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=test")
    rendezvous += (f"--rdzv-endpoint=localhost:{port}",)
    nodes = [
        launch(config, processes=2, torchrun=(*rendezvous, f"--node-rank={rank}"))
        for rank in (0, 1)
    ]
    shown = [finish(node) for node in nodes]
    assert sum("runs on: 4 x cpu" in text for text in shown) == 1
    assert_close_run(base[0], tmp_path / "nodes")


@pytest.mark.slow
def test_one_process_that_is_told_to_stop_stops_all(warm_model, tmp_path):
    prelude = """
import os, signal
from drgrpo.engine_torch import TorchEngine
original, calls = TorchEngine.sync, []
def sync(self, weights):
    calls.append(original(self, weights))
    if len(calls) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
TorchEngine.sync = sync
"""
    shown = finish(
        launch(small(warm_model, tmp_path / "stop", steps=20), processes=2, prelude=prelude)
    )
    assert "stopping after step 1: another process was asked to" in shown
    assert (tmp_path / "stop" / "checkpoints" / "step-000001").exists()


@pytest.mark.parametrize("flags", [{"dp_replicate": 2}, {"tp": 2}], ids=str)
def test_processes_that_do_not_divide_are_refused(warm_model, tmp_path, flags):
    import train

    with pytest.raises(UserError, match="does not divide the 1 processes"):
        train.main(small(warm_model, tmp_path / "run", dtype="bfloat16", **flags))


@pytest.mark.parametrize(("local_rank", "index"), [("3", 3), (None, 0)], ids=["torchrun", "alone"])
def test_a_process_takes_its_own_gpu_and_two_backends(monkeypatch, local_rank, index):
    """NCCL moves the tensors of GPUs. Gloo moves Python objects and the barriers."""
    chosen, groups = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)

    def init_process_group(backend, **options):
        groups.append((backend, options.get("world_size")))

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    for name, value in (("LOCAL_RANK", local_rank), ("RANK", local_rank)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert distributed.start() == (3, 4, torch.device("cuda", index))
    assert chosen == [torch.device("cuda", index)]
    assert groups == [("cpu:gloo,cuda:nccl", None if local_rank else 1)]


def test_restarts_that_would_hang_are_refused(monkeypatch):
    for name, value in (("MAX_RESTARTS", "3"), ("USE_AGENT_STORE", "True")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_restarts()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_restarts()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_restarts()


SHARDS = {1: [["a", "e"], ["b"], ["c"], ["d"]], 2: [["a", "c", "e"]] * 2 + [["b", "d"]] * 2}
"""How four processes share five items, with one and with two processes to a sampler."""


@pytest.mark.parametrize("tp", SHARDS)
def test_samplers_share_the_items_and_gather_them_in_order(monkeypatch, tp):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    for rank, expected in enumerate(SHARDS[tp]):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert shard(list("abcde"), tp) == expected
    sent = []
    monkeypatch.setattr(distributed, "gather_lists", lambda items: sent.append(items) or SHARDS[tp])
    for rank, items in enumerate(SHARDS[tp]):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert gather(items, tp) == list("abcde")
    assert list(chain(*sent)) == list(chain(*SHARDS[tp][::tp])), "an item is sent once"


def test_a_flag_of_one_process_is_a_flag_of_all(monkeypatch):
    monkeypatch.setattr(distributed, "gather_lists", lambda flags: [[False], flags])
    assert any_rank(True) and not any_rank(False)


@pytest.mark.parametrize(
    ("rank", "order"), [(0, ["fill", "barrier"]), (1, ["barrier", "fill"])], ids=["0", "1"]
)
def test_rank_0_fills_a_cache_before_the_others_read_it(monkeypatch, rank, order):
    notes = []
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "barrier", lambda: notes.append("barrier"))
    with rank_zero_first():
        notes.append("fill")
    assert notes == order


# ---- an exception on one of several processes

BLOCKED_CLEANUP = """
import atexit, os, time
atexit.register(time.sleep, 600)  # stands for vLLM's and NCCL's, which wait for the other processes
rank = int(os.environ["RANK"])
"""

RAISE_IN_STEP_2 = """
import train
original, calls = train.train_minibatch, []
def train_minibatch(*args):
    calls.append(1)
    if len(calls) == 3 and rank == {rank}:
        raise RuntimeError("broken")
    return original(*args)
train.train_minibatch = train_minibatch
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_process_is_shown_and_ends_all(warm_model, tmp_path, rank):
    prelude = BLOCKED_CLEANUP + RAISE_IN_STEP_2.format(rank=rank)
    job = launch(small(warm_model, tmp_path / "run"), processes=2, prelude=prelude)
    shown = finish(job, status=1)
    assert f"[rank{rank}]: RuntimeError: broken" in shown and "step    1/2" in shown
    assert "forcefully exiting" not in shown, "torchrun had to kill the other process after 30 s"


@pytest.mark.parametrize("script", ["train.py --recipe tiny --out {out}", "eval.py {eval}"])
def test_both_scripts_leave_hard(random_model, tmp_path, monkeypatch, capsys, script):
    (tmp_path / "set.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    evaluation = f"--model {random_model} --benchmarks {tmp_path}/set.jsonl --out {tmp_path}/run"
    command = script.format(out=tmp_path / "run", eval=evaluation).split()

    def broken(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(distributed, "start", broken)
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(f"left with {status}"))
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="left with 1"):
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    assert "RuntimeError: broken" in capsys.readouterr().err


def pair(body: str) -> list[tuple[int, str]]:
    """Exit status and stderr of two processes that run the same Python in one group. No torchrun
    watches over them."""
    script = f"""{BLOCKED_CLEANUP}
from drgrpo import distributed
from drgrpo.run.cli import hard_exit, user_errors
from drgrpo.types import UserError
with hard_exit(), user_errors():
    distributed.start()
    distributed.any_rank(False)  # both have started
{indent(body, "    ")}
"""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(s.getsockname()[1])}
    command, jobs = [sys.executable, "-c", script], []
    for rank in ("0", "1"):
        env = {**os.environ, **address, "RANK": rank, "WORLD_SIZE": "2"}
        jobs.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE))
    try:
        shown = [job.communicate(timeout=120)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [(job.returncode, text) for job, text in zip(jobs, shown, strict=True)]


ONE_SEES_A_WRONG_SAMPLER = """
import sys, torch
from types import SimpleNamespace
from drgrpo import pack, parity
sequences = [pack.Sequence([1], [2, 3], [-1.0, -2.0], 0.0)] * rank  # rank 0 has none
policy = SimpleNamespace(logprob=lambda batch: torch.full_like(batch.sampler_logprob_N, -1.0))
mean, largest = parity.gap(policy, [pack.pack(sequences)])
assert (mean, largest) == (0.5, 1.0)
try:
    parity.check(mean, largest, torch.float32)
finally:
    print("checked", file=sys.stderr)
    distributed.any_rank(True)  # neither leaves before the other has its numbers
"""


@pytest.mark.slow
def test_one_process_that_sees_a_wrong_sampler_stops_all():
    for status, shown in pair(ONE_SEES_A_WRONG_SAMPLER):
        assert status == 1 and "checked" in shown and "ParityError: trainer and sampler" in shown


@pytest.mark.parametrize(
    ("body", "statuses", "first", "message"),
    [
        ("assert rank == 0\ndistributed.any_rank(True)", [1, 1], 1, "[rank1]: AssertionError"),
        (
            "if rank == 0:\n    raise UserError('no such file')\ndistributed.any_rank(True)",
            [2, 1],
            0,
            "error: no such file",
        ),
        (
            "with distributed.rank_zero_first():\n    assert rank == 1",
            [1, 1],
            0,
            "[rank0]: AssertionError",
        ),
    ],
    ids=["a bug", "a mistake", "rank 0 goes first"],
)
def test_without_torchrun_the_other_process_ends_too(body, statuses, first, message):
    ended = pair(body)
    assert [status for status, _ in ended] == statuses
    assert message in ended[first][1]
    assert "RuntimeError" in ended[1 - first][1], "its collective fails"
