"""Does all of this work on the GPU at hand, and how fast is it there? `make gpu`: ten minutes,
nothing downloaded.

    python -m bench.gpu --out DIR                  everything; DIR is runs/gpu unless named
    python -m bench.gpu --only tests kernel        some parts, by how their names begin
    python -m bench.gpu --seconds 1700             more time for each
    python -m bench.gpu --rehearse                 every part at toy sizes on a CPU: does this command work?

Every part is a process of its own with a share of the time; what one leaves over goes to those
after it, and one that reaches its limit is killed, after Python has said where it stands, so that
no part takes anything from another. DIR/gpu.json and DIR/summary.md are written anew after every
part and while one runs, DIR/log.txt is all that the parts said, and a part that draws leaves its
picture. What is not installed is skipped and named. Exit status: 0, 1 if a part failed or ran out
of time, 2 without a CUDA device.
"""

import argparse
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 575.0  # of 600
OPTIONAL = (
    "vllm",
    "flash_attn",
    "liger_kernel",
    "trl",
    "cut_cross_entropy",
    "verl",
    "quack",
    "datasets",
    "math_verify",
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
    after: tuple[str, ...] = ()  # background work that has to be done before


@dataclass
class Report:
    """What is known so far, on disk at any moment. gpu.json: `runs`, a row per part with all that
    it found, and what `bench.experiments.budget --measured` takes, `device` and `parts`."""

    out: Path
    rehearsal: bool
    status: str = "not finished"
    runs: dict[str, dict] = field(default_factory=dict)

    def write(self) -> None:
        head = {"status": self.status, "rehearsal": self.rehearsal}
        text = (
            json.dumps(head | constants(self.runs, self.rehearsal) | {"runs": self.runs}, indent=1)
            + "\n"
        )
        for name, content in (("gpu.json", text), ("summary.md", summary(self))):
            partial = self.out / f"{name}.partial"
            partial.write_text(content)
            partial.replace(self.out / name)


# ---- the parts


def make_parts(out: Path, work: Path, rehearse: bool) -> list[Part]:
    python, device = sys.executable, "cpu" if rehearse else "cuda"
    toy = ["--rehearse"] if rehearse else []
    sizes = [
        "--models",
        *(["tiny"] if rehearse else ["1.5B", "7B"]),
        "--tokens",
        "256" if rehearse else "16384",
    ]
    sizes += ["--repeats", "2" if rehearse else "10"]
    sizes += ["--only", "fused (this repository)", "CCE"] if rehearse else []
    own = [python, "-m", "bench.gpu", *toy, "--work", str(work), "--run"]
    kernel = [
        python,
        "-m",
        "bench.bench_linear_drgrpo",
        "--device",
        device,
        *sizes,
        "--sweep",
        "--out",
        str(work / "kernel"),
    ]
    step = [python, "-m", "bench.bench_step", "--device", device, "--out", str(work), *toy]
    step += ["--repeats", "1", "--responses", "16"] if rehearse else []
    shapes = {"rehearsal": 45.0} if rehearse else {"1.5b": 85.0, "7b": 85.0, "0.6b": 45.0}
    rollout = [python, "-m", "bench.bench_rollout", "--device", device, "--out", str(work), *toy]
    tests = (
        gpu_tests()[:1] if rehearse else gpu_tests()
    )  # without a GPU all are skipped: one file is enough to see that
    has_vllm = importlib.util.find_spec("vllm") is not None and not rehearse
    budget = [
        python,
        "-m",
        "bench.experiments.budget",
        "--measured",
        str(out),
        "--out",
        str(work),
        *(["--draws", "2"] if rehearse else []),
    ]
    return [
        Part(
            "ceilings",
            "versions, card, copy bandwidth, bf16 GEMM rate",
            [*own, "ceilings"],
            40,
            "ceilings.json",
        ),
        *(
            Part(f"tests_{path.stem[5:]}", f"GPU tests, {path.name}", test_command(path), share)
            for path, share in tests
        ),
        Part(
            "kernel",
            "the fused head against bare GEMMs and other kernels",
            kernel,
            110,
            "kernel.json",
        ),
        *(
            Part(
                f"step_{name}",
                f"one training step, {name}",
                [*step, *([] if rehearse else ["--shape", name])],
                share,
                f"step_{name}.json",
                plans=True,
            )
            for name, share in shapes.items()
        ),
        Part(
            "rollout",
            "rollout, weight sync, parity",
            rollout,
            120 if has_vllm else 45,
            "rollout.json",
            plans=True,
        ),
        Part(
            "tiny",
            "the tiny recipe, stopped and resumed",
            [*own, "tiny"],
            60,
            "tiny.json",
            after=("warmup",),
        ),
        Part(
            "budget",
            "the budget of the 7B recipe with what was measured",
            budget,
            30,
            "budget.json",
        ),
    ]


def gpu_tests() -> list[tuple[Path, float]]:
    """Files with tests for a GPU, each in a process of its own: a kernel that goes astray takes the
    CUDA context with it."""
    marked = re.compile(r"^@(pytest\.mark\.)?gpu$", re.M)
    found = [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if marked.search(path.read_text())
    ]
    return [(path, 60.0 if path.stem == "test_linear_drgrpo" else 35.0) for path in found]


def test_command(path: Path) -> list[str]:
    options = [
        "-v",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--color=no",
        "--durations=5",
        "--tb=short",
    ]
    return [sys.executable, "-m", "pytest", *options, str(path.relative_to(ROOT))]


BACKGROUND = {  # what runs beside the first parts: the tiny recipe's supervised warm-up is a minute of one CPU core, once
    "warmup": [
        sys.executable,
        "-c",
        "from drgrpo.tiny.warmup import *; cached_tiny_model(Warmup(), 'runs/warmup')",
    ]
}


def ceilings(work: Path, rehearse: bool) -> dict:
    """What the memory and the tensor cores of this card reach: copies count bytes read and written,
    GEMMs take random numbers, ten in a row, so that the clock is the one that lasts."""
    import torch

    from bench.harness import interleaved, provenance, quantiles
    from drgrpo.run.flops import peak_flops

    device, size, n, count = ("cpu", 2**22, 256, 1) if rehearse else ("cuda", 2**31, 8192, 10)
    torch.manual_seed(0)
    source = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    contenders = {
        "copy": lambda: target.copy_(source),
        "gemm": lambda: [torch.mm(a, b, out=c) for _ in range(count)],
    }
    interleaved(contenders, device, 3)
    ms = {name: quantiles(times) for name, times in interleaved(contenders, device, 20).items()}
    found = {
        "where": provenance(device),
        "missing": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
        "copy_bytes": size,
        "gemm_size": n,
        "ms": ms,
        "copy_gb_per_s": 2 * size / 1e6 / ms["copy"]["p50"],
        "gemm_tflops": count * 2 * n**3 / 1e9 / ms["gemm"]["p50"],
    }
    if not rehearse:
        card, peak = torch.cuda.get_device_properties(0), peak_flops(torch.device("cuda", 0))
        found |= {
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gib": card.total_memory / 2**30,
            "l2_mib": card.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
            "data_sheet_tflops": peak / 1e12 if peak else None,
        }
    return found


def tiny(work: Path, rehearse: bool) -> dict:
    """The tiny recipe as a user runs it, with our own sampler: to its end and, with more steps
    asked for, on from there."""
    from drgrpo.run.log import read_jsonl

    steps, more, out = *((12, 2) if rehearse else (40, 5)), work / "tiny"
    command = [
        sys.executable,
        "train.py",
        "--recipe",
        "tiny",
        "--engine",
        "torch",
        "--out",
        str(out),
        "--eval-every",
        "0",
        "--eval-samples",
        "1",
        "--save-every",
        "0",
    ]
    said = [echo([*command, "--steps", str(last)]) for last in (steps, steps + more)]
    rows, window = read_jsonl(out / "metrics.jsonl"), steps // 4
    mean = lambda part: sum(row["reward_mean"] for row in part) / len(part)  # noqa: E731
    first, last = mean(rows[:window]), mean(rows[steps - window : steps])
    greedy = [row["accuracy"] for row in read_jsonl(out / "eval.jsonl") if row["temperature"] == 0]
    return {
        "steps": len(rows),
        "reward_first": first,
        "reward_last": last,
        "accuracy_first": greedy[0],
        "accuracy_last": greedy[-1],
        "parity_max": max(row["parity_max"] for row in rows),
        "seconds_per_step": sorted(row["seconds"]["total"] for row in rows)[len(rows) // 2],
        "checks": {
            f"mean reward of the last {window} of {steps} steps ({last:.2f}) is at least 0.05 above the first's ({first:.2f})": last
            > first + 0.05,
            f"it went on after step {steps}": f"after step {steps}" in said[1],
            f"steps 1 to {steps + more}, each once": [row["step"] for row in rows]
            == list(range(1, steps + more + 1)),
        },
    }


def echo(command: list[str]) -> str:
    """Runs it, shows what it says as it says it, and returns that. Its stderr is ours."""
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    lines = [print(line, end="", flush=True) or line for line in process.stdout]
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return "".join(lines)


def run_own(name: str, work: Path, rehearse: bool) -> None:
    """A part that is a function of this file, in its own process."""
    found = {"ceilings": ceilings, "tiny": tiny}[name](work, rehearse)
    (work / f"{name}.json").write_text(json.dumps(found) + "\n")
    print(json.dumps(found, indent=1))
    if wrong := [check for check, holds in found.get("checks", {}).items() if not holds]:
        sys.exit(f"not so: {'; '.join(wrong)}")


# ---- running them


def run_parts(
    parts: list[Part],
    report: Report,
    work: Path,
    seconds: float,
    env: dict,
    started: dict | None = None,
) -> None:
    """Every part in turn, with its share of the time that is left."""
    deadline = time.monotonic() + seconds
    for i, part in enumerate(parts):
        limit = (deadline - time.monotonic()) * part.share / sum(p.share for p in parts[i:])
        print(f"{part.name:24} {part.title}; at most {limit:.0f} s", flush=True)
        row = run_part(part, report, work, limit, env, started or {})
        outcome = f"{'':24} {row['status']} after {row['seconds']:.1f} s: {row['figures']}"
        print(outcome, *row.get("tail", "").splitlines()[-12:], sep="\n    ", flush=True)


def run_part(
    part: Part, report: Report, work: Path, limit: float, env: dict, started: dict
) -> dict:
    """One part: its row in the report, current while it runs."""
    row = report.runs[part.name] = {
        "title": part.title,
        "status": "running",
        "seconds": 0.0,
        "limit": limit,
        "figures": "",
    }
    begin, path = time.monotonic(), work / f"{part.name}.log"
    path.touch()

    def look(status: str) -> None:
        row.update(status=status, seconds=round(time.monotonic() - begin, 1))
        collect(part, row, work, report.out)
        report.write()

    look("running")
    command, status = part.command, "stopped"
    try:
        for name in part.after:
            finish(started[name], work / f"{name}.log", limit / 2)
        if part.plans:  # starting takes some of the time, and so does writing down what came out
            left = limit - (time.monotonic() - begin)
            command = [*command, "--seconds", f"{max(left - 15, left / 2):.0f}"]
        with open(path, "w") as log:
            process = start(command, log, env)
            try:
                status = watch(process, begin + limit, lambda: look("running"))
            finally:
                end(process)
    except Unfinished as error:
        status = "failed"
        path.write_text(str(error))
    finally:
        if status == "failed":
            row["reason"] = last_line(path)
        if status != "passed":
            row["tail"] = tail(path)
        look(status)
        append_log(report.out / "log.txt", part, command, row, work)
    return row


class Unfinished(Exception):
    """Background work that a part needs and that did not end well."""


def finish(process: subprocess.Popen, log: Path, limit: float) -> None:
    try:
        status = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        raise Unfinished(f"{log.stem} is not done after {limit:.0f} s of waiting for it") from None
    if status:
        raise Unfinished(f"{log.stem} failed: {last_line(log)}")


def start(command: list[str], log, env: dict) -> subprocess.Popen:
    """In a process group of its own, so that its children end with it."""
    nothing, same = subprocess.DEVNULL, subprocess.STDOUT
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=nothing, stdout=log, stderr=same, process_group=0
    )


def start_background(name: str, work: Path, env: dict) -> subprocess.Popen:
    """On one core, without the GPU."""
    with open(work / f"{name}.log", "w") as log:
        return start(
            BACKGROUND[name], log, env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        )


def watch(process: subprocess.Popen, deadline: float, look) -> str:
    while (left := deadline - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            return "failed" if process.wait(timeout=min(TICK, left)) else "passed"
        look()
    os.killpg(process.pid, signal.SIGABRT)  # faulthandler writes down where every thread stands
    time.sleep(0.5)
    return "timeout"


def end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def collect(part: Part, row: dict, work: Path, out: Path) -> None:
    """What the part has written so far, into its row and the results folder."""
    row["result"] = (
        read_json(work / part.result) if part.result else test_outcomes(work / f"{part.name}.log")
    )
    if part.result:
        picture = (work / part.result).with_suffix(".png")
        if picture.exists():
            shutil.copy(picture, out / picture.name)
    row["figures"] = row.get("reason") or (
        shown(figures, part.name, row["result"]) if row["result"] else ""
    )


def read_json(path: Path) -> dict | None:
    """None where there is nothing yet, or half of it."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def tail(path: Path, count: int = 25) -> str:
    """The last lines that say something, without progress bars."""
    lines = [
        line.rstrip()
        for line in path.read_text(errors="replace").splitlines()
        if line.strip() and "it/s]" not in line
    ]
    return "\n".join(line[:300] for line in lines[-count:])


def last_line(path: Path) -> str:
    return tail(path, 1).strip() or "it said nothing"


def test_outcomes(log: Path) -> dict | None:
    """{"outcomes": {test: PASSED, FAILED, SKIPPED (why) or ERROR}} from what pytest -v has printed
    so far."""
    if not log.exists():
        return None
    line = re.compile(
        r"^tests/\S+\.py::(.+?) (PASSED|FAILED|ERROR|SKIPPED(?: \(.*\))?)(?: +\[ *\d+%\])?$", re.M
    )
    found = dict(line.findall(log.read_text(errors="replace")))
    return {"outcomes": found} if found else None


def append_log(path: Path, part: Part, command: list[str], row: dict, work: Path) -> None:
    said = (work / f"{part.name}.log").read_text(errors="replace")
    title = f"==== {part.name}: {row['status']} after {row['seconds']} s of {row['limit']:.0f}"
    with open(path, "a") as log:
        log.write(f"{title}\n$ {' '.join(command)}\n{said}\n")


# ---- saying what came out


MODELS = {
    "0.6b": "Qwen3-0.6B",
    "1.5b": "Qwen2.5-1.5B",
    "7b": "Qwen2.5-7B",
}  # as bench/experiments/simulator.py calls them


def constants(runs: dict[str, dict], rehearsal: bool) -> dict:
    """What was measured, as `bench.experiments.budget` takes it. A rehearsal stands in for an H100,
    whose constants it then replaces."""
    results = {name: row["result"] for name, row in runs.items() if row.get("result")}
    found, rollout = results.get("ceilings", {}), results.get("rollout", {})
    device = (
        "a CPU that rehearses for an H100" if rehearsal else found.get("where", {}).get("device")
    )
    vllm, model = rollout.get("engines", {}).get("vllm", {}), MODELS.get(rollout.get("shape"))
    return {
        "device": device,
        "parts": {
            "ceilings": {
                key: found[key] for key in ("copy_gb_per_s", "gemm_tflops") if key in found
            },
            "step": [
                row
                for shape in MODELS
                for row in step_constants(shape, results.get(f"step_{shape}", {}))
            ],
            "rollout": [{"model": model} | vllm["steady"]] if "steady" in vllm else [],
            "sync": [{"model": model, "seconds": vllm["sync_s"]}] if "sync_s" in vllm else [],
        },
    }


def step_constants(shape: str, result: dict) -> list[dict]:
    """MFU of forward and backward alone, with everything on, where the whole model was there."""
    rows = []
    for case in result.get("cases", {}).values():
        first = case["rows"][0]
        if "left_out" in case or first.get("mfu") is None:
            continue
        passes = sum(first["phases"][phase] for phase in ("forward", "head + loss", "backward"))
        rows.append(
            {
                "model": MODELS[shape],
                "checkpointing": case["checkpointing"],
                "microbatch": case["tokens_per_microbatch"],
                "length": round(case["response_tokens"] / case["responses"]),
                "mfu": first["mfu"] * first["seconds"]["median"] / passes,
            }
        )
    return rows


def shown(tell, *result) -> str:
    """What `tell` makes of a result. Of one that is half written it may not make anything, and that
    must stop nothing."""
    try:
        return tell(*result)
    except Exception as error:
        return f"not shown: {error!r}"


def figures(name: str, result: dict) -> str:
    """A part's result in a line."""
    if name.startswith("tests_"):
        counts = Counter(outcome.split()[0].lower() for outcome in result["outcomes"].values())
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if name.startswith("step_"):
        return "; ".join(
            f"{row['tokens_per_s']:,.0f} tok/s, {row['tflops']:.3g} TFLOP/s, peak {row['peak_bytes'] / 1e9:.1f} GB"
            for case in result["cases"].values()
            for row in case["rows"][:1]
            if not row.get("skipped")
        )
    return LINES[name](result)


def ceilings_line(found: dict) -> str:
    sheet, copy, gemm = found.get("data_sheet_tflops"), found["copy_gb_per_s"], found["gemm_tflops"]
    share = f" ({gemm / sheet:.0%} of the data sheet's)" if sheet else ""
    return (
        f"{found['where']['device']}: copy {copy:,.0f} GB/s, bf16 GEMM {gemm:,.3g} TFLOP/s{share}"
    )


def kernel_line(found: dict) -> str:
    ours = [
        row
        for row in found["rows"]
        if row["contender"] == "fused (this repository)" and "step_ratio" in row
    ]
    shown = [f"{row['model']} {row['step_ratio']:.3f} x the bare GEMMs" for row in ours]
    if sweep := found.get("sweep"):
        shown.append(
            f"TUNED should say {sweep['tuned']}" if sweep["tuned"] else "the default sizes stay"
        )
    return "; ".join(shown)


def rollout_line(found: dict) -> str:
    return "; ".join(
        f"{name}: {row['skipped']}"
        if "skipped" in row
        else f"{name}: {row['tokens_per_s']:,.0f} tok/s, sync {row['sync_s']:.2f} s, log-probs off by {row['gap_mean']:.1e} nats on "
        f"average ({row['stale_gap_mean']:.1e} before the sync), {row['gap_max']:.1e} at most"
        for name, row in found["engines"].items()
    )


def tiny_line(found: dict) -> str:
    return (
        f"reward {found['reward_first']:.2f} -> {found['reward_last']:.2f}, held-out {found['accuracy_first']:.2f} -> "
        f"{found['accuracy_last']:.2f}, {found['seconds_per_step']:.2f} s/step"
    )


def budget_line(found: dict) -> str:
    taken = sum(note.startswith("measured:") for note in found["notes"])
    return f"{taken} measured constants in place of assumed ones: budget.png"


LINES = {
    "ceilings": ceilings_line,
    "kernel": kernel_line,
    "rollout": rollout_line,
    "tiny": tiny_line,
    "budget": budget_line,
}


def left_out(runs: dict[str, dict]) -> list[str]:
    """What was not there, by name."""
    lines = []
    for name, row in runs.items():
        result = row.get("result") or {}
        if missing := result.get("missing"):
            lines.append(f"not installed: {', '.join(missing)}")
        outcomes = result.get("outcomes", {}).items()
        skipped = Counter(
            f"{test.split('[')[0]} {outcome[8:]}"
            for test, outcome in outcomes
            if outcome.startswith("SKIPPED")
        )
        lines += [f"{name}: {count} x {test}" for test, count in skipped.items()]
        rows = result.get("rows", []) + [
            row for case in result.get("cases", {}).values() for row in case.get("rows", [])
        ]
        whys = {
            r.get("contender") or r.get("variant"): r["skipped"] for r in rows if r.get("skipped")
        }
        whys |= {
            engine: r["skipped"]
            for engine, r in result.get("engines", {}).items()
            if "skipped" in r
        }
        lines += [f"{name}: {what}: {why}" for what, why in whys.items()]
        lines += [
            f"{name}: {case['left_out']}"
            for case in result.get("cases", {}).values()
            if "left_out" in case
        ]
    return lines


def summary(report: Report) -> str:
    """All of it for people, in Markdown."""
    text = [
        f"# {'Rehearsal' if report.rehearsal else 'GPU report'}: {report.status}",
        "",
        "| part | | s | of | |",
    ]
    text += ["|---|---|---|---|---|"] + [
        f"| {name} | {row['status']} | {row['seconds']:.0f} | {row['limit']:.0f} | {row['figures'].replace('|', '/')} |"
        for name, row in report.runs.items()
    ]
    for name, row in report.runs.items():
        if (
            row.get("result")
            and name.startswith(("kernel", "step_"))
            and row["status"] != "running"
        ):
            text += ["", f"## {row['title']}", "", shown(tables, name, row["result"])]
    for name, row in report.runs.items():
        if "tail" in row:
            text += ["", f"## {name}: {row['status']}", "", "```", row["tail"], "```"]
    if lines := left_out(report.runs):
        text += ["", "## Skipped or left out", "", *(f"- {line}" for line in lines)]
    if found := report.runs.get("ceilings", {}).get("result"):
        facts = {
            key: value
            for key, value in (found["where"] | found).items()
            if not isinstance(value, dict | list)
        }
        text += ["", "## Where", "", *(f"- {key}: {value}" for key, value in facts.items())]
    return "\n".join(text) + "\n"


def tables(name: str, result: dict) -> str:
    if name.startswith("step_"):
        from bench.bench_step import text

        return text(result)
    from bench.bench_linear_drgrpo import COLUMNS
    from bench.harness import markdown

    rows = [
        [row["model"], *(show(row) for show in COLUMNS.values())]
        for row in result["rows"]
        if "step_ms" in row
    ]
    return markdown(["shape", *COLUMNS], rows)


def missing_device() -> str | None:
    """Why nothing can be measured here, and the way out."""
    try:
        import torch
    except ImportError as error:
        return f"{error}: install a CUDA build of torch, or name a Python that has one with `make gpu PYTHON=...`"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device; `make gpu ARGS=--rehearse` runs every part at toy size on a CPU"
    return None


def part_environment(rehearse: bool) -> dict[str, str]:
    env = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    if rehearse:
        return env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)  # kernels are to be compiled
    return env


def main(argv: list[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose names begin so")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU")
    parser.add_argument("--run", choices=["ceilings", "tiny"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        run_own(args.run, args.work, args.rehearse)
        return 0
    if not args.rehearse and (reason := missing_device()):
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    args.out = args.out.resolve()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("stopped")
    )  # by way of `finally`, which ends the running part
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").write_text("")
    report = Report(args.out, args.rehearse)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        work, env = Path(folder), part_environment(args.rehearse)
        every = make_parts(args.out, work, args.rehearse)
        parts = [part for part in every if part.name.startswith(tuple(args.only))]
        if not parts:
            parser.error(
                f"--only {' '.join(args.only)}: there are {', '.join(part.name for part in every)}"
            )
        started = {name: start_background(name, work, env) for part in parts for name in part.after}
        try:
            run_parts(parts, report, work, args.seconds - (time.monotonic() - begun), env, started)
        finally:
            for process in started.values():
                end(process)
    bad = [name for name, row in report.runs.items() if row["status"] != "passed"]
    report.status = f"not passed: {', '.join(bad)}" if bad else "everything passed"
    report.write()
    print(f"{report.status}; wrote {args.out}/summary.md, gpu.json, log.txt and pictures")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
