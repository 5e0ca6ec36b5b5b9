"""The 27-hour budget: what a step of the 7B recipe costs, phase by phase, and what would make it
cheaper. No GPU is needed.

    python -m bench.experiments.budget                        # validation, ladder, next features, sensitivities; half a minute
    python -m bench.experiments.budget --constants            # every constant with its unit and source
    python -m bench.experiments.budget --measured runs/gpu    # what `make gpu` measured (see `measured`) replaces constants
    python -m bench.experiments.budget --lengths FILE         # response lengths of a real run (see `read_lengths`), not a lognormal

Steps are simulated by `bench.experiments.simulator`. No constant was fitted to the published step
times that `validate` predicts; its realism factor, published over predicted, stands beside every
figure in hours. Writes bench/results/budget.json and budget.png; the last line printed is the JSON.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import geometric_mean, stdev

import numpy as np

from bench.experiments.simulator import (
    GPUS,
    MODELS,
    PERFECT_MACHINE,
    PHASES,
    Machine,
    Rates,
    Result,
    Setup,
    decode_cost,
    drain,
    fitting,
    ledger,
    pass_seconds,
    recipe,
    shape,
    simulate,
)
from bench.harness import ROOT, markdown, provenance, write_json
from drgrpo.types import UserError

RESULTS = ROOT / "bench" / "results"
PUBLISHED_HOURS, DRAWS = 27.0, 20


# ---- the ladder, and what comes next

NAIVE = dict(
    batching="padded",
    microbatch=1,
    forwards=1,
    drop=False,
    fused_head=False,
    sync="gloo",
    overlap_grading=False,
    one_eval=False,
)
RUNGS = (  # the naive implementation, then one feature more at a time
    ("naive: one response a pass, equal counts", NAIVE),
    ("+ packing, balance", dict(batching="packed", microbatch=16384)),
    ("+ sampler's log-probs", dict(forwards=0)),
    ("+ zero advantages dropped", dict(drop=True)),
    ("+ fused head and loss", dict(fused_head=True, microbatch=16384)),
    ("+ selective checkpointing", dict(checkpointing="selective", microbatch=16384)),
    ("+ sync in the process", dict(sync="in process")),
    ("+ grading while sampling", dict(overlap_grading=True)),
    ("+ evaluation sets in one call = ours, with flags", dict(one_eval=True)),
)
FLAGS = dict(
    forwards=0, checkpointing="selective"
)  # --old-logprob sampler --checkpointing selective

NEXT = (  # name, changes of the setup or of the rates, price
    ("compiled blocks (--compile)", dict(fused_blocks=True), "exact up to rounding"),
    ("a group's prompt trained once", dict(prompt_once=True), "exact"),
    ("lengths dealt evenly to engines (an oracle's)", dict(spread=True), "exact"),
    ("--tp 2", dict(tp=2, slots=256), "exact up to rounding"),
    ("--tp 4 --sampler-batch 512", dict(tp=4, slots=512), "exact up to rounding"),
    ("--sampler-batch 512", dict(slots=512), "exact"),
    ("n-gram speculation in the tail", dict(speculate=True), "exact in distribution"),
    ("first update's gradients in the tail", dict(train_in_tail=True), "exact; at most"),
    ("engine step without 1.5 ms of overhead", dict(engine_ms=0.5), "exact"),
    (
        "no second gather (weights kept between passes)",
        dict(nvlink_share=1e9),
        "exact; at most, 15 GB",
    ),
    ("one bulk weight sync", dict(tensor_ms=0.0), "exact"),
    ("tail carry-over, 15 %", dict(carry=0.15), "off-policy by a step"),
    ("tail carry-over, 30 %", dict(carry=0.30), "off-policy by a step"),
    ("one step off, 3 + 5 GPUs", dict(engines=3, asynchronous=True), "off-policy by a step"),
    ("one step off, 4 + 4 GPUs", dict(engines=4, asynchronous=True), "off-policy by a step"),
    ("8-bit weights in rollouts", dict(eight_bit=True), "another sampler; int8 on an A100"),
)
EXACT = dict(tp=4, slots=512, fused_blocks=True)
STACKS = (
    ("ours, with flags", {}),
    ("+ TP 4", dict(tp=4, slots=512)),
    ("+ compiled blocks", EXACT),
    ("+ prompts once, speculation in the tail", EXACT | dict(prompt_once=True, speculate=True)),
    ("+ 15 % carried over", EXACT | dict(prompt_once=True, speculate=True, carry=0.15)),
    ("+ 30 % carried over", EXACT | dict(prompt_once=True, speculate=True, carry=0.3)),
)

SENSITIVITIES = (  # name, low end, high end
    ("mean length 500 / 1200", dict(mean=500), dict(mean=1200)),
    ("sigma 0.5 / 1.0", dict(sigma=0.5), dict(sigma=1.0)),
    ("truncated 0 / 10 %", dict(cap_share=0.0), dict(cap_share=0.10)),
    ("groups kept 35 / 80 %", dict(keep=0.35), dict(keep=0.80)),
    ("training share of GEMM rate 0.95 / 0.6", dict(train_share=0.95), dict(train_share=0.6)),
    ("decode share of copy rate 1 / 0.7", dict(decode_share=1.0), dict(decode_share=0.7)),
    ("all-reduce 15 / 60 us at --tp 4", dict(tp=4, slots=512), dict(tp=4, slots=512, tp_us=60.0)),
    ("engine overhead 1 / 6 ms", dict(engine_ms=1.0), dict(engine_ms=6.0)),
    (
        "eager bytes half / double",
        dict(eager_hidden=50, eager_mlp=5),
        dict(eager_hidden=200, eager_mlp=20),
    ),
    ("Python per response 0.5 / 5 ms", dict(sample_ms=0.5), dict(sample_ms=5.0)),
    ("prompts per step 64 / 256", dict(prompts=64), dict(prompts=256)),
)
MACHINES = (  # recipe, GPU, GPUs, nodes
    ("oat_zero_7b", "A100-80", 8, 1),
    ("oat_zero_7b", "A100-40", 8, 1),
    ("oat_zero_7b", "H100", 8, 1),
    ("oat_zero_7b", "H200", 8, 1),
    ("oat_zero_7b", "A100-80", 16, 2),
    ("oat_zero_1_5b", "A100-80", 8, 1),
    ("oat_zero_1_5b", "A100-40", 8, 1),
    ("oat_zero_1_5b", "H100", 8, 1),
)


def changed(s: Setup, m: Machine, changes: dict) -> tuple[Setup, Machine]:
    """With other fields, of the setup or of the rates; UserError for a name that is neither."""
    of_setup, of_rates = ({f.name for f in fields(cls)} for cls in (Setup, Rates))
    if unknown := set(changes) - of_setup - of_rates:
        raise UserError(f"{sorted(unknown)}: fields neither of Setup nor of Rates")
    s = replace(s, **{k: v for k, v in changes.items() if k in of_setup})
    rates = replace(m.rates, **{k: v for k, v in changes.items() if k in of_rates})
    return fitting(s, m), replace(m, rates=rates)


def ladder(
    m: Machine, draws: int, seed: int, file: np.ndarray | None = None
) -> list[tuple[str, Result]]:
    s, rungs = recipe("oat_zero_7b"), []
    for name, changes in RUNGS:
        s, _ = changed(s, m, changes)
        rungs.append((name, simulate(s, m, draws, seed, file)))
    return rungs


def floors(ours: Setup, draws: int, seed: int, file: np.ndarray | None = None) -> dict[str, Result]:
    """The same steps if every rate were the data sheet's and nothing but bytes and FLOPs took
    time."""
    best = replace(ours, checkpointing="none", microbatch=4096, prompt_once=True)
    shared = replace(best, tp=4, slots=512)
    setups = {
        "roofline": best,
        "roofline, TP 4": shared,
        "roofline, TP 4, half a step carried": replace(shared, carry=0.5),
    }
    return {name: simulate(s, PERFECT_MACHINE, draws, seed, file) for name, s in setups.items()}


# ---- published step times, predicted with the same constants


@dataclass(frozen=True)
class Published:
    name: str
    seconds: float
    setup: Setup
    source: str
    guessed: str
    low: dict = field(default_factory=dict)  # the guesses at their ends
    high: dict = field(default_factory=dict)
    whole: bool = (
        True  # a whole step, from which the realism factor comes; else the training phase alone
    )


# The constants are the same for all rows. oat's row is the least independent: what is assumed of
# gloo and of equal counts in lockstep comes from asking what could take its 27 hours.
FOREIGN = dict(drop=False, fused_head=False, overlap_grading=False, eval_every=0, save_every=0)
ONE_PASS = dict(group=1, minibatches=1, prompt=0, sigma=0.0, cap_share=0.0, forwards=0) | FOREIGN
VERL = Setup(
    gpu="H20",
    gpus=32,
    nodes=2,
    prompts=512,
    group=16,
    minibatches=16,
    cap=20480,
    prompt=200,
    mean=1800,
    sigma=1.0,
    cap_share=0.01,
    tp=4,
    sp=4,
    slots=1024,
    microbatch=45056,
    **FOREIGN,
)
TITAN = Setup(
    model="Llama-3.1-8B",
    gpu="H100-2.4",
    prompts=16,
    cap=8192,
    mean=8192,
    checkpointing="selective",
    **ONE_PASS,
)
PRIME = Setup(
    gpu="H100",
    prompts=16,
    cap=16384,
    mean=16384,
    fused_blocks=True,
    **ONE_PASS | dict(fused_head=True),
)
PUBLISHED = (
    Published(
        "oat Dr. GRPO 7B, 8 x A100",
        PUBLISHED_HOURS * 3600 / 500,
        replace(recipe("oat_zero_7b"), **NAIVE),
        "arXiv 2503.20783: 27 h; 500 steps: guess in sail-sg/understand-r1-zero issue 19",
        "500 steps, lengths, gloo rate",
        dict(mean=600),
        dict(mean=1000),
    ),
    Published(
        "SimpleRL-Zoo 7B, 16 x H100",
        540,
        Setup(
            gpu="H100",
            gpus=16,
            nodes=2,
            prompts=1024,
            minibatches=4,
            cap=8192,
            prompt=150,
            mean=650,
            cap_share=0.01,
            tp=2,
            microbatch=8192,
            **FOREIGN | dict(forwards=2),
        ),
        "hkust-nlp/simpleRL-reason README: about 100 steps in 15 h, said of 7B and 14B together",
        "that 7B took as long as 14B, lengths, micro-batch",
        dict(mean=500),
        dict(mean=900),
    ),
    Published(
        "verl DAPO 7B, 32 x H20",
        749,
        VERL,
        "verl docs/advance/one_step_off.md",
        "lengths; batch and TP as in its script for 128",
        dict(mean=1200),
        dict(mean=2600),
    ),
    Published(
        "verl DAPO 7B, 128 x H20",
        356,
        replace(VERL, gpus=128, nodes=8, cap=28672),
        "verl docs/advance/fully_async.md",
        "lengths, TP",
        dict(mean=1200),
        dict(mean=2600),
    ),
    Published(
        "NeMo-RL Llama-3.1-8B, 16 x H100",
        97.7,
        Setup(
            model="Llama-3.1-8B",
            gpu="H100",
            gpus=16,
            nodes=2,
            prompts=64,
            group=32,
            minibatches=4,
            cap=3900,
            prompt=130,
            mean=1060,
            microbatch=4096,
            **FOREIGN | dict(forwards=2),
        ),
        "NeMo-RL docs/about/performance-summary.md v0.4 (mean 1,060) and grpo-llama3.1-8b-instruct-2n8g.yaml",
        "spread of the lengths, two log-prob passes; PP 2 ignored",
        dict(sigma=0.5),
        dict(sigma=1.0),
    ),
    Published(
        "open-r1 7B, 7 + 1 x A100",
        281,
        Setup(
            engines=1,
            prompts=112,
            calls=16,
            minibatches=1,
            cap=1024,
            prompt=150,
            mean=828,
            sigma=0.6,
            cap_share=0.4,
            batching="padded",
            microbatch=8,
            **FOREIGN,
        ),
        "huggingface/open-r1 issue 161 (mean 828; rewards are multiples of 1/896)",
        "16 rounds of 7 prompts x 8, cap 1024",
        dict(cap_share=0.2),
        dict(cap_share=0.6),
    ),
    Published(
        "torchtitan Llama-3.1-8B, 8 x H100",
        16384 / 5762,
        TITAN,
        "torchtitan benchmarks/llama3_h100_202412_torchtitan.md",
        "nothing",
        whole=False,
    ),
    Published(
        "the same, compiled",
        16384 / 6667,
        replace(TITAN, fused_blocks=True),
        "the same",
        "nothing",
        whole=False,
    ),
    Published(
        "prime-rl Qwen3-4B, 8 x H100, 16k",
        4.69,
        replace(PRIME, model="Qwen3-4B"),
        "prime-rl benchmarks/baselines, 2026-01-15, step_time",
        "tokens (its throughput says 0.47 of these)",
        dict(mean=7625),
        whole=False,
    ),
    Published(
        "prime-rl Qwen3-0.6B, 1 x H100, 16k",
        1.99,
        replace(PRIME, model="Qwen3-0.6B", gpus=1, prompts=2),
        "the same",
        "tokens (its throughput says 0.72 of these)",
        dict(mean=11850),
        whole=False,
    ),
)
VERL_PHASES = {"rollout": 321, "old": 88, "train": 286}  # of its 749 s


def validate(m: Machine, draws: int, seed: int) -> tuple[list[dict], dict]:
    """Predicted against published; the realism factor; and what it is worth: each whole step
    predicted with the factor of the others."""
    rows = []
    for p in PUBLISHED:
        ends = [
            simulate(replace(p.setup, **change), m, draws, seed) for change in ({}, p.low, p.high)
        ]
        seconds = [r.seconds if p.whole else r.phases["train"] for r in ends]
        rows.append(
            {
                "name": p.name,
                "published": p.seconds,
                "predicted": seconds[0],
                "low": min(seconds),
                "high": max(seconds),
                "ratio": p.seconds / seconds[0],
                "whole": p.whole,
                "source": p.source,
                "guessed": p.guessed,
                "phases": ends[0].phases,
            }
        )
    ratios = [row["ratio"] for row in rows if row["whole"]]
    for i, row in enumerate(row for row in rows if row["whole"]):
        row["left_out"] = geometric_mean(ratios[:i] + ratios[i + 1 :]) / row["ratio"]
    return rows, realism(ratios)


def realism(ratios: list[float]) -> dict:
    """Geometric mean of published over predicted, and one geometric standard deviation to each
    side."""
    factor, deviation = geometric_mean(ratios), math.exp(stdev(map(math.log, ratios)))
    return {
        "factor": factor,
        "low": factor / deviation,
        "high": factor * deviation,
        "rows": len(ratios),
    }


# ---- input: a run's lengths, a GPU's measurements


def read_lengths(path: Path) -> np.ndarray:
    """Response lengths: a JSON list of them, or JSON lines with `tokens` (eval.py's
    responses.jsonl) or `token_ids` (a step of train.py --dump-rollouts), or a folder of the
    latter."""
    if not path.exists():
        raise UserError(
            f"--lengths {path} does not exist; train.py --dump-rollouts writes OUT/rollouts/"
        )
    files = sorted(path.glob("step-*.jsonl")) if path.is_dir() else [path]
    text = "".join(file.read_text() for file in files)
    lines = [line for line in text.splitlines() if line.strip()]
    rows = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    )
    try:
        lengths = [
            r if isinstance(r, int) else r["tokens"] if "tokens" in r else len(r["token_ids"])
            for r in rows
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"--lengths {path}: a row has neither `tokens` nor `token_ids`, and is no number"
        ) from error
    if not lengths or min(lengths) < 1:
        raise UserError(f"--lengths {path} holds no response, or an empty one")
    return np.array(lengths)


def measured(folder: Path) -> tuple[Machine, list[str]]:
    """The machine with the constants that FOLDER/gpu.json (bench/gpu.py) measured, and a line for
    every key, used or not.

    {"device": name as CUDA reports it, "parts": {
        "ceilings": {"copy_gb_per_s": .., "gemm_tflops": ..},
        "step": [{"model", "checkpointing", "microbatch", "length", "mfu"}, ..],      microbatch // length sequences a pass
        "rollout": [{"model", "sequences", "prompt", "length", "tokens_per_s"}, ..],  all of one
        length
        "sync": [{"model", "seconds"}, ..]}}                                          on one GPU

    Every part may be missing; anything else is named as not used. Models are those of
    `bench.experiments.simulator.MODELS`."""
    path = folder / "gpu.json"
    if not path.is_file():
        raise UserError(
            f"--measured {folder} holds no gpu.json; run `make gpu` on a GPU first, or leave the option out"
        )
    contents = json.loads(path.read_text())
    device = contents.get("device") or contents.get("where", {}).get("device")
    name, parts, notes = device_key(str(device)), contents.get("parts", {}), []
    left = set(flatten(parts))
    m = Machine(gpus=dict(GPUS))
    for key, target in (("copy_gb_per_s", "copy"), ("gemm_tflops", "gemm")):
        value = parts.get("ceilings", {}).get(key)
        if isinstance(value, int | float):
            notes.append(
                f"measured: ceilings.{key}: {name} {target} {getattr(m.gpus[name], target):g} -> {value:g}"
            )
            m.gpus[name] = replace(
                m.gpus[name],
                **{target: float(value)},
                source=f"data sheet; reached: measured, {path.name}",
            )
            left.discard(f"ceilings.{key}")
    for part, names, keys, ratio in (
        (
            "step",
            ("train_share",),
            {"model", "checkpointing", "microbatch", "length", "mfu"},
            step_ratio,
        ),
        (
            "rollout",
            ("engine_ms", "engine_us"),
            {"model", "sequences", "prompt", "length", "tokens_per_s"},
            rollout_ratio,
        ),
        ("sync", ("tensor_ms",), {"model", "seconds"}, sync_ratio),
    ):
        given = parts.get(part, []) if isinstance(parts.get(part, []), list) else []
        rows = {
            i: row
            for i, row in enumerate(given)
            if isinstance(row, dict) and keys <= set(row) and row["model"] in MODELS
        }
        if not rows:
            continue
        before = m.rates
        try:
            m = calibrate(
                m,
                names,
                lambda m, rows=rows, ratio=ratio: geometric_mean(
                    ratio(m, name, r) for r in rows.values()
                ),
            )
            changes = ", ".join(
                f"{n} {getattr(before, n):g} -> {getattr(m.rates, n):.3g}" for n in names
            )
            notes.append(f"measured: {part}, {len(rows)} rows: {changes}")
            left -= {f"{part}.{i}.{key}" for i in rows for key in keys}
        except UserError as error:
            notes.append(f"measured, not used: {part}: {error}")
    if contents.get("rehearsal"):
        notes.append("a rehearsal on a CPU: these constants are no GPU's")
    return m, notes + [f"measured, not used: {key}" for key in sorted(left)]


def calibrate(m: Machine, names: tuple[str, ...], ratio: Callable[[Machine], float]) -> Machine:
    """With these rates scaled so that `ratio`, what they seem to be off by, is 1; UserError if
    nothing makes it so, as other constants take too much of the time, or too little."""
    for _ in range(100):
        off = ratio(m)
        if abs(off - 1) < 0.01:
            return m
        scaled = {name: getattr(m.rates, name) * min(2.0, max(0.5, off)) for name in names}
        m = replace(m, rates=replace(m.rates, **scaled))
    raise UserError(f"no {' and '.join(names)} gives what was measured: another constant is off")


def step_ratio(m: Machine, gpu: str, row: dict) -> float:
    s = Setup(model=row["model"], gpu=gpu, gpus=1, prompt=0, checkpointing=row["checkpointing"])
    responses = [row["length"]] * max(1, row["microbatch"] // row["length"])
    return row["mfu"] / (
        shape(s.model).flops(0, responses)
        / pass_seconds(s, m, responses, True)
        / (m.gpus[gpu].tflops * 1e12)
    )


def rollout_ratio(m: Machine, gpu: str, row: dict) -> float:
    s = Setup(model=row["model"], gpu=gpu, gpus=1)
    seconds = drain(
        [(row["length"], row["prompt"])] * row["sequences"], row["sequences"], decode_cost(s, m)
    )[0]
    return (
        row["sequences"] * row["length"] / row["tokens_per_s"] / seconds
    )  # what is not bandwidth is overhead


def sync_ratio(m: Machine, gpu: str, row: dict) -> float:
    lm = shape(row["model"])
    return max(1e-3, row["seconds"] - 4 * lm.parameters / m.gpus[gpu].copy / 1e9) / (
        lm.tensors * m.rates.tensor_ms / 1e3
    )


def flatten(tree, prefix: str = "") -> dict[str, object]:
    """Nested objects and lists as {dotted path: leaf}."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        k: v
        for key, value in items
        for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def device_key(device: str) -> str:
    """The key in GPUS of a device's name as CUDA reports it."""
    names = {
        "A100-40": ("A100", "40GB"),
        "A100-80": ("A100",),
        "H100": ("H100",),
        "H200": ("H200",),
        "H20": ("H20",),
    }
    for key, parts in names.items():
        if all(part in device for part in parts):
            return key
    raise UserError(
        f"gpu.json was measured on {device!r}, of which GPUS in bench/experiments/simulator.py has no data sheet: add it there"
    )


# ---- the report: every function prints a table and returns what it shows


def hours(r: Result, real: dict) -> str:
    """Raw, and with the realism factor (one deviation)."""
    return f"{r.hours:.1f} raw, {r.hours * real['factor']:.1f} ({r.hours * real['low']:.1f}-{r.hours * real['high']:.1f})"


def show(r: Result) -> dict:
    return {
        "seconds": r.seconds,
        "hours": r.hours,
        "spread": r.spread,
        "tail": r.tail,
        "busiest": r.busiest,
        "phases": r.phases,
        "microbatch": r.setup.microbatch,
        "checkpointing": r.setup.checkpointing,
    }


def report_validation(m: Machine, draws: int, seed: int) -> tuple[list[dict], dict]:
    rows, real = validate(m, draws, seed)
    print("\n## Published and predicted, seconds per step (last four: training alone)\n")
    print(
        markdown(
            [
                "",
                "published",
                "predicted",
                "guesses at their ends",
                "published / predicted",
                "left out",
                "guessed",
            ],
            [
                [
                    r["name"],
                    float(r["published"]),
                    r["predicted"],
                    f"{r['low']:.1f} to {r['high']:.1f}",
                    f"{r['ratio']:.2f}",
                    f"{r['left_out']:.2f}" if r["whole"] else "",
                    r["guessed"],
                ]
                for r in rows
            ],
        )
    )
    verl = next(r for r in rows if r["name"].startswith("verl"))["phases"]
    phases = ", ".join(
        f"{phase} {seconds / verl[phase]:.2f}" for phase, seconds in VERL_PHASES.items()
    )
    bound = realism(
        [r["ratio"] for r in rows if r["whole"] and not r["name"].startswith("SimpleRL")]
    )["factor"]
    print(
        f"\nrealism factor (published / predicted, geometric mean of {real['rows']} whole steps): {real['factor']:.2f}, one "
        f"deviation {real['low']:.2f} to {real['high']:.2f}; {bound:.2f} without SimpleRL-Zoo, whose 15 h are a bound. "
        f"left out: predicted x the factor of the other rows / published. verl's 32 GPUs by phase: {phases}."
    )
    return rows, real


def report_ladder(named: list[tuple[str, Result]], real: dict) -> None:
    print("\n## The 7B recipe on 8 x A100-80GB, seconds per step by phase; hours of 500 steps\n")
    print(
        markdown(
            ["", *PHASES, "s/step", "speed", "hours"],
            [
                [
                    name,
                    *(r.phases[p] for p in PHASES),
                    f"{r.seconds:.1f} ± {r.spread:.1f}",
                    f"{named[0][1].seconds / r.seconds:.1f} x",
                    f"{r.hours:.1f}" if name.startswith("roofline") else hours(r, real),
                ]
                for name, r in named
            ],
        )
    )


def report_next(
    ours: Setup, m: Machine, draws: int, seed: int, file
) -> list[tuple[str, str, Result]]:
    reference, found = simulate(ours, m, draws, seed, file), []
    for name, changes, price in NEXT:
        found.append((name, price, simulate(*changed(ours, m, changes), draws, seed, file)))
    found.sort(key=lambda row: row[2].seconds)
    print("\n## Next features, each alone on top of ours with flags\n")
    print(
        markdown(
            ["", "s/step saved", "hours saved, raw", "price"],
            [
                [name, reference.seconds - r.seconds, reference.hours - r.hours, price]
                for name, price, r in found
            ],
        )
    )
    return found


def report_stacks(
    ours: Setup, m: Machine, draws: int, seed: int, file, real: dict, anchor: float
) -> list[tuple[str, Result]]:
    found = [
        (name, simulate(*changed(ours, m, changes), draws, seed, file)) for name, changes in STACKS
    ]
    print("\n## Under 9 hours, under 5: the features on top of each other\n")
    print(
        markdown(
            ["", "s/step", "hours", "anchored at 27 h"],
            [[name, r.seconds, hours(r, real), r.hours * anchor] for name, r in found],
        )
    )
    return found


def report_sensitivities(
    ours: Setup, m: Machine, draws: int, seed: int, file
) -> list[tuple[str, Result, Result]]:
    base = simulate(ours, m, draws, seed, file).hours
    found = [
        (name, *(simulate(*changed(ours, m, c), draws, seed, file) for c in ends))
        for name, *ends in SENSITIVITIES
    ]
    print(f"\n## Sensitivities of ours with flags, raw hours ({base:.1f} at the assumptions)\n")
    print(
        markdown(
            ["", "first", "second"],
            [
                [name, *(f"{r.hours:.1f} ({r.hours - base:+.1f})" for r in ends)]
                for name, *ends in found
            ],
        )
    )
    return found


def report_machines(
    m: Machine, draws: int, seed: int, file, real: dict
) -> list[tuple[str, Result, Result, Result]]:
    found = []
    for name, gpu, count, nodes in MACHINES:
        s = recipe(name, gpu=gpu, gpus=count, nodes=nodes)
        three = (
            simulate(*changed(s, m, change), draws, seed, file)
            for change in ({}, FLAGS, FLAGS | EXACT)
        )
        found.append((f"{name}, {count} x {gpu}", *three))
    print("\n## Other machines: as shipped; with flags, in what fits; more: TP 4, compiled\n")
    print(
        markdown(
            [
                "",
                "shipped, s/step",
                "hours",
                "flags, s/step",
                "hours",
                "micro-batch",
                "vLLM",
                "more, s/step",
                "hours",
            ],
            [
                [
                    name,
                    a.seconds,
                    hours(a, real),
                    b.seconds,
                    hours(b, real),
                    b.setup.microbatch,
                    "sleeps" if ledger(b.setup, m).sleep else "stays",
                    c.seconds,
                    hours(c, real),
                ]
                for name, a, b, c in found
            ],
        )
    )
    return found


def report(m: Machine, draws: int, seed: int, file: np.ndarray | None) -> dict:
    rows, real = report_validation(m, max(2, draws // 3), seed)
    rungs = ladder(m, draws, seed, file)
    naive, ours, shipped = (
        rungs[0][1],
        rungs[-1][1],
        simulate(recipe("oat_zero_7b"), m, draws, seed, file),
    )
    named = [
        *rungs,
        ("oat_zero_7b as shipped", shipped),
        *floors(ours.setup, draws, seed, file).items(),
    ]
    report_ladder(named, real)
    anchor = PUBLISHED_HOURS / naive.hours
    print(
        f"\nanchored at {PUBLISHED_HOURS:g} h for the naive rung: as shipped {shipped.hours * anchor:.1f} h, with flags "
        f"{ours.hours * anchor:.1f} h (--old-logprob sampler --checkpointing selective). An engine runs fewer than 16 "
        f"sequences in {ours.tail:.0%} of the rollout; the busiest rank has {naive.busiest:.2f} x the mean tokens naive, "
        f"{ours.busiest:.2f} x ours."
    )
    following = report_next(ours.setup, m, draws, seed, file)
    stacks = report_stacks(ours.setup, m, draws, seed, file, real, anchor)
    sensitivities = report_sensitivities(ours.setup, m, draws, seed, file)
    machines = report_machines(m, draws, seed, file, real)
    return {
        "validation": rows,
        "realism": real,
        "anchor": anchor,
        "ladder": [{"name": n} | show(r) for n, r in named],
        "next": [{"name": n, "price": price} | show(r) for n, price, r in following],
        "stacks": [{"name": n} | show(r) for n, r in stacks],
        "sensitivities": [{"name": n, "hours": [a.hours, b.hours]} for n, a, b in sensitivities],
        "machines": [
            {"name": n, "shipped": show(a), "flags": show(b), "more": show(c)}
            for n, a, b, c in machines
        ],
    }


def figure(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, (bars, dots) = plt.subplots(
        1, 2, figsize=(15, 5), width_ratios=(2, 1), constrained_layout=True
    )
    rows, factor = result["ladder"][::-1], result["realism"]["factor"]
    left = np.zeros(len(rows))
    for phase in PHASES:
        widths = np.array([row["phases"][phase] for row in rows])
        bars.barh([row["name"] for row in rows], widths, left=left, label=phase)
        left += widths
    for y, row in enumerate(rows):
        realistic = (
            ""
            if row["name"].startswith("roofline")
            else f"  (x {factor:.2f}: {row['hours'] * factor:.1f} h)"
        )
        bars.text(left[y], y, f" {row['hours']:.1f} h{realistic}", va="center", fontsize=8)
    bars.set(
        xlabel="s per step",
        xlim=(0, 1.25 * left.max()),
        title="predicted: 7B, 8 x A100-80GB, hours of 500 steps",
    )
    bars.legend(fontsize=7, ncol=2, loc="center right")
    for row in result["validation"]:
        error = [[row["predicted"] - row["low"]], [row["high"] - row["predicted"]]]
        dots.errorbar(
            row["predicted"],
            row["published"],
            xerr=error,
            fmt="o" if row["whole"] else "s",
            ms=5,
            capsize=2,
            label=row["name"],
        )
    ends = np.array([0.5, 1000.0])
    dots.plot(ends, ends, "k-", lw=0.8)
    dots.plot(ends, factor * ends, "k--", lw=0.8)
    dots.set(
        xscale="log",
        yscale="log",
        xlabel="predicted, s per step",
        ylabel="published",
        title="dashed: realism factor",
    )
    dots.legend(fontsize=6)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def constants(m: Machine) -> str:
    named = [
        (f, getattr(owner, f.name))
        for owner in (m.rates, Setup())
        for f in fields(owner)
        if f.metadata
    ]
    source = lambda f, value: f.metadata["source"] if value == f.default else "measured: gpu.json"  # noqa: E731
    rates = [[f.name, f"{value:g}", f.metadata["unit"], source(f, value)] for f, value in named]
    gpus = [
        [n, g.tflops, g.bandwidth, g.gib, g.nvlink, g.gemm, g.copy, g.source]
        for n, g in m.gpus.items()
    ]
    heads = [
        "GPU",
        "TFLOP/s",
        "GB/s",
        "GiB",
        "NVLink GB/s",
        "GEMM reached",
        "copy reached",
        "source",
    ]
    return f"{markdown(['constant', 'value', 'unit', 'source'], rates)}\n\n{markdown(heads, gpus)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--constants", action="store_true", help="print every constant and stop")
    parser.add_argument(
        "--measured", type=Path, help="folder with gpu.json (default: bench/results, if it has one)"
    )
    parser.add_argument("--lengths", type=Path, help="response lengths of a run")
    parser.add_argument(
        "--draws", type=int, default=DRAWS, help=f"simulated steps of a setup ({DRAWS})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    folder = args.measured or (RESULTS if (RESULTS / "gpu.json").is_file() else None)
    m, notes = measured(folder) if folder else (Machine(), [])
    if not any(note.startswith("measured:") for note in notes):
        notes.insert(
            0, "no GPU measurement: all hardware constants are from data sheets and assumptions"
        )
    if args.constants:
        print(*notes, "", constants(m), sep="\n")
        return
    file = read_lengths(args.lengths) if args.lengths else None
    print("# The 27-hour budget", "", *notes, sep="\n")
    result = {
        "where": provenance(),
        "notes": notes,
        "draws": args.draws,
        "seed": args.seed,
        "lengths": str(args.lengths or "lognormal"),
        "rates": asdict(m.rates),
        "data": {f.name: f.default for f in fields(Setup) if f.metadata},
    }
    result |= report(m, args.draws, args.seed, file)
    args.out.mkdir(parents=True, exist_ok=True)
    figure(result, args.out / "budget.png")
    print(f"\n{time.perf_counter() - started:.0f} s\n")
    print(write_json(args.out / "budget.json", result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
