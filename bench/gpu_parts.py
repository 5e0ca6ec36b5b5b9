"""The parts of `make gpu` that are no benchmark by themselves: what the card reaches, the pieces of
the fused head, and the tiny recipe as a user runs it.

    python -m bench.gpu_parts ceilings --out DIR
    python -m bench.gpu_parts pieces --out DIR
    python -m bench.gpu_parts tiny_vllm --out DIR --rehearse        # on a CPU

DIR/PART.json has what was measured, and what must be so. Exit status 1 if something is not.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from bench.harness import (
    ROOT,
    command_line,
    interleaved,
    provenance,
    quantiles,
    read_json,
    run_limited,
    write_json,
)
from bench.static_report import SHAPES
from drgrpo.kernels import linear_drgrpo as head
from drgrpo.run.files import read_jsonl
from drgrpo.run.flops import peak_flops

OPTIONAL = (
    *("vllm", "flash_attn", "liger_kernel", "trl", "cut_cross_entropy", "verl", "quack"),
    *("datasets", "math_verify", "pytest"),
)


def ceilings(work: Path, rehearse: bool) -> dict:
    """What the memory and the tensor cores of this card reach. Copies count bytes read and written.
    GEMMs take random numbers, ten in a row, so that the clock is the one that lasts."""
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
    result = {
        "where": provenance(device),
        "missing": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
        "copy_bytes": size,
        "gemm_size": n,
        "ms": ms,
        "copy_gb_per_s": 2 * size / 1e6 / ms["copy"]["p50"],
        "gemm_tflops": count * 2 * n**3 / 1e9 / ms["gemm"]["p50"],
    }
    if rehearse:
        return result
    card, peak = torch.cuda.get_device_properties(0), peak_flops(torch.device("cuda", 0))
    return result | {
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_gib": card.total_memory / 2**30,
        "l2_mib": card.L2_cache_size / 2**20,
        "cuda": torch.version.cuda,
        "data_sheet_tflops": peak / 1e12 if peak else None,
    }


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
LARGE_WORKSPACE = ":262144:2"  # KiB and count: cuBLAS may then split K by itself


def pieces(work: Path, rehearse: bool) -> dict:
    """Milliseconds of the fused head's pieces. dX by chunk size: as it is, as a batch over parts of
    the vocabulary that is then summed, and as it is where cuBLAS has a large workspace. dW of one
    chunk: written, accumulated, and added by itself. The row pass, by type of the logits."""
    device, repeats = ("cpu", 1) if rehearse else ("cuda", 5)
    models, tokens, chunk = SHAPES, [4096, 6912], 8192
    if rehearse:
        models, tokens, chunk = {"tiny": (64, 258)}, [], 128
    elif torch.cuda.get_device_properties(0).total_memory > 40e9:
        tokens = [*tokens, 16_384]
    tokens = sorted([*tokens, chunk])
    rows, large = [], os.environ.get(WORKSPACE) == LARGE_WORKSPACE
    for model, (D, V) in models.items():
        x = torch.randn(max(tokens), D, device=device, dtype=torch.bfloat16)
        w = torch.randn(V, D, device=device, dtype=torch.bfloat16)
        z = torch.randn(max(tokens), V, device=device, dtype=torch.bfloat16)
        contenders = dx_contenders(z, w, x, tokens, large)
        if not large:
            contenders |= dw_contenders(z[:chunk], x[:chunk], w)
            contenders |= row_contenders(chunk, V, device)
        interleaved(contenders, device, 1)
        for what, times in interleaved(contenders, device, repeats).items():
            rows.append({"model": model, "what": what, "ms": quantiles(times)})
        del x, w, z, contenders
    if not large:
        write_json(work / "pieces.json", {"rows": rows})  # the other process may take too long
        rows += in_large_workspace(work, rehearse)
    return {"rows": rows}


def dx_contenders(
    z: Tensor, w: Tensor, x: Tensor, tokens: list[int], large: bool
) -> dict[str, Callable]:
    """The product dZ W, whose tiles may not fill their last wave."""
    V, D = w.shape
    parts = 3 if V % 3 == 0 else 2
    w_parts, found = w.view(parts, V // parts, D), {}

    def split(z_CV: Tensor, out: Tensor) -> None:
        z_parts = z_CV.view(len(z_CV), parts, V // parts).transpose(0, 1)
        if z_CV.is_cuda:
            sums = torch.bmm(z_parts, w_parts, out_dtype=torch.float32)
        else:
            sums = torch.bmm(z_parts.float(), w_parts.float())
        out.copy_(sums.sum(0))

    for C in tokens:
        out = torch.empty_like(x[:C])
        suffix = ", large workspace" if large else ""
        found[f"dX {C}{suffix}"] = partial(head._matmul, z[:C], w, out)
        if not large:
            found[f"dX {C}, split in {parts}"] = partial(split, z[:C], out)
    return found


def dw_contenders(z: Tensor, x: Tensor, w: Tensor) -> dict[str, Callable]:
    """What reading and writing dW once more costs."""
    dw, product = (torch.zeros(w.shape, device=w.device) for _ in range(2))

    def add_apart() -> None:
        head._matmul(z.T, x, product)
        dw.add_(product)

    return {
        "dW written": partial(head._matmul, z.T, x, dw),
        "dW accumulated": partial(head._matmul, z.T, x, dw, accumulate=True),
        "dW product and sum": add_apart,
    }


def row_contenders(C: int, V: int, device: str) -> dict[str, Callable]:
    """The row pass of a loss over one chunk. It overwrites its logits, and then takes those."""
    rows = head._rows_triton if device == "cuda" else head._rows_torch
    stat, one = torch.empty(len(head.STATS) - 1, C, device=device), torch.ones(1, device=device)
    clipped = torch.empty(C, dtype=torch.int8, device=device)
    target, found = torch.zeros(C, dtype=torch.int64, device=device), {}
    objective = head._Objective(clip_low=0.2, clip_high=0.2)
    # An old log-prob of 0 keeps the ratio below its upper bound, so that no row is clipped.
    per_token = head._PerToken(torch.ones(C, device=device), torch.zeros(C, device=device))
    for dtype in (torch.bfloat16, torch.float32):
        z = torch.randn(C, V, device=device, dtype=dtype)
        arguments = (z, V, target, per_token, one, objective, stat, clipped, torch.bfloat16)
        found[f"row pass, {str(dtype).removeprefix('torch.')}"] = partial(rows, *arguments)
    return found


def in_large_workspace(work: Path, rehearse: bool) -> list[dict]:
    """The rows of dX in a process whose cuBLAS has another workspace from its start."""
    out = work / "large_workspace"
    command = [sys.executable, "-m", "bench.gpu_parts", "pieces", "--out", str(out)]
    command = ["env", f"{WORKSPACE}={LARGE_WORKSPACE}", *command]
    if wrong := run_limited(command + (["--rehearse"] if rehearse else []), 60.0):
        return [{"variant": "dX, large workspace", "skipped": wrong}]
    return read_json(out / "pieces.json")["rows"]


TINY = "--recipe tiny --engine torch --eval-every 0 --eval-samples 1 --save-every 0"
TINY_VLLM = (
    "--recipe tiny --engine vllm --dtype bfloat16 --checkpointing full --sleep on --parity warn "
    "--prompts-per-step 16 --group-size 4 --minibatches 2 --eval-data= --save-every 0"
)


def train_and_resume(flags: str, out: Path, steps: int, more: int) -> tuple[list[dict], str, dict]:
    """train.py as a user runs it, to its end and then with more steps: its metrics, what it said,
    and what must be so."""
    command = [sys.executable, "train.py", *flags.split(), "--out", str(out), "--steps"]
    first, resumed = (echo([*command, str(end)]) for end in (steps, steps + more))
    rows, each_step = read_jsonl(out / "metrics.jsonl"), list(range(1, steps + more + 1))
    checks = {
        f"training continues after step {steps}": f"after step {steps}" in resumed,
        f"steps 1 to {steps + more}, each once": [row["step"] for row in rows] == each_step,
    }
    return rows, first + resumed, checks


def figures_of(rows: list[dict], window: int) -> dict:
    """What the metrics of a run say. The mean reward is that of so many steps."""
    rewards = [row["reward_mean"] for row in rows]
    trained = [row for row in rows if row["parity_max"] is not None]  # on any response at all
    return {
        "steps": len(rows),
        "reward_first": fmean(rewards[:window]),
        "reward_last": fmean(rewards[-window:]),
        "parity_mean": max((row["parity_mean"] for row in trained), default=None),
        "parity_max": max((row["parity_max"] for row in trained), default=None),
        "seconds_per_step": median(row["seconds"]["total"] for row in rows),
    }


def tiny(work: Path, rehearse: bool) -> dict:
    """The tiny recipe with our own sampler: it learns."""
    steps, more, out = *((12, 2) if rehearse else (40, 5)), work / "tiny"
    rows, _, checks = train_and_resume(TINY, out, steps, more)
    result = figures_of(rows[:steps], steps // 4) | {"steps": len(rows)}
    first, last = result["reward_first"], result["reward_last"]
    better = f"the mean reward of {steps // 4} steps grows by 0.05 or more"
    checks[f"{better}, {first:.2f} to {last:.2f}"] = last > first + 0.05
    greedy = [row["accuracy"] for row in read_jsonl(out / "eval.jsonl") if row["temperature"] == 0]
    return result | {"accuracy_first": greedy[0], "accuracy_last": greedy[-1], "checks": checks}


def tiny_vllm(work: Path, rehearse: bool) -> dict:
    """A few steps with vLLM in the mode of a real run: bfloat16, FSDP2, and vLLM sleeps while the
    trainer works. First `--dry-run`, and after each run the last weights are probed."""
    if importlib.util.find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed"}
    out = work / "tiny_vllm"
    command = [sys.executable, "train.py", *TINY_VLLM.split(), "--out", str(out)]
    tried = echo([*command, "--steps", "2", "--dry-run"])
    rows, said, checks = train_and_resume(TINY_VLLM, out, 2, 2)
    checks |= {
        "the dry run names time and memory": "dry run: a micro-batch of" in tried,
        "vLLM sleeps while training": rehearse or "vLLM sleeps while training" in said,
        "trainer and sampler agree": "trainer and sampler disagree" not in said,
    }
    return figures_of(rows, 1) | {"checks": checks}


def echo(command: list[str]) -> str:
    """Runs it, shows its stdout line by line, and returns that. Its stderr is ours."""
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return "".join(lines)


PARTS = {"ceilings": ceilings, "pieces": pieces, "tiny": tiny, "tiny_vllm": tiny_vllm}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU")
    args = parser.parse_args()
    result = PARTS[args.part](args.out, args.rehearse)
    print(write_json(args.out / f"{args.part}.json", result))
    if wrong := [check for check, holds in result.get("checks", {}).items() if not holds]:
        sys.exit(f"not so: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
