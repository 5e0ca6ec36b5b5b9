"""Does everything work on this GPU, and how fast is it here? `make gpu` takes ten minutes and
downloads nothing.

    python -m bench.gpu --out DIR                  everything; DIR is runs/gpu unless named
    python -m bench.gpu --only tests kernel        some parts, by how their names begin
    python -m bench.gpu --seconds 1700             more time for each
    python -m bench.gpu --rehearse                 every part at toy sizes on a CPU

Every part is a process of its own with a share of the time. What one leaves over goes to those
after it. One that reaches its limit is killed, after Python has said where it stands, so that no
part takes anything from another. DIR/gpu.json and DIR/summary.md are written anew after every part
and while one runs. DIR/log.txt is all that the parts printed, and a part that draws leaves its
picture. What is not installed is skipped and named. Exit status: 0, 1 if a part failed or ran out
of time, 2 without a CUDA device or another need.
"""

from __future__ import annotations  # an old Python gets as far as the line that says so

import argparse
import importlib.util
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[1]
SECONDS = 575.0  # of 600
OLDEST = (3, 11)  # Python
NEEDED = (  # by train.py
    *("torch", "transformers", "numpy", "matplotlib", "filelock", "rich", "jinja2"),
    "huggingface_hub",
)
TICK = 2.0  # seconds between two looks at what a running part has written


@dataclass(frozen=True)
class Part:
    """A command, its share of the time in seconds, and the JSON file that it may leave in the
    working folder."""

    name: str
    title: str
    command: list[str]
    share: float
    result: str = ""
    plans: bool = False  # the command takes --seconds and plans with it


@dataclass
class Report:
    """What is known so far, on disk at any moment. In gpu.json `runs` has a row per part with all
    that it measured. `bench.experiments.budget --measured` takes `device` and `parts`."""

    out: Path
    rehearsal: bool
    status: str = "not finished"
    runs: dict[str, dict] = field(default_factory=dict)

    def write(self) -> None:
        from bench.harness import write_json
        from drgrpo.run.files import write_atomically

        head = {"status": self.status, "rehearsal": self.rehearsal}
        taken = constants(self.runs, self.rehearsal)
        write_json(self.out / "gpu.json", head | taken | {"runs": self.runs})
        write_atomically(self.out / "summary.md", summary(self))


# ---- the parts

KERNEL_FLAGS = "--models 1.5B 7B --tokens 16384 --repeats 10 --cases old-logprob logprob"
KERNEL_TOY = "--models tiny --tokens 256 --repeats 2 --only CCE 'fused (this repository)'"
SHARES = {  # seconds: without vLLM, with it
    "ceilings": (35, 30),
    "tests_linear_drgrpo_gpu": (50, 45),
    "tests_model": (30, 35),
    "tests_train": (30, 35),
    "kernel": (118, 154),
    "pieces": (20, 20),
    "rollout": (80, 292),
    "tiny_vllm": (13, 120),
    "tiny": (55, 40),
    "teardown": (50, 50),
    "step_1.5b": (75, 40),
    "step_7b": (75, 40),
    "step_0.6b": (45, 0),
    "step_rehearsal": (60, 60),
    "budget": (25, 20),
}
"""A part's share of the time. Together they are a fifth more than there is, and with vLLM
three fifths more, because most parts end early. `kernel` is the tightest, and always gets 95 s.
vLLM's import, compilation and graphs take 60 to 100 s at the first start. `rollout` starts it
twice and gets 180 s at least, and `tiny_vllm` starts it thrice at a small size. Training steps plan
with what they get: they come late and take what the others leave. A part with 0 is left out."""


def make_parts(out: Path, work: Path, rehearse: bool) -> list[Part]:
    """Without a GPU all its tests are skipped, and one file is enough to see that."""
    column = int(importlib.util.find_spec("vllm") is not None)

    device, toy = ("cpu", ["--rehearse"]) if rehearse else ("cuda", [])

    def module(name: str, part: str, title: str, *flags: str, **how) -> Part:
        command = [sys.executable, "-m", f"bench.{name}", *flags]
        return Part(part, title, command, SHARES[part][column], f"{part}.json", **how)

    def own(name: str, title: str) -> Part:
        return module("gpu_parts", name, title, name, "--out", str(work), *toy)

    flags = [*shlex.split(KERNEL_TOY if rehearse else KERNEL_FLAGS), "--device", device, "--sweep"]
    title = "the fused head against bare GEMMs and other kernels"
    out_flags = ["--out", str(work / "kernel")]
    kernel = module("bench_linear_drgrpo", "kernel", title, *flags, *out_flags)
    place = ["--device", device, "--out", str(work)]
    steps = []
    for shape in ["rehearsal"] if rehearse else ["1.5b", "7b", "0.6b"]:
        flags = ["--repeats", "1", "--responses", "16"] if rehearse else ["--shape", shape]
        what = f"step_{shape}", f"one training step, {shape}"
        steps.append(module("bench_step", *what, *place, *toy, *flags, plans=True))
    what = "rollout", "rollout, weight sync, parity, vLLM's memory"
    rollout = module("bench_rollout", *what, *place, *toy, plans=True)
    what = "teardown", "whether leaving a process group waits for the others"
    teardown = module("bench_teardown", *what, *place, plans=True)
    what = "budget", "the budget of the 7B recipe with what was measured"
    flags = ["--measured", str(out), "--out", str(work), *(["--draws", "2"] if rehearse else [])]
    parts = [
        own("ceilings", "versions, card, copy bandwidth, bf16 GEMM rate"),
        *gpu_tests(column)[: 1 if rehearse else None],
        kernel,
        own("pieces", "products and row pass of the fused head by themselves"),
        rollout,
        own("tiny_vllm", "the tiny recipe with vLLM in bfloat16: tried, trained, resumed"),
        own("tiny", "the tiny recipe, stopped and resumed"),
        teardown,
        *steps,
        module("experiments.budget", *what, *flags),
    ]
    return [part for part in parts if part.share]


PYTEST = "-m pytest -v -m gpu -p no:cacheprovider --color=no --durations=5 --tb=short"


def gpu_tests(column: int) -> list[Part]:
    """Files with tests for a GPU, each in a process of its own. A kernel that goes astray takes the
    CUDA context with it. None without pytest."""
    if importlib.util.find_spec("pytest") is None:
        return []
    marked, parts = re.compile(r"^@(pytest\.mark\.)?gpu$", re.M), []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if marked.search(path.read_text()):
            command = [sys.executable, *PYTEST.split(), f"tests/{path.name}"]
            name = f"tests_{path.stem[5:]}"
            share = SHARES.get(name, (30, 35))[column]
            parts.append(Part(name, f"GPU tests, {path.name}", command, share))
    return parts


WARM_UP = "from drgrpo.tiny.warmup import *; cached_tiny_model(Warmup(), 'runs/warmup')"
"""Runs beside the first parts, on one core without the GPU. It is a minute of work, once. The tiny
recipe waits for its lock."""


# ---- running them


def run_parts(parts: list[Part], report: Report, work: Path, seconds: float, env: dict) -> None:
    """Every part in turn, with its share of the remaining time."""
    deadline = time.monotonic() + seconds
    for i, part in enumerate(parts):
        limit = (deadline - time.monotonic()) * part.share / sum(p.share for p in parts[i:])
        print(f"{part.name:24} {part.title}; at most {limit:.0f} s", flush=True)
        row = run_part(part, report, work, limit, env)
        outcome = f"{'':24} {row['status']} after {row['seconds']:.1f} s: {row['figures']}"
        print(outcome, *row.get("tail", "").splitlines()[-12:], sep="\n    ", flush=True)


def run_part(part: Part, report: Report, work: Path, limit: float, env: dict) -> dict:
    """One part: its row in the report, current while it runs."""
    row = {"title": part.title, "limit": limit}
    report.runs[part.name] = row
    begin, path = time.monotonic(), work / f"{part.name}.log"
    command, status = part.command, "stopped"
    if part.plans:  # starting takes some of the time, and so does writing the result
        command = [*command, "--seconds", f"{max(limit - 15, limit / 2):.0f}"]

    def look(status: str) -> None:
        row.update(status=status, seconds=round(time.monotonic() - begin, 1))
        collect(part, row, work, report.out)
        report.write()

    with open(path, "w") as log:
        process = start(command, log, env)
    try:
        look("running")
        status = watch(process, begin + limit, lambda: look("running"))
    finally:
        end(process)
        if status != "passed":
            row["tail"] = tail(path)
        if status == "failed":
            row["reason"] = row["tail"].split("\n")[-1].strip() or "it printed nothing"
        look(status)
        with open(report.out / "log.txt", "a") as log:
            seconds = f"{row['seconds']} s of {limit:.0f}"
            log.write(f"==== {part.name}: {status} after {seconds}\n$ {' '.join(command)}\n")
            log.write(path.read_text(errors="replace") + "\n")
    return row


def start(command: list[str], log: TextIO, env: dict) -> subprocess.Popen:
    """In a process group of its own, so that its children end with it."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=env, process_group=0, **pipes)


def watch(process: subprocess.Popen, deadline: float, look: Callable[[], None]) -> str:
    """Looks at a part while it runs. The status in which it ends."""
    while process.poll() is None:
        if (rest := deadline - time.monotonic()) <= 0:
            os.killpg(process.pid, signal.SIGABRT)  # faulthandler says where every thread stands
            time.sleep(0.5)
            return "timeout"
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=min(TICK, rest))
        look()
    return "failed" if process.returncode else "passed"


def end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def collect(part: Part, row: dict, work: Path, out: Path) -> None:
    """What the part has written so far, into its row and the results folder."""
    from bench.harness import read_json

    if part.result:
        row["result"] = read_json(work / part.result)
        picture = (work / part.result).with_suffix(".png")
        if picture.exists():
            shutil.copy(picture, out / picture.name)
    else:
        row["result"] = test_outcomes(work / f"{part.name}.log")
    kind = part.name.split("_")[0]
    told = shown(lambda: LINES[kind](row["result"])) if row["result"] else ""
    row["figures"] = row.get("reason") or told


def tail(path: Path) -> str:
    """The last lines that say something, without progress bars."""
    lines = map(str.rstrip, path.read_text(errors="replace").splitlines())
    telling = [line[:300] for line in lines if line and "it/s]" not in line]
    return "\n".join(telling[-25:])


OUTCOME = r"^tests/\S+\.py::(.+?) (PASSED|FAILED|ERROR|SKIPPED(?: \(.*\))?)(?: +\[ *\d+%\])?$"


def test_outcomes(log: Path) -> dict | None:
    """{"outcomes": {test: PASSED, FAILED, SKIPPED (why) or ERROR}} from what pytest -v has printed
    so far."""
    outcomes = dict(re.findall(OUTCOME, log.read_text(errors="replace"), re.M))
    return {"outcomes": outcomes} if outcomes else None


# ---- saying what came out


def constants(runs: dict[str, dict], rehearsal: bool) -> dict:
    """What was measured, as `bench.experiments.budget` takes it. A rehearsal stands in for an H100,
    whose constants it then replaces."""
    from bench.shapes import SHAPES

    results = {name: row["result"] for name, row in runs.items() if row.get("result")}
    ceiling, rollout = results.get("ceilings", {}), results.get("rollout", {})
    parts = {
        "ceilings": {k: ceiling[k] for k in ("copy_gb_per_s", "gemm_tflops") if k in ceiling},
        "step": [],
    }
    for shape, name in SHAPES.items():
        parts["step"] += step_constants(name, results.get(f"step_{shape}", {}))
    vllm, model = rollout.get("engines", {}).get("vllm", {}), SHAPES.get(rollout.get("shape"))
    if model and "steady" in vllm:
        parts["rollout"] = [{"model": model} | vllm["steady"]]
    if model and "sync_s" in vllm:
        parts["sync"] = [{"model": model, "seconds": vllm["sync_s"]}]
    card = ceiling.get("where", {}).get("device")
    return {"device": "a CPU that rehearses for an H100" if rehearsal else card, "parts": parts}


def step_constants(model: str, result: dict) -> list[dict]:
    """MFU of forward and backward alone, with everything on, where the whole model was there."""
    rows = []
    for case in result.get("cases", {}).values():
        first = case["rows"][0]
        if "left_out" in case or first.get("mfu") is None:
            continue
        passes = sum(first["phases"][phase] for phase in ("forward", "head + loss", "backward"))
        size = {"microbatch": case["tokens_per_microbatch"], "model": model}
        size |= {"length": round(case["response_tokens"] / case["responses"])}
        mfu = first["mfu"] * first["seconds"]["median"] / passes
        rows.append(size | {"checkpointing": case["checkpointing"], "mfu": mfu})
    return rows


def shown(tell: Callable[..., str], *result) -> str:
    """What `tell` makes of a result. Of one that is half written it may not make anything, and that
    must stop nothing."""
    try:
        return tell(*result)
    except Exception as error:
        return f"not shown: {error!r}"


def tests_line(result: dict) -> str:
    outcomes = Counter(outcome.split()[0].lower() for outcome in result["outcomes"].values())
    return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())


def step_line(result: dict) -> str:
    lines = []
    for row in (case["rows"][0] for case in result["cases"].values()):
        if not row.get("skipped"):
            speed = f"{row['tokens_per_s']:,.0f} tok/s, {row['tflops']:.3g} TFLOP/s"
            lines.append(f"{speed}, peak {row['peak_bytes'] / 1e9:.1f} GB")
    return "; ".join(lines)


def ceilings_line(result: dict) -> str:
    sheet, gemm = result.get("data_sheet_tflops"), result["gemm_tflops"]
    share = f" ({gemm / sheet:.0%} of the data sheet's)" if sheet else ""
    rates = f"copy {result['copy_gb_per_s']:,.0f} GB/s, bf16 GEMM {gemm:,.3g} TFLOP/s{share}"
    return f"{result['where']['device']}: {rates}"


def kernel_line(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        if row["contender"] == "fused (this repository)" and "ratio" in row:
            lines.append(f"{row['model']} {row['case']} {row['ratio']:.3f} x the bare GEMMs")
    if sweep := result.get("sweep"):
        tuned = sweep["tuned"]
        lines.append(f"TUNED should say {tuned}" if tuned else "the default sizes stay")
    return "; ".join(lines)


def pieces_line(result: dict) -> str:
    rows = [row for row in result["rows"] if "ms" in row]
    return "; ".join(f"{row['model']} {row['what']} {row['ms']['p50']:.2f} ms" for row in rows)


def rollout_line(result: dict) -> str:
    from bench.harness import figure

    lines = []
    for name, row in result["engines"].items():
        told = row.get("skipped") or row.get("failed")
        if "stale_gap_mean" in row:
            speed = f"{figure(row, 'tokens_per_s', ',.0f')} tok/s"
            sync, most = figure(row, "sync_s", ".2f"), figure(row, "gap_max", ".1e")
            off = f"{figure(row, 'gap_mean', '.1e')} nats on average, {most} at most"
            before = f"{row['stale_gap_mean']:.1e} before the sync"
            measured = f"{speed}, sync {sync} s, log-probs off by {off}, {before}"
            told = f"{told}; {measured}" if told else measured
        lines.append(f"{name}: {told or 'building'}")
    return "; ".join(lines)


def tiny_line(result: dict) -> str:
    from bench.harness import figure

    if "skipped" in result:
        return result["skipped"]
    told = [f"reward {result['reward_first']:.2f} -> {result['reward_last']:.2f}"]
    if "accuracy_first" in result:
        told.append(f"held-out {result['accuracy_first']:.2f} -> {result['accuracy_last']:.2f}")
    mean, most = (figure(result, f"parity_{what}", ".1e") for what in ("mean", "max"))
    told.append(f"log-probs off by {mean} nats on average, {most} at most")
    return ", ".join([*told, f"{result['seconds_per_step']:.2f} s/step"])


def teardown_line(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        if "blocked_s" in row:
            lines.append(f"{row['variant']}: BLOCKS, ended after {row['blocked_s']:.0f} s")
        elif told := row.get("skipped") or row.get("failed"):
            lines.append(f"{row['variant']}: {told}")
        else:
            lines.append(f"{row['variant']}: {row['seconds']:.2f} s")
    return "; ".join(lines)


def budget_line(result: dict) -> str:
    taken = sum(note.startswith("measured:") for note in result["notes"])
    return f"{taken} measured constants in place of assumed ones: budget.png"


LINES = {
    "ceilings": ceilings_line,
    "tests": tests_line,
    "kernel": kernel_line,
    "pieces": pieces_line,
    "step": step_line,
    "rollout": rollout_line,
    "tiny": tiny_line,
    "teardown": teardown_line,
    "budget": budget_line,
}


def left_out(runs: dict[str, dict]) -> list[str]:
    """What was not there, by name."""
    lines = []
    for name, row in runs.items():
        result = row.get("result") or {}
        if missing := result.get("missing"):
            lines.append(f"not installed: {', '.join(missing)}")
        if "skipped" in result:
            lines.append(f"{name}: {result['skipped']}")
        skipped = Counter()
        for test, outcome in result.get("outcomes", {}).items():
            if outcome.startswith("SKIPPED"):
                skipped[f"{test.split('[')[0]} {outcome[8:]}"] += 1
        lines += [f"{name}: {count} x {test}" for test, count in skipped.items()]
        cases, engines = result.get("cases", {}).values(), result.get("engines", {})
        rows = [*result.get("rows", []), *(row for case in cases for row in case.get("rows", []))]
        whys = [(r.get("contender") or r.get("variant"), r.get("skipped")) for r in rows]
        whys += [(engine, r.get("skipped")) for engine, r in engines.items()]
        lines += [f"{name}: {what}: {why}" for what, why in dict.fromkeys(whys) if why]
        lines += [f"{name}: {case['left_out']}" for case in cases if "left_out" in case]
    return lines


def summary(report: Report) -> str:
    """The whole report in Markdown."""
    from bench.harness import markdown

    kind = "Rehearsal" if report.rehearsal else "GPU report"
    overview, measured, failed = [], [], []
    for name, row in report.runs.items():
        numbers, told = [f"{row[key]:.0f}" for key in ("seconds", "limit")], row["figures"]
        overview.append([name, row["status"], *numbers, told.replace("|", "/")])
        tabled = name.startswith(("kernel", "rollout", "step_")) and row["status"] != "running"
        if tabled and row.get("result"):
            measured += [f"## {row['title']}", shown(tables, name, row["result"])]
        if "tail" in row:
            failed += [f"## {name}: {row['status']}", f"```\n{row['tail']}\n```"]
    text = [f"# {kind}: {report.status}", markdown(["part", "", "s", "of", ""], overview)]
    text += measured + failed
    if lines := left_out(report.runs):
        text += ["## Skipped or left out", bullets(lines)]
    if card := report.runs.get("ceilings", {}).get("result"):
        facts = (card["where"] | card).items()
        plain = [f"{key}: {value}" for key, value in facts if not isinstance(value, dict | list)]
        text += ["## Where", bullets(plain)]
    return "\n\n".join(text) + "\n"


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def tables(name: str, result: dict) -> str:
    from bench import bench_linear_drgrpo, bench_rollout, bench_step

    if name == "rollout":
        return bench_rollout.text(result)
    if name.startswith("step_"):
        return bench_step.text(result)
    return bench_linear_drgrpo.table(result["rows"])


def unmet_need(rehearse: bool) -> str | None:
    """Why nothing can be measured here, and the way out."""
    if sys.version_info < OLDEST:
        version = ".".join(map(str, sys.version_info[:2]))
        return f"Python {version} is too old; name 3.11 or newer: `make gpu PYTHON=python3.12`"
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        way_out = "install them, or name a Python that has them: `make gpu PYTHON=...`"
        return f"not installed: {', '.join(missing)}; {way_out}"
    return None if rehearse else missing_compiler() or missing_device()


def missing_compiler() -> str | None:
    """Triton builds the launcher of every kernel with a C compiler, in this way."""
    compiler = os.environ.get("CC")
    if not (shutil.which(compiler) if compiler else shutil.which("gcc") or shutil.which("clang")):
        what = f"CC={compiler} is not" if compiler else "neither gcc nor clang is"
        return f"Triton needs a C compiler, and {what} there; install gcc, or name one with CC=..."
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    if not header.exists():
        way_out = "install Python's headers (python3-dev), or name another Python with PYTHON=..."
        return f"Triton needs {header}, which is not there; {way_out}"
    return None


def missing_device() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    way_out = "`make gpu ARGS=--rehearse` runs every part at toy size on a CPU"
    return f"torch {torch.__version__} sees no CUDA device; {way_out}"


def part_environment(rehearse: bool) -> dict[str, str]:
    env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    if rehearse:
        return env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)  # kernels are to be compiled
    return env


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results")
    add("--seconds", type=float, default=SECONDS, help="for everything")
    add("--only", nargs="+", default=[""], help="parts whose names begin so")
    add("--rehearse", action="store_true", help="toy sizes, on a CPU")
    return parser.parse_args(argv)


def choose(every: list[Part], beginnings: list[str]) -> list[Part]:
    parts = [part for part in every if part.name.startswith(tuple(beginnings))]
    if not parts:
        names = ", ".join(part.name for part in every)
        print(f"error: --only {' '.join(beginnings)}: there are {names}", file=sys.stderr)
        sys.exit(2)
    return parts


def main(argv: list[str] | None = None) -> int:
    begin, args = time.monotonic(), parse(argv)
    if reason := unmet_need(args.rehearse):
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # by way of `finally`, which ends the running part
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    report = Report(out, args.rehearse)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        work, env = Path(folder), part_environment(args.rehearse)
        parts = choose(make_parts(out, work, args.rehearse), args.only)
        one_core = env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(work / "warmup.log", "w") as log:
            warmup = start([sys.executable, "-c", WARM_UP], log, one_core)
        try:
            run_parts(parts, report, work, args.seconds - (time.monotonic() - begin), env)
        finally:
            end(warmup)
    bad = [name for name, row in report.runs.items() if row["status"] != "passed"]
    report.status = f"not passed: {', '.join(bad)}" if bad else "everything passed"
    report.write()
    print(f"{report.status}; wrote {out}/summary.md, gpu.json, log.txt and pictures")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
