"""`make gpu` as far as a machine without a GPU can show: every part runs at toy sizes, a bad part
costs nothing but itself.

pytest tests/test_gpu.py
"""

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
PARTS = ["ceilings", "tests_linear_drgrpo", "kernel", "step_rehearsal", "rollout", "tiny", "budget"]


@pytest.fixture(scope="module")
def rehearsal(warm_model, tmp_path_factory):
    """(what the command said, its results folder)."""
    out = tmp_path_factory.mktemp("gpu") / "results"
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--rehearse",
        "--out",
        str(out),
        "--seconds",
        "2000",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = (out / "log.txt").read_text() if out.exists() else ""
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log[-4000:]}"
    return done.stdout, out


def test_a_rehearsal_runs_every_part(rehearsal):
    said, out = rehearsal
    result = json.loads((out / "gpu.json").read_text())
    assert (
        list(result["runs"]) == PARTS
        and result["status"] == "everything passed"
        and result["rehearsal"]
    )
    for name, row in result["runs"].items():
        assert (
            row["status"] == "passed"
            and 0 < row["seconds"] < row["limit"]
            and row["result"]
            and row["figures"]
        ), name
        assert "not shown" not in row["figures"] and row["figures"] in said


def test_what_it_found_is_what_it_says(rehearsal):
    runs = json.loads((rehearsal[1] / "gpu.json").read_text())["runs"]
    assert (
        runs["ceilings"]["result"]["copy_gb_per_s"] > 0.1
        and "flash_attn" in runs["ceilings"]["result"]["missing"]
    )
    assert set(runs["tests_linear_drgrpo"]["result"]["outcomes"].values()) == {
        "SKIPPED (needs a CUDA device)"
    }
    assert {"rows", "sweep"} <= runs["kernel"]["result"].keys()
    assert runs["rollout"]["result"]["engines"]["torch"]["gap_max"] < 1e-3
    tiny = runs["tiny"]["result"]
    assert (
        tiny["steps"] == 14
        and tiny["reward_last"] > tiny["reward_first"] + 0.05
        and all(tiny["checks"].values())
    )
    budget = "\n".join(runs["budget"]["result"]["notes"])
    assert (
        "measured: ceilings.copy_gb_per_s" in budget and "measured: ceilings.gemm_tflops" in budget
    )


def test_the_summary_is_complete_and_the_folder_small(rehearsal):
    out = rehearsal[1]
    text = (out / "summary.md").read_text()
    assert text.startswith("# Rehearsal: everything passed") and "not shown" not in text
    assert all(f"| {name} | passed |" in text for name in PARTS)
    for line in (
        "## Skipped",
        "- not installed: ",
        "- kernel: CCE: needs CUDA",
        "- rollout: vllm: ",
        "| everything on |",
    ):
        assert line in text
    assert {path.name for path in out.iterdir()} == {
        "gpu.json",
        "summary.md",
        "log.txt",
        "kernel.png",
        "step_rehearsal.png",
        "budget.png",
    }
    assert all(f"==== {name}: passed" in (out / "log.txt").read_text() for name in PARTS)


def test_on_a_gpu_at_most_eight_files_come_out(tmp_path):
    parts = gpu.make_parts(tmp_path, tmp_path, rehearse=False)
    drawn = [
        part for part in parts if part.result and part.name not in ("ceilings", "rollout", "tiny")
    ]
    assert len(drawn) + len(["gpu.json", "summary.md", "log.txt"]) == 8
    assert [part.name for part in parts][:4] == [
        "ceilings",
        "tests_linear_drgrpo",
        "tests_model",
        "tests_train",
    ]


def run_some(tmp_path, parts: list[gpu.Part], seconds: float) -> gpu.Report:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir(), out.mkdir()
    report = gpu.Report(out, rehearsal=True)
    gpu.run_parts(parts, report, work, seconds, {**os.environ, "PYTHONFAULTHANDLER": "1"})
    return report


def test_a_part_that_hangs_is_killed_at_its_limit_and_costs_nothing_else(tmp_path):
    """With its children; what it had written stays, and so does what came before."""
    child = tmp_path / "child"
    hang = f"""
import json, pathlib, subprocess, time
pathlib.Path({str(tmp_path / "work" / "hangs.json")!r}).write_text(json.dumps({{"engines": {{"half": {{"skipped": "done"}}}}}}))
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
    assert written == report.runs and [row["status"] for row in written.values()] == [
        "passed",
        "timeout",
        "passed",
    ]
    assert written["hangs"]["result"] == {"engines": {"half": {"skipped": "done"}}}
    assert (
        written["hangs"]["limit"] <= written["hangs"]["seconds"] < written["hangs"]["limit"] + 1.5
    )
    assert written["last"]["limit"] > 1.5, "the hung part took more than its share"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "hello" in log and "bye" in log and "in stuck" in log, "where it hung"
    with pytest.raises(ProcessLookupError):
        while True:  # init may take a moment to bury it
            os.kill(int(child.read_text()), 0)
            assert time.monotonic() - start < 20, "a child lives on"


def test_a_part_that_fails_says_why_and_the_next_one_runs(tmp_path):
    parts = [
        gpu.Part("wrong", "", [*PYTHON, "print('far'); raise ValueError('7 is not 8')"], 1),
        gpu.Part("right", "", [*PYTHON, "pass"], 1),
    ]
    report = run_some(tmp_path, parts, seconds=20)
    assert [row["status"] for row in report.runs.values()] == ["failed", "passed"]
    assert (
        report.runs["wrong"]["reason"]
        == report.runs["wrong"]["figures"]
        == "ValueError: 7 is not 8"
    )


SLEEP = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("code", "reason"), [("raise SystemExit('no core')", "failed: no core"), (SLEEP, "not done")]
)
def test_a_part_whose_background_work_fails_or_lasts_is_not_begun(tmp_path, code, reason):
    part = gpu.Part("tiny", "", [*PYTHON, "print(6 * 7)"], 1, after=("warmup",))
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir(), out.mkdir()
    with open(work / "warmup.log", "w") as log:
        process = gpu.start([*PYTHON, code], log, dict(os.environ))
    report = gpu.Report(out, rehearsal=True)
    gpu.run_parts([part], report, work, 2.0, dict(os.environ), {"warmup": process})
    gpu.end(process)
    assert report.runs["tiny"]["status"] == "failed" and reason in report.runs["tiny"]["reason"]
    assert "42" not in (out / "log.txt").read_text()


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("raise SystemExit(1)", 1), (SLEEP, 1)])
def test_exit_status(tmp_path, monkeypatch, capsys, code, status):
    monkeypatch.setattr(gpu, "make_parts", lambda *_: [gpu.Part("only", "", [*PYTHON, code], 1)])
    assert gpu.main(["--rehearse", "--out", str(tmp_path), "--seconds", "3"]) == status
    assert ("everything passed" if status == 0 else "not passed: only") in capsys.readouterr().out


def test_test_outcomes_are_read_while_they_come(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "collected 4 items\n\ntests/test_x.py::test_a[1-a b] PASSED   [ 25%]\ntests/test_x.py::test_b FAILED\n"
        "tests/test_x.py::test_c SKIPPED (no x (y))  [ 75%]\ntests/test_x.py::test_d "
    )
    outcomes = {"test_a[1-a b]": "PASSED", "test_b": "FAILED", "test_c": "SKIPPED (no x (y))"}
    assert gpu.test_outcomes(log) == {"outcomes": outcomes}
    assert gpu.figures("tests_x", gpu.test_outcomes(log)) == "1 passed, 1 failed, 1 skipped"


def test_whole_models_alone_give_constants_to_the_budget():
    phases = {
        "pack": 1.0,
        "old log-probs": 0.0,
        "forward": 1.0,
        "head + loss": 1.0,
        "backward": 2.0,
        "optimizer": 5.0,
    }
    row = {"mfu": 0.2, "seconds": {"median": 10.0}, "phases": phases}
    case = {
        "checkpointing": "full",
        "tokens_per_microbatch": 16384,
        "response_tokens": 900,
        "responses": 3,
        "rows": [row],
    }
    step = gpu.step_constants(
        "7b", {"cases": {"7b": case, "half": case | {"left_out": "14 layers"}}}
    )
    assert step == [
        {
            "model": "Qwen2.5-7B",
            "checkpointing": "full",
            "microbatch": 16384,
            "length": 300,
            "mfu": 0.5,
        }
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    done = subprocess.run(
        [
            "make",
            "--no-print-directory",
            "gpu",
            f"PYTHON={sys.executable}",
            f"ARGS=--out {tmp_path / 'out'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    message, from_make = done.stderr.splitlines()
    assert (
        message.startswith("make gpu: torch ")
        and "sees no CUDA device; `make gpu ARGS=--rehearse`" in message
    )
    assert "Error 2" in from_make
