"""Helpers of the tests that train: start short runs, in this process or as a user does, and compare
what they left."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import train
from drgrpo import distributed
from drgrpo.config import RECIPES, Config
from drgrpo.run.cli import flag
from drgrpo.run.files import read_jsonl
from drgrpo.run.metrics import TIMES

ROOT = Path(__file__).resolve().parent.parent


START = """
import sys, train
from drgrpo import distributed
from drgrpo.config import parse_args
from drgrpo.run.cli import hard_exit, user_errors
with hard_exit(), user_errors():
    train.main(parse_args(sys.argv[1:]))
    distributed.stop()
"""
"""What train.py does when it is the main program."""


def small(model: str, out: Path, **changes) -> Config:
    """The tiny recipe on a quarter of the rollouts, from a model that is already warm. Groups of
    four: some are all right or all wrong, so that there are responses without advantage."""
    settings = {
        "model": model,
        "prompts_per_step": 16,
        "group_size": 4,
        "minibatches": 2,
        "steps": 2,
        "eval_every": 0,
        "eval_samples": 1,
    }
    return replace(RECIPES["tiny"](), **settings | {"out": str(out)} | changes)


def run(config: Config) -> list[dict]:
    """Train in this process; the rows of metrics.jsonl."""
    train.main(config)
    distributed.stop()
    return metrics(config.out)


def launch(
    config: Config,
    processes: int = 1,
    prelude: str = "",
    torchrun: tuple[str, ...] = ("--standalone",),
):
    """Start the same with torchrun, as a user does; `prelude` is Python that runs before train.py.
    Returns the process."""
    script = Path(config.out).with_suffix(".py")
    script.write_text(f"{prelude}\n{START}")
    arguments: list[str] = []
    for f in fields(config):
        arguments += [f"--{flag(f.name)}", str(getattr(config, f.name))]
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun]
    command += [f"--nproc-per-node={processes}", script, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see drgrpo.distributed.check_restarts
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process, status: int | None = 0) -> str:
    """Wait for it; its output."""
    shown, _ = process.communicate(timeout=300)
    assert status is None or process.returncode == status, shown
    return shown


def metrics(out: Path | str) -> list[dict]:
    return read_jsonl(Path(out) / "metrics.jsonl")


def without_times(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32).state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, metrics and evaluations are equal to the last bit."""
    assert without_times(metrics(one)) == without_times(metrics(other))
    assert read_jsonl(one / "eval.jsonl") == read_jsonl(other / "eval.jsonl")
    a, b = weights(one), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_close_run(one: Path, other: Path) -> None:
    """The same up to the order of sums. Adam divides by the gradient's own size: where that is near
    zero, rounding moves a weight by a share of lr = 3e-4."""
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        for column in ("loss", "grad_norm", "reward_mean", "entropy", "clip_frac", "tokens"):
            assert ours[column] == pytest.approx(theirs[column], rel=1e-4), column
    a, b = weights(one), weights(other)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
