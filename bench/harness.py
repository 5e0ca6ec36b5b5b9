"""What the benchmarks share: clocks, memory, provenance, tables, figures and result files.

Nothing here knows what is measured. A contender is a function without arguments. Contenders take
turns in one process, on the same tensors. Times are those of CUDA events, or of the wall clock.
"""

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from drgrpo.run.files import write_atomically
from drgrpo.run.provenance import cpu_name, git, installed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def command_line(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the module."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw)


def provenance(device: str = "cpu") -> dict:
    """What a number needs beside it to mean something: card or processor, versions (None: not
    installed), commit, date."""
    cpu = f"{os.cpu_count()} x {cpu_name()}, {torch.get_num_threads()} used"
    packages = ("triton", "transformers", "vllm", "flash_attn")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: installed(package) for package in packages},
        "commit": git("describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }


def interleaved(
    contenders: dict[str, Callable], device: str, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of every contender, `repeats` times in turns A B C A B C, so that clocks and
    heat treat all alike. On CUDA the L2 cache is overwritten before each turn."""
    times = {name: [] for name in contenders}
    flush = torch.empty(256 * 2**20 if device == "cuda" else 0, dtype=torch.int8, device=device)
    for _ in range(repeats):
        for name, run in contenders.items():
            flush.zero_()
            times[name].append(_time_cuda(run) if device == "cuda" else _time_cpu(run))
    return times


def _time_cuda(run):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _time_cpu(run):
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def quantiles(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(times) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), times[0])
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": statistics.median(times), "p80": cuts[7]}


def peak_memory(run: Callable, device: str) -> int:
    """Bytes that one call holds at its worst moment beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def host_syncs(run: Callable, device: str) -> int | None:
    """How often one call makes the host wait for the GPU."""
    if device != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def markdown(heads: list[str], rows: list[list]) -> str:
    """A Markdown table. Its first column is text, the others are numbers."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in rows:
        lines.append([f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(row: dict, path: str, form: str) -> str:
    """What a row holds under the path `a.b`, formatted. "-" if it is not there."""
    value = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return "-" if value is None else f"{value:{form}}"


def spread(values: list[float], form: str, middle: Callable = statistics.fmean) -> str:
    """The mean or the median, and the range."""
    return f"{middle(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def write_json(path: Path, result: dict) -> str:
    """Writes the result and returns it as one line, the benchmark's last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    return json.dumps(result)


def read_json(path: Path) -> dict | None:
    """None where there is nothing yet, or half of it."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def run_limited(command: list[str], seconds: float) -> str | None:
    """Runs a command with our outputs and in our process group. What went wrong, or None.

    One that takes longer than `seconds` is killed. Under PYTHONFAULTHANDLER=1 it first says where
    it stands."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        status = process.wait(None if math.isinf(seconds) else seconds)
        return f"ended with status {status}" if status else None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        time.sleep(0.5)
        return f"not done after {seconds:.0f} s"
    finally:
        process.kill()
        process.wait()


def run_on_one_thread(command: list[str], log: str) -> None:
    """Runs a script of the repository, with its output in the file `log`. RuntimeError if it
    fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    python = [sys.executable, *command]
    with open(log, "w") as shown:
        done = subprocess.run(python, cwd=ROOT, stdout=shown, stderr=shown, env=env)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: see {log}")


def new_figure(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure and its axes, for a machine without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def stacked_bars(axis, rows: dict[str, dict[str, float]], phases: tuple[str, ...]) -> list[float]:
    """A horizontal bar per row, a piece per phase, the first row on top. Returns where the bars
    end."""
    ends = [0.0] * len(rows)
    for phase in phases:
        widths = [row.get(phase, 0.0) for row in rows.values()]
        axis.barh(list(rows), widths, left=ends, label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axis.invert_yaxis()
    return ends


def save_figure(figure, path: Path, dpi: int = 110) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
