"""`make gpu` as far as a machine without a GPU can show: every part runs at toy sizes, a bad part
costs nothing but itself."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu
from conftest import ROOT

PYTHON = [sys.executable, "-u", "-c"]
PARTS = "ceilings tests_linear_drgrpo_gpu kernel step_rehearsal rollout tiny budget"
FILES = {"gpu.json", "summary.md", "log.txt", "kernel.png", "step_rehearsal.png", "budget.png"}


@pytest.fixture(scope="module")
def rehearsal(warm_model, tmp_path_factory):
    """(what the command said, its results folder)."""
    out = tmp_path_factory.mktemp("gpu") / "results"
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--seconds", "2000"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    log = (out / "log.txt").read_text() if out.exists() else ""
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log[-4000:]}"
    return done.stdout, out


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(rehearsal):
    said, out = rehearsal
    result = json.loads((out / "gpu.json").read_text())
    assert " ".join(result["runs"]) == PARTS
    assert result["status"] == "everything passed" and result["rehearsal"]
    for name, row in result["runs"].items():
        assert row["status"] == "passed" and 0 < row["seconds"] < row["limit"], name
        assert row["result"] and row["figures"] and row["figures"] in said, name
        assert "not shown" not in row["figures"]


@pytest.mark.slow
def test_a_rehearsal_leaves_what_each_part_measured(rehearsal):
    runs = json.loads((rehearsal[1] / "gpu.json").read_text())["runs"]
    ceilings = runs["ceilings"]["result"]
    assert ceilings["copy_gb_per_s"] > 0.1 and "flash_attn" in ceilings["missing"]
    outcomes = runs["tests_linear_drgrpo_gpu"]["result"]["outcomes"].values()
    assert set(outcomes) == {"SKIPPED (needs a CUDA device)"}
    assert {"rows", "sweep"} <= runs["kernel"]["result"].keys()
    assert runs["rollout"]["result"]["engines"]["torch"]["gap_max"] < 1e-3
    tiny = runs["tiny"]["result"]
    assert tiny["steps"] == 14 and all(tiny["checks"].values())
    assert tiny["reward_last"] > tiny["reward_first"] + 0.05
    notes = "\n".join(runs["budget"]["result"]["notes"])
    assert "measured: ceilings.copy_gb_per_s" in notes and "ceilings.gemm_tflops" in notes


@pytest.mark.slow
def test_the_summary_of_a_rehearsal_is_complete_and_the_folder_small(rehearsal):
    out = rehearsal[1]
    text, log = (out / "summary.md").read_text(), (out / "log.txt").read_text()
    assert text.startswith("# Rehearsal: everything passed") and "not shown" not in text
    for name in PARTS.split():
        assert f"| {name} | passed |" in text and f"==== {name}: passed" in log
    for line in ("- not installed: ", "- kernel: CCE: needs CUDA", "- rollout: vllm: "):
        assert line in text
    assert "## Skipped" in text and "| everything on |" in text
    assert {path.name for path in out.iterdir()} == FILES


def test_on_a_gpu_at_most_eight_files_come_out(tmp_path):
    parts = gpu.make_parts(tmp_path, tmp_path, rehearse=False)
    plain = ("ceilings", "rollout", "tiny")
    pictures = [part for part in parts if part.result and part.name not in plain]
    assert len(pictures) + len(["gpu.json", "summary.md", "log.txt"]) == 8
    names = [part.name for part in parts]
    assert names[:4] == ["ceilings", "tests_linear_drgrpo_gpu", "tests_model", "tests_train"]


def run_some(tmp_path, parts: list[gpu.Part], seconds: float) -> gpu.Report:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir(), out.mkdir()
    report = gpu.Report(out, rehearsal=True)
    gpu.run_parts(parts, report, work, seconds, {**os.environ, "PYTHONFAULTHANDLER": "1"})
    return report


@pytest.mark.slow
def test_a_part_that_hangs_is_killed_at_its_limit_and_costs_nothing_else(tmp_path):
    """With its children; what it had written stays, and so does what came before."""
    child = tmp_path / "child"
    half = {"engines": {"half": {"skipped": "done"}}}
    hang = f"""
import pathlib, subprocess, time
pathlib.Path({str(tmp_path / "work" / "hangs.json")!r}).write_text({json.dumps(half)!r})
stubborn = subprocess.Popen(["sh", "-c", "trap '' ABRT TERM; exec sleep 600"])
pathlib.Path({str(child)!r}).write_text(str(stubborn.pid))
def stuck():
    time.sleep(600)
stuck()
"""
    parts = [
        gpu.Part("first", "", [*PYTHON, "print('hello')"], 1),
        gpu.Part("hangs", "", [*PYTHON, hang], 2, "hangs.json"),
        gpu.Part("last", "", [*PYTHON, "print('bye')"], 1),
    ]
    start = time.monotonic()
    report = run_some(tmp_path, parts, seconds=8)
    assert time.monotonic() - start < 10
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())["runs"]
    assert written == report.runs
    assert [row["status"] for row in written.values()] == ["passed", "timeout", "passed"]
    hangs = written["hangs"]
    assert hangs["result"] == half
    assert hangs["limit"] <= hangs["seconds"] < hangs["limit"] + 1.5
    assert written["last"]["limit"] > 1.5, "the hung part took more than its share"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "hello" in log and "bye" in log and "in stuck" in log, "where it hung"
    with pytest.raises(ProcessLookupError):
        while True:  # init may take a moment to bury it
            os.kill(int(child.read_text()), 0)
            assert time.monotonic() - start < 20, "a child lives on"


def test_a_part_that_fails_says_why_and_the_next_one_runs(tmp_path):
    wrong = "print('far'); raise ValueError('7 is not 8')"
    codes = {"wrong": wrong, "right": "pass"}
    parts = [gpu.Part(name, "", [*PYTHON, code], 1) for name, code in codes.items()]
    report = run_some(tmp_path, parts, seconds=20)
    assert [row["status"] for row in report.runs.values()] == ["failed", "passed"]
    row = report.runs["wrong"]
    assert row["reason"] == row["figures"] == "ValueError: 7 is not 8"


SLEEP = "import time; time.sleep(60)"


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("raise SystemExit(1)", 1), (SLEEP, 1)])
def test_exit_status(tmp_path, monkeypatch, capsys, code, status):
    monkeypatch.setattr(gpu, "make_parts", lambda *_: [gpu.Part("only", "", [*PYTHON, code], 1)])
    assert gpu.main(["--rehearse", "--out", str(tmp_path), "--seconds", "3"]) == status
    assert ("everything passed" if status == 0 else "not passed: only") in capsys.readouterr().out


def test_test_outcomes_are_read_while_they_come(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "collected 4 items\n\ntests/test_x.py::test_a[1-a b] PASSED   [ 25%]\n"
        "tests/test_x.py::test_b FAILED\ntests/test_x.py::test_c SKIPPED (no x (y))  [ 75%]\n"
        "tests/test_x.py::test_d "
    )
    outcomes = {"test_a[1-a b]": "PASSED", "test_b": "FAILED", "test_c": "SKIPPED (no x (y))"}
    assert gpu.test_outcomes(log) == {"outcomes": outcomes}
    assert gpu.tests_line(gpu.test_outcomes(log)) == "1 passed, 1 failed, 1 skipped"


def test_whole_models_alone_give_constants_to_the_budget():
    phases = {"forward": 1.0, "head + loss": 1.0, "backward": 2.0, "pack": 1.0, "optimizer": 5.0}
    case = {"rows": [{"mfu": 0.2, "seconds": {"median": 10.0}, "phases": phases}]}
    case |= {"checkpointing": "full", "tokens_per_microbatch": 16384}
    case |= {"response_tokens": 900, "responses": 3}
    cases = {"7b": case, "half": case | {"left_out": "14 layers"}}
    (row,) = gpu.step_constants("Qwen2.5-7B", {"cases": cases})
    size = {"checkpointing": "full", "microbatch": 16384, "length": 300}
    assert row == {"model": "Qwen2.5-7B", "mfu": 0.5} | size


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}"]
    arguments = f"ARGS=--out {tmp_path / 'out'}"
    done = subprocess.run([*command, arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    message, from_make = done.stderr.splitlines()
    assert message.startswith("make gpu: torch ") and "Error 2" in from_make
    assert "sees no CUDA device; `make gpu ARGS=--rehearse`" in message
