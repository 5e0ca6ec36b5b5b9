"""`make gpu` as far as a machine without a GPU can show: every part runs at toy sizes, a bad part
costs nothing but itself."""

import argparse
import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import bench_rollout, bench_teardown, gpu
from bench.harness import run_limited
from conftest import ROOT

VLLM = importlib.util.find_spec("vllm")
PYTHON = [sys.executable, "-u", "-c"]
PARTS = "ceilings tests_linear_drgrpo_gpu kernel pieces rollout tiny_vllm tiny teardown"
PARTS += " step_rehearsal budget"
PIECES = {"dX 128", "dX 128, split in 3", "dX 128, large workspace"}
PIECES |= {"dW written", "dW accumulated", "dW product and sum"}
PIECES |= {"row pass, bfloat16", "row pass, float32"}
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
    pieces = {row["what"]: row["ms"]["p50"] for row in runs["pieces"]["result"]["rows"]}
    assert pieces.keys() == PIECES and min(pieces.values()) > 0
    assert runs["rollout"]["result"]["engines"]["torch"]["gap_max"] < 1e-3
    cases = {row["variant"]: row["seconds"] for row in runs["teardown"]["result"]["rows"]}
    assert len(cases) == 4 and max(cases.values()) < 8
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
    missing = () if VLLM else ("- rollout: vllm: vLLM is not", "- tiny_vllm: vLLM is not")
    for line in ("- not installed: ", "- kernel: CCE: needs CUDA", *missing):
        assert line in text
    assert "## Skipped" in text and "| everything on |" in text
    assert {path.name for path in out.iterdir()} == FILES


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(VLLM is None, reason="vLLM is not installed: make env-test")
def test_a_rehearsal_builds_vllm_with_both_heads_and_trains_with_it(rehearsal):
    runs = json.loads((rehearsal[1] / "gpu.json").read_text())["runs"]
    engines = runs["rollout"]["result"]["engines"]
    ours, other = engines["vllm"], engines["vllm_model_head"]
    assert (ours["dtype"], other["head_dtype"]) == ("bfloat16", "torch.bfloat16")
    assert ours["variants"].keys() == bench_rollout.VARIANTS.keys()
    assert list(ours["few"]) == list(map(str, bench_rollout.FEW))
    assert min(ours["variants"].values()) > 0 and ours["runner"].startswith("vllm.v1.worker.")
    for row in (ours, other):
        assert set(bench_rollout.STAGES.values()) < row["memory"].keys()
        assert 0 < row["gap_mean"] < row["stale_gap_mean"] / 10
        assert "key-value cache" in row["ledger"]
    assert 0 < ours["after_sleep"]["gap_mean"] < ours["stale_gap_mean"] / 10
    tried = runs["tiny_vllm"]["result"]
    assert tried["steps"] == 4 and all(tried["checks"].values()) and len(tried["checks"]) == 5


def test_the_kernel_is_reported_by_case_and_a_reason_is_given_once():
    ours = {"contender": "fused (this repository)", "model": "7B"}
    rows = [ours | {"case": case, "ratio": 1.1} for case in ("on-policy", "logprob")]
    whys = ("needs CUDA", "needs CUDA", "gives no log-probs alone", None)
    rows += [{"contender": "CCE", "skipped": why} for why in whys]
    line = "7B on-policy 1.100 x the bare GEMMs; 7B logprob 1.100 x the bare GEMMs"
    assert gpu.kernel_line({"rows": rows}) == line
    left_out = gpu.left_out({"kernel": {"result": {"rows": rows}}})
    assert left_out == ["kernel: CCE: needs CUDA", "kernel: CCE: gives no log-probs alone"]


def without(monkeypatch, *packages: str) -> None:
    """These are not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in packages else find(name)
    )


@pytest.mark.parametrize("vllm", [False, True])
def test_the_shares_of_the_time_leave_the_kernel_enough(tmp_path, monkeypatch, vllm):
    find = importlib.util.find_spec
    found = {"vllm": object() if vllm else None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.get(name) or find(name))
    if not vllm:
        without(monkeypatch, "vllm")
    parts = gpu.make_parts(tmp_path, tmp_path, rehearse=False)
    limits, rest = {}, gpu.SECONDS  # where every part takes all that it gets
    for i, part in enumerate(parts):
        limits[part.name] = rest * part.share / sum(p.share for p in parts[i:])
        rest -= limits[part.name]
    assert limits["kernel"] > 95
    assert limits["rollout"] > (180 if vllm else 60)
    assert min(limits.values()) > 10


def test_without_pytest_its_parts_are_left_out(tmp_path, monkeypatch):
    without(monkeypatch, "pytest")
    names = [part.name for part in gpu.make_parts(tmp_path, tmp_path, rehearse=False)]
    assert names[:2] == ["ceilings", "kernel"]


def test_on_a_gpu_at_most_eight_files_come_out(tmp_path, monkeypatch):
    without(monkeypatch, "vllm")
    parts = gpu.make_parts(tmp_path, tmp_path, rehearse=False)
    plain = ("ceilings", "pieces", "rollout", "tiny_vllm", "tiny", "teardown")
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


# ---- what comes out, of results as a GPU may leave them

STAGE = {"seconds": 3.0, "kept_gib": 2.5, "peak_gib": 4.0}
BUILT = {
    "dtype": "bfloat16",
    "head_dtype": "torch.float32",
    "runner": "vllm.v1.worker.gpu.model_runner",
    "v2_runner": True,
    "memory": {"weights": STAGE, "graphs": STAGE, "all": {"seconds": 60.0, "kept_gib": 12.0}},
    "ledger": {"vLLM weights": 2.9, "key-value cache": 8.0},
}
SAMPLED = {
    "tokens_per_s": 12345.6,
    "tail_share": 0.25,
    "variants": {"as in training": 20000.0, "seeds off": 21000.0},
    "steady": {"sequences": 256, "prompt": 120, "length": 128, "tokens_per_s": 20000.0},
    "stale_gap_mean": 0.5,
    "sync_s": 1.25,
    "gap_mean": 0.004,
    "gap_max": 0.25,
    "after_sleep": {"sleep": STAGE | {"kept_gib": -11.0}, "gap_mean": 0.004},
}


def reported(tmp_path, name: str, result: dict) -> tuple[str, str]:
    """(the part's line, the summary) of a result."""
    row = {"title": name, "status": "passed", "limit": 9.0, "seconds": 1.0, "result": result}
    row["figures"] = gpu.shown(lambda: gpu.LINES[name.split("_")[0]](result))
    return row["figures"], gpu.summary(gpu.Report(tmp_path, False, runs={name: row}))


def test_the_summary_has_vllms_memory_beside_the_ledgers(tmp_path):
    engines = {"vllm": BUILT | SAMPLED, "vllm_model_head": BUILT | {"head_dtype": "bfloat16"}}
    line, text = reported(tmp_path, "rollout", {"shape": "1.5b", "engines": engines})
    assert line.startswith("vllm: 12,346 tok/s, sync 1.25 s, log-probs off by 4.0e-03 nats")
    assert line.endswith("vllm_model_head: building")
    for cells in (
        "its LM head computes in | torch.float32 | bfloat16",
        "its V2 runner | True | True",
        "tokens/s, one length, seeds off | 21,000 | -",
        "after it, at most | 2.5e-01 | -",
        "GiB kept: graphs | 2.50 | 2.50",
        "GiB at the peak: weights | 4.00 | 4.00",
        "GiB kept: sleep | -11.00 | -",
        "GiB in the ledger: key-value cache | 8.00 | 8.00",
    ):
        assert f"| {cells} |" in text
    assert "GiB at the peak: all" not in text


@pytest.mark.parametrize("keys", range(len(BUILT | SAMPLED)))
def test_a_half_written_rollout_is_shown_as_far_as_it_goes(tmp_path, keys):
    row = dict(list((BUILT | SAMPLED).items())[:keys])
    line, text = reported(tmp_path, "rollout", {"engines": {"vllm": row, "torch": {}}})
    assert line.startswith("vllm: ") and line.endswith("torch: building")
    assert "not shown" not in text
    gpu.constants({"rollout": {"result": {"engines": {"vllm": row}}}}, False)


def test_vllm_gives_constants_to_the_budget_at_the_size_of_a_real_model():
    def parts(shape: str) -> dict:
        result = {"shape": shape, "engines": {"vllm": BUILT | SAMPLED}}
        return gpu.constants({"rollout": {"result": result}}, False)["parts"]

    model = {"model": "Qwen2.5-1.5B"}
    assert parts("1.5b")["rollout"] == [model | SAMPLED["steady"]]
    assert parts("1.5b")["sync"] == [model | {"seconds": 1.25}]
    assert parts("tiny") == {"ceilings": {}, "step": []}


def test_what_failed_in_a_rollout_is_named_with_what_it_had_measured(tmp_path):
    failed = BUILT | SAMPLED | {"failed": "ended with status -6", "ledger": "does not fit"}
    engines = {"vllm": failed, "torch": {"skipped": "not reached: 9 s left"}}
    line, text = reported(tmp_path, "rollout", {"engines": engines})
    assert line.startswith("vllm: ended with status -6; 12,346 tok/s")
    assert "- rollout: torch: not reached: 9 s left" in text and "not shown" not in text
    assert bench_rollout.complaints({"engines": engines}) == ["vllm ended with status -6"]


@pytest.mark.parametrize("stage", ["row", "after_sleep"])
def test_a_sync_that_leaves_the_log_probs_off_is_a_complaint(stage):
    good = {"stale_gap_mean": 0.5, "gap_mean": 0.004, "after_sleep": {"gap_mean": 0.004}}
    assert bench_rollout.complaints({"engines": {"vllm": good, "torch": {}}}) == []
    (good if stage == "row" else good["after_sleep"])["gap_mean"] = 0.2
    (wrong,) = bench_rollout.complaints({"engines": {"vllm": good}})
    assert "2.0e-01 nats off after a sync, 5.0e-01 before" in wrong


def test_a_process_that_dies_costs_the_other_engines_nothing(tmp_path, monkeypatch):
    limits = {}
    monkeypatch.setattr(bench_rollout.importlib.util, "find_spec", lambda name: object())

    def run(command: list[str], seconds: float) -> str | None:
        name = command[command.index("--build") + 1]
        report = json.loads((tmp_path / "rollout.json").read_text())
        report["engines"][name] = {"dtype": "bfloat16"}
        (tmp_path / "rollout.json").write_text(json.dumps(report))
        limits[name] = seconds
        return "ended with status -6" if name == "vllm" else None

    monkeypatch.setattr(bench_rollout, "run_limited", run)
    args = {"out": tmp_path, "rehearse": False, "shape": "1.5b", "engines": None, "seconds": 190.0}

    def save(report: dict) -> None:
        (tmp_path / "rollout.json").write_text(json.dumps(report))

    report = bench_rollout.run_builds(argparse.Namespace(**args), save)
    whole = {"dtype": "bfloat16"}
    engines = {"vllm": whole | {"failed": "ended with status -6"}}
    assert report["engines"] == engines | {"vllm_model_head": whole, "torch": whole}
    assert limits == pytest.approx({"vllm": 120, "vllm_model_head": 170, "torch": 190}, abs=2)
    late = argparse.Namespace(**args | {"seconds": 40.0})
    engines = bench_rollout.run_builds(late, save)["engines"]
    assert engines == {
        "vllm": {"skipped": "not reached: 40 s left"},
        "vllm_model_head": {"skipped": "not reached: 40 s left"},
        "torch": whole,
    }


def test_memory_of_a_block_is_what_it_keeps_and_its_peak(monkeypatch):
    free, peak = [80 * 2**30, 77 * 2**30], 9 * 2**30
    names = dict.fromkeys(("synchronize", "reset_peak_memory_stats"), lambda: None)
    card = SimpleNamespace(
        **names,
        mem_get_info=lambda: (free.pop(0), 80 * 2**30),
        memory_allocated=lambda: 2**30,
        max_memory_allocated=lambda: peak,
    )
    monkeypatch.setattr(torch, "cuda", card)
    row = {}
    with bench_rollout.memory(row, "weights", torch.device("cuda")):
        pass
    assert row["weights"].pop("seconds") < 1
    assert row == {"weights": {"kept_gib": 3.0, "peak_gib": 8.0}}


@pytest.mark.skipif(VLLM is None, reason="vLLM is not installed: make env-test")
def test_vllms_worker_on_a_gpu_has_the_stages_that_are_measured():
    source = Path(VLLM.submodule_search_locations[0], "v1/worker/gpu_worker.py").read_text()
    (worker,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Worker"
    )
    methods = {node.name for node in worker.body if isinstance(node, ast.FunctionDef)}
    assert bench_rollout.STAGES.keys() <= methods


def test_a_case_that_blocks_is_told_and_fails_nothing(tmp_path):
    rows = [
        {"variant": "alone", "seconds": 0.5},
        {"variant": "peer gone", "blocked_s": 15.0},
        {"variant": "peer waits", "skipped": "needs 2 GPUs"},
        {"variant": "odd", "failed": "ended with status -6"},
    ]
    line, text = reported(tmp_path, "teardown", {"rows": rows})
    parts = "alone: 0.50 s; peer gone: BLOCKS, ended after 15 s; peer waits: needs 2 GPUs; "
    assert line == f"{parts}odd: ended with status -6"
    assert "- teardown: peer waits: needs 2 GPUs" in text


ENDS = {
    "import json; print(json.dumps({'seconds': 0.5}))": {"seconds": 0.5},
    "raise SystemExit(1)": {"blocked_s": 8.0},
    "import os; os.abort()": {"failed": "ended with status -6"},
    "import time; time.sleep(60)": {"failed": "the processes did not get as far as leaving"},
}


@pytest.mark.parametrize("code", ENDS)
def test_what_became_of_the_process_that_leaves(code):
    pipe = subprocess.PIPE
    process = subprocess.Popen([*PYTHON, code], stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    patience = 0.5 if "sleep" in code else 60
    assert bench_teardown.outcome(process, time.monotonic() + patience) == ENDS[code]
    process.kill(), process.wait()


def test_one_gpu_is_enough_for_the_cases_without_a_second_one(monkeypatch):
    for count, skipped in ((1, 2), (2, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=count: n)
        reasons = [bench_teardown.why_not(case, "cuda") for case in bench_teardown.CASES]
        assert reasons.count("needs 2 GPUs") == skipped and reasons.count(None) == 4 - skipped


def test_a_tiny_run_with_vllm_says_less_and_one_without_it_why(tmp_path):
    figures = {"steps": 4, "reward_first": 0.3, "reward_last": 0.4, "seconds_per_step": 2.0}
    line, _ = reported(tmp_path, "tiny_vllm", figures | {"parity_mean": 1e-3, "parity_max": 0.2})
    off = "log-probs off by 1.0e-03 nats on average, 2.0e-01 at most"
    assert line == f"reward 0.30 -> 0.40, {off}, 2.00 s/step"
    untrained = figures | {"parity_mean": None, "parity_max": None}
    assert "off by -" in reported(tmp_path, "tiny_vllm", untrained)[0]
    line, text = reported(tmp_path, "tiny_vllm", {"skipped": "vLLM is not installed"})
    assert line == "vLLM is not installed" and "- tiny_vllm: vLLM is not installed" in text


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("pass", None),
        ("raise SystemExit(3)", "ended with status 3"),
        ("import time; time.sleep(60)", "not done after 1 s"),
    ],
)
def test_a_command_with_a_limit_says_how_it_ended(code, outcome):
    start = time.monotonic()
    assert run_limited([*PYTHON, code], 30.0 if outcome != "not done after 1 s" else 1.0) == outcome
    assert time.monotonic() - start < 30


# ---- needs


def test_an_old_python_is_refused_before_anything_else(tmp_path, monkeypatch, capsys):
    """The file is read by an old Python too, as far as it has to be."""
    ast.parse(Path(gpu.__file__).read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(gpu, "missing_compiler", lambda: pytest.fail("asked too early"))
    for flags in ([], ["--rehearse"]):
        assert gpu.main([*flags, "--out", str(tmp_path / "out")]) == 2
        message = "make gpu: Python 3.10 is too old; name 3.11 or newer: `make gpu PYTHON="
        assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_at_once(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "matplotlib", "rich")
    monkeypatch.setattr(gpu, "missing_compiler", lambda: pytest.fail("asked too early"))
    for flags in ([], ["--rehearse"]):
        assert gpu.main([*flags, "--out", str(tmp_path / "out")]) == 2
        message = "make gpu: not installed: matplotlib, rich; install them, or name a Python"
        assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


def test_every_dependency_is_looked_for_but_those_of_real_data_and_lora():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert names - {"datasets", "math-verify", "peft"} == set(gpu.NEEDED)


def test_a_missing_compiler_is_named_before_the_gpu_is_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "missing_device", lambda: pytest.fail("asked too early"))
    for compiler, path in ((None, ""), ("nocc", os.environ["PATH"])):
        monkeypatch.setenv("PATH", path)
        monkeypatch.delenv("CC", raising=False)
        if compiler:
            monkeypatch.setenv("CC", compiler)
        assert gpu.main(["--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("make gpu: Triton needs a C compiler") and "install gcc" in line
        assert (compiler or "neither gcc nor clang") in line
    assert not (tmp_path / "out").exists()


def test_missing_headers_of_python_are_named(tmp_path, monkeypatch):
    paths = {"include": str(tmp_path)}
    monkeypatch.setattr(gpu.sysconfig, "get_paths", lambda scheme: paths)
    monkeypatch.setenv("CC", sys.executable)
    assert "install Python's headers" in gpu.missing_compiler()
    (tmp_path / "Python.h").touch()
    assert gpu.missing_compiler() is None


@pytest.mark.parametrize("venv", [False, True])
def test_a_python_that_is_named_is_taken_else_that_of_the_environment(tmp_path, venv):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    if venv:
        (tmp_path / ".venv/bin").mkdir(parents=True)
        (tmp_path / ".venv/bin/python").touch()
    outer = ("PYTHON", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")  # of the make that runs the tests
    env = {name: value for name, value in os.environ.items() if name not in outer}

    def shown(*arguments: str) -> str:
        command = ["make", "--no-print-directory", "-n", "gpu", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.stdout.split(" -m ")[0]

    assert shown() == (".venv/bin/python" if venv else "python3")
    assert shown("PYTHON=/another/python") == "/another/python"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path):
    command = ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}"]
    arguments = f"ARGS=--out {tmp_path / 'out'}"
    done = subprocess.run([*command, arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    message, from_make = done.stderr.splitlines()
    assert message.startswith("make gpu: torch ") and "Error 2" in from_make
    assert "sees no CUDA device; `make gpu ARGS=--rehearse`" in message
