"""Several processes do what one does, on one node and on two."""

import socket

import pytest

from drgrpo.distributed import check_restarts, gather, shard
from drgrpo.types import UserError
from runs import assert_close_run, finish, launch, small


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


def test_shard_and_gather_are_inverse(group_of_one):
    assert gather(shard(list("abcde"))) == list("abcde")
