"""How fast are rollout and weight sync at the size of a real model, are the sampler's log-probs the
trainer's, and how much memory does vLLM take?

    python -m bench.bench_rollout --device cuda                # 1.5B, random weights, every build
    python -m bench.bench_rollout --rehearse                   # the same on a CPU, the tiny model
    python -m bench.bench_rollout --rehearse --engines torch

Every engine is built in a process of its own, with a share of the time. What ends one of them ends
no other. `vllm` is vLLM as the trainer builds it. `vllm_model_head` differs in one argument: the LM
head computes in the model's type. `torch` is there for parity, not for speed.

A build is timed, and on a GPU the memory of each stage of vLLM's start is measured beside what the
ledger of drgrpo/run/memory.py counts. Then it samples a batch that drains as responses end. A
made-up set of stop tokens ends them, as random weights have no sense of an end. tokens/s comes with
the share of the time in which fewer than 16 sequences ran. Batches whose responses all have one
length follow, with one setting of the sampling at a time off, and small ones as in a tail.

Then the trainer's weights move. Its log-probs of fresh samples are compared with the sampler's
before the sync, for scale, and after it. vLLM also sleeps at level 2, gives its memory back, wakes,
takes the weights and is compared once more. Exit status 1 if a sync does not shrink the difference
tenfold, or if a process failed. Whether the gate of drgrpo/parity.py would let it pass is reported
only, because bfloat16 errors grow more through a deep network of random weights than through a
trained one. DIR/rollout.json is written after every stage, and it is the last line printed.
"""

import argparse
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from bench.harness import (
    RESULTS,
    command_line,
    figure,
    markdown,
    provenance,
    read_json,
    run_limited,
    write_json,
)
from bench.shapes import SHAPES, model_config
from drgrpo import distributed, engine_vllm, pack, parity
from drgrpo.config import RECIPES, Config
from drgrpo.engine import Engine, make_engine
from drgrpo.model import Objective, Policy, load_policy, resolve_logits
from drgrpo.run.memory import GIB, make_ledger
from drgrpo.tiny.tokenizer import byte_tokenizer
from drgrpo.tiny.warmup import Warmup, build_tiny_model
from drgrpo.types import Completion, Request, Sampling, UserError

PROMPT, TAIL, ROUNDS = 120, 16, 2


@dataclass(frozen=True)
class Build:
    """An engine. `arguments` replace those of vLLM. On a GPU it samples `responses` of `budget`
    tokens at most. It is not begun with less than `least` seconds to go."""

    engine: str
    arguments: dict[str, Any]
    responses: int
    budget: int
    least: float


BUILDS = {
    "vllm": Build("vllm", {}, 512, 512, least=60.0),
    "vllm_model_head": Build(
        "vllm", {"hf_overrides": {"head_dtype": "model"}}, 256, 512, least=50.0
    ),
    "torch": Build("torch", {}, 64, 96, least=20.0),
}
VARIANTS = {
    "as in training": {},
    "flat log-probs off": {"flat_logprobs": False},
    "seeds off": {"seed": None},
    "log-probs off": {"logprobs": None, "flat_logprobs": False},
}
"""One setting of vLLM's SamplingParams at a time off."""
FEW = (8, 16, 64)
"""Sequences of the batches that tell how fast the tail of a rollout is."""


def build_model(shape: str, device: torch.device, folder: str) -> None:
    """Random bfloat16 weights from one seed, on disk. Blocks add more to the residual stream than
    the embedding brings, else a tied head would repeat its input. The last norm gives logits the
    spread at which the entropy is a few nats. At transformers' own scale every token is about as
    likely as any other."""
    torch.manual_seed(0)
    no_ends = {"eos_token_id": None, "bos_token_id": None}
    config = model_config(SHAPES[shape], max_position_embeddings=4096, **no_ends)
    config.initializer_range = config.hidden_size**-0.5
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        lm.base_model.norm.weight.mul_(math.sqrt(2 * math.log(config.vocab_size)))
    lm.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def make_requests(count: int, prompt: int, vocabulary: int, step: int) -> list[Request]:
    """Groups of 8 to a prompt, as in training."""
    generator = torch.Generator().manual_seed(step)
    prompts = torch.randint(vocabulary, (count // 8, prompt), generator=generator).tolist()
    return [Request(prompts[i // 8], seed=1000 * step + i) for i in range(count)]


def make_sampling(budget: int, vocabulary: int) -> Sampling:
    """A token in so many ends a response that they are about a third of the budget long."""
    stop = tuple(range(0, vocabulary, max(2, budget // 3)))
    return Sampling(max_new_tokens=budget, stop_token_ids=stop)


def sample(engine, requests: list[Request], sampling: Sampling) -> tuple[list[Completion], dict]:
    """The responses, and how long the batch took to drain."""
    start, ends = time.perf_counter(), []
    completions = engine.generate(
        requests, sampling, lambda i, c: ends.append(time.perf_counter() - start)
    )
    seconds, lengths = time.perf_counter() - start, [len(c.token_ids) for c in completions]
    tail = seconds - ends[-TAIL] if len(ends) > TAIL else seconds
    speed = dict(rollout_s=seconds, tokens_per_s=sum(lengths) / seconds, tail_share=tail / seconds)
    size = dict(responses=len(requests), tokens=sum(lengths), longest=max(lengths))
    return completions, size | speed


def gaps(policy: Policy, requests: list, completions: list, dtype, device) -> dict:
    """|trainer - sampler| over all response tokens, in nats, and whether the gate would let them
    pass."""
    parts = []
    for r, c in zip(requests, completions, strict=True):
        batch = pack.pack([pack.Sequence(r.prompt_ids, c.token_ids, c.logprobs, 0.0)], device)
        parts.append((policy.logprob(batch) - batch.sampler_logprob_N).abs())
    gap_N, limits = torch.cat(parts).double(), parity.LIMITS[dtype]
    mean, largest, p999 = gap_N.mean().item(), gap_N.max().item(), gap_N.quantile(0.999).item()
    passes = mean <= limits[0] and largest <= limits[1]
    gate = {"gap_limits": limits, "gate_passes": passes}
    return {"gap_mean": mean, "gap_p999": p999, "gap_max": largest, **gate}


def move(policy: Policy) -> None:
    """Every weight, by noise of a tenth of its size: a sampler that missed the sync would show."""
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * p.std() * torch.randn_like(p))


# ---- vLLM with other arguments


@contextmanager
def vllm_arguments(changes: dict[str, Any], row: dict, device: torch.device) -> Iterator[None]:
    """vLLM is built with these arguments in place of its own, and the memory of every stage of its
    start comes into the row."""
    original = engine_vllm.llm_arguments
    with ExitStack() as stack:

        def changed(*args, **options) -> dict[str, Any]:
            watch_start(stack, row, device)  # by now vLLM is imported
            return original(*args, **options) | changes

        stack.enter_context(patch.object(engine_vllm, "llm_arguments", changed))
        yield


@contextmanager
def sampling_arguments(changes: dict[str, Any]) -> Iterator[None]:
    """Every request is sampled with these arguments in place of its own."""
    original = engine_vllm.sampling_arguments
    changed = lambda *args: original(*args) | changes  # noqa: E731
    with ExitStack() as stack:
        stack.enter_context(patch.object(engine_vllm, "sampling_arguments", changed))
        if "logprobs" in changes:
            stack.enter_context(patch.object(engine_vllm, "to_completion", without_logprobs))
        yield


def without_logprobs(output) -> Completion:
    return Completion(list(output.token_ids), [], finished=output.finish_reason == "stop")


def steady(engine: Engine, job: dict, vocabulary: int, variants: dict) -> dict[str, float]:
    """tokens/s of each variant with responses of one length, nothing draining. Variants take turns.
    The first turn compiles, and is left out."""
    sampling = Sampling(max_new_tokens=job["length"], stop_token_ids=())
    requests = make_requests(job["sequences"], job["prompt"], vocabulary, 4)
    speeds = {name: [] for name in variants}
    for _ in range(1 + ROUNDS):
        for name, changes in variants.items():
            with sampling_arguments(changes) if changes else ExitStack():
                speeds[name].append(sample(engine, requests, sampling)[1]["tokens_per_s"])
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}


# ---- memory

MEASURED = {"seconds": "seconds", "kept_gib": "GiB kept", "peak_gib": "GiB at the peak"}
STAGES = {
    "load_model": "weights",
    "determine_available_memory": "profile",
    "initialize_from_config": "key-value cache",
    "compile_or_warm_up_model": "graphs",
}
"""What vLLM's executor calls of a worker, in this order, and what each is there for."""


@contextmanager
def memory(row: dict, key: str, device: torch.device) -> Iterator[None]:
    """row[key]: seconds of the block. On a GPU also GiB that it keeps of the free memory, and GiB
    that PyTorch allocates at its worst moment beyond what was there."""
    gpu = torch.cuda if device.type == "cuda" else None
    if gpu:
        gpu.synchronize()
        gpu.reset_peak_memory_stats()
        free, allocated = gpu.mem_get_info()[0], gpu.memory_allocated()
    start = time.perf_counter()
    yield
    if gpu:
        gpu.synchronize()
    row[key] = {"seconds": time.perf_counter() - start}
    if gpu:
        row[key]["kept_gib"] = (free - gpu.mem_get_info()[0]) / GIB
        row[key]["peak_gib"] = (gpu.max_memory_allocated() - allocated) / GIB


def watch_start(stack: ExitStack, row: dict, device: torch.device) -> None:
    """Until the stack is closed, the stages of vLLM's start are measured. One that its worker does
    not have under the known name is left out."""
    if device.type == "cuda":
        from vllm.v1.worker.gpu_worker import Worker
    else:
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    for stage, name in STAGES.items():
        if hasattr(Worker, stage):
            watched = watch(getattr(Worker, stage), row, name, device)
            stack.enter_context(patch.object(Worker, stage, watched))


def watch(stage: Callable, row: dict, name: str, device: torch.device) -> Callable:
    def watched(*args, **options):
        with memory(row, name, device):
            return stage(*args, **options)

    return watched


def describe(worker) -> dict:
    """What vLLM decided by itself."""
    return {
        "runner": type(worker.model_runner).__module__,
        "v2_runner": getattr(worker, "use_v2_model_runner", None),
        "head_dtype": str(getattr(worker.model_config, "head_dtype", None)),
    }


def ledger(policy: Policy, config: Config, device: torch.device) -> dict[str, float] | str:
    """What the ledger counts for vLLM, in GiB, or why it says that nothing fits."""
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else 80 * GIB
    lm, items = policy.lm, {}
    try:
        phases = vars(make_ledger(config, lm.config, lm.num_parameters(), PROMPT, 1, total))
    except UserError as error:
        return str(error)
    for phase in ("sampler", "sampling"):  # the others are the trainer's
        items |= phases.get(phase, {})
    return items


# ---- one engine


def measure(name: str, folder: str, device, size, row: dict, save: Callable) -> None:
    """Fills the row of one engine, stage by stage. `size`: responses, their budget, prompt
    tokens."""
    (count, budget, prompt), build, on_gpu = size, BUILDS[name], device.type == "cuda"
    is_vllm, type_name = build.engine == "vllm", row["dtype"]
    dtype = getattr(torch, type_name)
    objective = Objective(logits_dtype=resolve_logits("auto", dtype, device))
    policy = load_policy(folder, objective, dtype=dtype, device=device)
    vocabulary = policy.lm.config.vocab_size
    sampling = make_sampling(budget, vocabulary)
    fresh = make_requests(min(count, 64), prompt, vocabulary, 3)

    def compare() -> dict:
        return gaps(policy, fresh, sample(engine, fresh, sampling)[0], dtype, device)

    config = replace(
        RECIPES["oat_zero_1_5b"](),
        engine=build.engine,
        dtype=type_name,
        sampler_batch=256,
        max_new_tokens=budget,
        kv_cache_gb=8.0 if on_gpu else 0.05,
    )
    room = prompt + budget, config.kv_cache_gb, is_vllm and on_gpu
    start = row["memory"] = {}
    with memory(start, "all", device), ExitStack() as stack:
        if is_vllm:
            stack.enter_context(vllm_arguments(build.arguments, start, device))
        engine = make_engine(config, folder, byte_tokenizer(), device, *room)
    start["all"].pop("peak_gib", None)  # only since the last stage began
    row["build_s"] = start["all"]["seconds"]
    if is_vllm:
        row["ledger"] = ledger(policy, config, device)
        row |= engine.llm.collective_rpc(describe)[0]
    save()
    with memory(start, "first weight sync", device):
        engine.sync(policy.named_weights(dtype))
    engine.generate(make_requests(8, prompt, vocabulary, 1), make_sampling(8, vocabulary))
    with memory(start, "sampling", device):
        row |= sample(engine, make_requests(count, prompt, vocabulary, 2), sampling)[1]
    save()
    job = {"sequences": min(count, 256), "prompt": prompt, "length": budget // 4}
    plain = {"as in training": {}}
    row["variants"] = steady(engine, job, vocabulary, VARIANTS if name == "vllm" else plain)
    row["steady"] = job | {"tokens_per_s": row["variants"]["as in training"]}
    row["few"] = {
        str(n): steady(engine, job | {"sequences": n}, vocabulary, plain)["as in training"]
        for n in FEW
    }
    save()
    move(policy)
    row["stale_gap_mean"] = compare()["gap_mean"]
    with memory(start, "weight sync", device):
        engine.sync(policy.named_weights(dtype))
    row["sync_s"] = start["weight sync"]["seconds"]
    row |= compare()
    save()
    if name == "vllm":
        row["after_sleep"] = sleep_and_wake(engine, policy, dtype, device) | compare()
        save()
    engine.close()


def sleep_and_wake(engine: Engine, policy: Policy, dtype, device) -> dict:
    """What sleeping, and waking with new weights, take and keep. Sleep keeps less than nothing. On
    a CPU vLLM does not sleep."""
    slept = {}
    with memory(slept, "sleep", device):
        engine.sleep()
    move(policy)
    with memory(slept, "wake and sync", device):
        engine.sync(policy.named_weights(dtype))
    return slept


def run_build(args: argparse.Namespace, save: Callable[[dict], str]) -> None:
    """One engine in this process."""
    _, _, device = distributed.start()
    name, folder = args.build, str(args.folder)
    # All that vLLM says of itself: backends, graphs, the size of the cache.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    exact = args.rehearse and name == "torch"
    row: dict[str, Any] = {"dtype": "float32" if exact else "bfloat16"}
    report = read_json(args.out / "rollout.json")
    report["where"], report["engines"][name] = provenance(args.device), row
    if not (args.folder / "tokenizer_config.json").exists():
        if args.rehearse:
            build_tiny_model(Warmup(), folder)
        else:
            build_model(args.shape, device, folder)
    build = BUILDS[name]
    size = (16, 24, 20) if args.rehearse else (build.responses, build.budget, PROMPT)
    measure(name, folder, device, size, row, lambda: save(report))
    print(f"{name}: {row}", flush=True)
    distributed.stop()


def run_builds(args: argparse.Namespace, save: Callable[[dict], str]) -> dict:
    """Every engine in a process of its own. The report."""
    end, path, later = time.monotonic() + args.seconds, args.out / "rollout.json", dict(BUILDS)
    save({"shape": "tiny" if args.rehearse else args.shape, "engines": {}})
    with tempfile.TemporaryDirectory() as folder:
        for name, build in BUILDS.items():
            del later[name]
            rest = end - time.monotonic()
            if reason := why_not(name, args.engines, rest):
                outcome = {"skipped": reason}
            else:
                command = [sys.executable, "-m", "bench.bench_rollout", *sys.argv[1:]]
                command += ["--build", name, "--folder", folder]
                kept = sum(b.least for n, b in later.items() if not why_not(n, args.engines, rest))
                failure = run_limited(command, max(build.least, rest - kept))
                outcome = {"failed": failure} if failure else {}
            report = read_json(path)
            report["engines"].setdefault(name, {}).update(outcome)
            save(report)
    return report


def why_not(name: str, engines: list[str] | None, rest: float) -> str | None:
    """Why this engine is not measured, with `rest` seconds to go."""
    if engines is not None and name not in engines:
        return "not asked for"
    if BUILDS[name].engine == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return None if rest >= BUILDS[name].least else f"not reached: {rest:.0f} s left"


# ---- reporting

FIGURES = {
    "computes in": ("dtype", ""),
    "its LM head computes in": ("head_dtype", ""),
    "model runner": ("runner", ""),
    "its V2 runner": ("v2_runner", ""),
    "tokens/s, draining": ("tokens_per_s", ",.0f"),
    "share of that time below 16 sequences": ("tail_share", ".0%"),
    **{f"tokens/s, one length, {name}": (f"variants.{name}", ",.0f") for name in VARIANTS},
    **{f"tokens/s, one length, {n} sequences": (f"few.{n}", ",.0f") for n in FEW},
    "log-probs off before the sync, nats on average": ("stale_gap_mean", ".1e"),
    "after it, on average": ("gap_mean", ".1e"),
    "after it, at most": ("gap_max", ".1e"),
    "after sleep, wake and sync, on average": ("after_sleep.gap_mean", ".1e"),
}
"""What the summary says of an engine: where its row has it, and its format."""


def text(result: dict) -> str:
    """What was measured of every engine, and its memory beside the ledger's figures."""
    engines = {name: row for name, row in result["engines"].items() if "dtype" in row}
    figures = FIGURES | memory_figures(engines.values())
    lines = []
    for label, (path, form) in figures.items():
        lines.append([label, *(figure(row, path, form) for row in engines.values())])
    shown = [line for line in lines if set(line[1:]) != {"-"}]
    return markdown(["", *engines], shown)


def memory_figures(rows: Iterable[dict]) -> dict[str, tuple[str, str]]:
    """The same for all stages that any row has, in their order, and for the ledger's items."""
    figures = {}
    for row, group in product(list(rows), ("memory", "after_sleep", "ledger")):
        items = row.get(group)
        for name, item in items.items() if isinstance(items, dict) else ():
            if group == "ledger":
                figures[f"GiB in the ledger: {name}"] = f"ledger.{name}", ".2f"
            elif isinstance(item, dict):
                for key, what in MEASURED.items():
                    figures[f"{what}: {name}"] = f"{group}.{name}.{key}", ".2f"
    return figures


def complaints(report: dict) -> list[str]:
    """What went wrong: a process, or a sync after which the log-probs are still off."""
    wrong = []
    for name, row in report["engines"].items():
        if "failed" in row:
            wrong.append(f"{name} {row['failed']}")
        for stage in (row, row.get("after_sleep", {})):
            if not stage.get("gap_mean", 0.0) <= row.get("stale_gap_mean", 0.0) / 10:
                gap, stale = stage["gap_mean"], row["stale_gap_mean"]
                was = f"{gap:.1e} nats off after a sync, {stale:.1e} before"
                wrong.append(f"{name} does not have the trainer's weights: {was}")
    return wrong


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default=default)
    add("--shape", choices=SHAPES, default="1.5b")
    add("--engines", nargs="+", choices=BUILDS)
    add("--seconds", type=float, default=math.inf, help="for everything")
    add("--rehearse", action="store_true", help="the tiny model, on a CPU")
    add("--out", type=Path, default=RESULTS, help="folder")
    add("--build", choices=BUILDS, help=argparse.SUPPRESS)  # this one, in this process
    add("--folder", type=Path, help=argparse.SUPPRESS)  # of the model
    args = parser.parse_args()
    if args.device == "cpu" and not args.rehearse:
        parser.error("a model of that size on a CPU would take hours: --rehearse, or --device cuda")
    return args


def main() -> None:
    args = parse()

    def save(report: dict) -> str:
        return write_json(args.out / "rollout.json", report)

    if args.build:
        return run_build(args, save)
    report = run_builds(args, save)
    print(text(report), save(report), sep="\n\n")
    if wrong := complaints(report):
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
