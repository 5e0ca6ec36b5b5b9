"""Does a process that leaves a process group wait for the others?

    python -m bench.bench_teardown --device cuda --out DIR      # one GPU, or two for two more cases
    python -m bench.bench_teardown --device cpu                 # gloo alone

An exception on one process must end all of them within seconds. `destroy_process_group` shuts NCCL
down, and NCCL may wait for work that another process never joins. What it does here decides how a
failed process may leave. Each case is one or two processes of their own, all at the same time. The
first one leaves and is timed. It is ended after 8 s, when it prints where it stands. A case that
blocks is a result and no failure. DIR/teardown.json is written, and it is the last line printed.
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bench.harness import RESULTS, ROOT, command_line, provenance, write_json

LIMIT = 8.0  # seconds that leaving may take
PATIENCE = 75.0  # seconds that a collective of the CPU waits


@dataclass(frozen=True)
class Case:
    """What the first process leaves. `uses_gpu`: a collective on the device ran before."""

    variant: str
    processes: int
    uses_gpu: bool
    peer: str = ""  # the other process: "waits" in a collective of the CPU, or is "gone"


CASES = (
    Case("alone, work outstanding", 1, uses_gpu=True),
    Case("peer waits, GPUs never used", 2, uses_gpu=False, peer="waits"),
    Case("peer waits", 2, uses_gpu=True, peer="waits"),
    Case("peer gone, work outstanding", 2, uses_gpu=True, peer="gone"),
)


def member(case: Case, rank: int, device: str, store: str) -> None:
    """One process of a case."""
    group = {"init_method": f"file://{store}", "rank": rank, "world_size": case.processes}
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", rank if case.uses_gpu else 0)
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE), **group)
    numbers = torch.ones(2**20, device=place)
    if case.uses_gpu:
        dist.all_reduce(numbers)
        numbers.sum().item()  # the first collective is over
    dist.barrier()
    if rank == 1:
        if case.peer == "waits":
            with suppress(RuntimeError):  # the first one is gone
                dist.barrier()
        os._exit(0)
    time.sleep(1.0)  # the peer is where it stays
    if "outstanding" in case.variant:
        if device == "cuda":
            torch.cuda._sleep(2**32)  # some 2 s of the GPU, and the collective comes after it
        dist.all_reduce(numbers, async_op=True)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    begin = time.perf_counter()
    dist.destroy_process_group()
    print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)
    os._exit(0)


def start(case: Case, device: str, store: str) -> list[subprocess.Popen]:
    """The processes of a case. The first one's stdout is ours to read."""
    processes = []
    for rank in range(case.processes):
        arguments = f"gone.Case(**{asdict(case)!r}), {rank}, {device!r}, {store!r}"
        code = f"import bench.bench_teardown as gone; gone.member({arguments})"
        out = subprocess.PIPE if rank == 0 else None
        command = [sys.executable, "-c", code]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=out, text=True))
    return processes


def outcome(process: subprocess.Popen, deadline: float) -> dict:
    """What became of the process that leaves."""
    try:
        shown, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return {"failed": "the processes did not get as far as leaving"}
    if shown.strip():
        return json.loads(shown.splitlines()[-1])
    if process.returncode == 1:
        return {"blocked_s": LIMIT}
    return {"failed": f"ended with status {process.returncode}"}


def why_not(case: Case, device: str) -> str | None:
    """Why this case cannot be had here."""
    if device == "cuda" and case.uses_gpu and torch.cuda.device_count() < case.processes:
        return f"needs {case.processes} GPUs"
    return None


def run(device: str, seconds: float) -> list[dict]:
    rows, running, deadline = [], [], time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for i, case in enumerate(CASES):
            row = asdict(case)
            rows.append(row)
            if reason := why_not(case, device):
                row["skipped"] = reason
            else:
                running.append((row, start(case, device, f"{folder}/{i}")))
        try:
            for row, processes in running:
                row |= outcome(processes[0], deadline)
        finally:
            for _, processes in running:
                for process in processes:
                    process.kill()
                    process.wait()
    return rows


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--seconds", type=float, default=PATIENCE, help="for everything")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    return parser.parse_args()


def main() -> None:
    args = parse()
    result = {"where": provenance(args.device), "rows": run(args.device, args.seconds)}
    for row in result["rows"]:
        print(row, flush=True)
    print(write_json(args.out / "teardown.json", result))


if __name__ == "__main__":
    main()
