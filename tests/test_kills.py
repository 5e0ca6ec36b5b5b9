"""The script that kills runs notices a difference and a failure."""

import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from bench.experiments import kills
from bench.experiments.kills import CASES, config_of, differences, kill_case


def test_the_shares_of_all_cases_are_a_whole():
    assert sum(share for _, _, share in CASES.values()) == pytest.approx(1)
    engines = {config_of(name, "m", Path("out")).engine for name in CASES}
    assert engines == {"torch", "vllm"} and {processes for _, processes, _ in CASES.values()} == {
        1,
        2,
    }
    carried = [bool(config_of(name, "m", Path("out")).carry_over) for name in CASES]
    assert carried == ["carry-over" in name for name in CASES]


@pytest.fixture
def finished(tmp_path):
    """The folder of a run that is over."""
    run = tmp_path / "run"
    (run / "hf").mkdir(parents=True)
    (run / "hf" / "model.safetensors").write_bytes(b"weights")
    rows = {"metrics": {"step": 1, "loss": 0.5, "seconds": {"train": 1.0}, "hours_used": 0.1}}
    rows |= {"samples": {"step": 1, "response": "y"}, "eval": {"step": 1, "accuracy": 0.25}}
    for name, row in rows.items():
        (run / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return run


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("metrics.jsonl", "0.5", "0.5000001", ["metrics.jsonl"]),
        ("metrics.jsonl", '"train": 1.0', '"train": 2.0', []),
        ("samples.jsonl", '"y"', '"n"', ["samples.jsonl"]),
        ("eval.jsonl", "0.25", "0.5", ["eval.jsonl"]),
        ("hf/model.safetensors", "weights", "weighty", ["model.safetensors"]),
    ],
)
def test_two_runs_differ_if_anything_but_a_time_does(finished, tmp_path, file, old, new, found):
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    assert differences(finished, other) == []
    (other / file).write_text((other / file).read_text().replace(old, new))
    assert differences(finished, other) == found


def test_the_table_adds_up():
    rows = {
        "a": {"kills": 3, "runs": 1, "differing": 0},
        "b": {"kills": 4, "runs": 2, "differing": 1},
    }
    assert kills.table(rows).endswith("| b | 4 | 2 | 1 |\n| all | 7 | 3 | 1 |")


def in_new_process(function: Callable, *arguments):
    """The script forks. A fork of this process would inherit what other tests leave in torch, such
    as threads and the state of `torch.distributed`."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "torch, two processes, carry-over"])
def test_killed_runs_end_as_the_uninterrupted_one(warm_model, tmp_path, name):
    row = in_new_process(kill_case, name, warm_model, tmp_path, 3, random.Random(0))
    assert row["kills"] >= 3 and row["runs"] >= 1 and row["differing"] == 0
    assert sum(row["after_saving"].values()) == row["kills"]
    assert list(tmp_path.glob("*/")) == [], "run folders are removed"


def kill_case_at_another_rate(*arguments):
    def other_rate(config, environment):
        if config.folder.name == "killed":
            config = replace(config, lr=2 * config.lr)
        one_process(config, environment)

    one_process, kills.one_process = kills.one_process, other_rate
    return kill_case(*arguments)


@pytest.mark.slow
def test_a_run_that_ends_differently_is_counted_and_kept(warm_model, tmp_path):
    arguments = ("torch", warm_model, tmp_path, 1, random.Random(0))
    row = in_new_process(kill_case_at_another_rate, *arguments)
    assert row["differing"] == row["runs"]
    kept = Path(row["kept"][0]["kept"])
    assert "model.safetensors" in row["kept"][0]["files"]
    assert (kept / "run" / "metrics.jsonl").exists() and (kept / "output.txt").stat().st_size
    shutil.rmtree(kept)


def kill_case_that_is_broken(*arguments):
    def broken(config):
        raise ValueError("broken")

    kills.train.main = broken
    return kill_case(*arguments)


@pytest.mark.slow
def test_a_start_that_fails_by_itself_ends_the_script(warm_model, tmp_path):
    (tmp_path / "straight").mkdir()
    arguments = ("torch", warm_model, tmp_path, 1, random.Random(0))
    with pytest.raises(RuntimeError, match="torch fails without a kill: see ") as error:
        in_new_process(kill_case_that_is_broken, *arguments)
    kept = Path(str(error.value).rpartition(" ")[2])
    assert "ValueError: broken" in (kept / "output.txt").read_text()
    shutil.rmtree(kept)
