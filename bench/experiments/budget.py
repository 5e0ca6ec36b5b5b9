"""Where do 27 hours on 8 x A100 go, and what would save more? Steps are simulated; no GPU is used.

    python -m bench.experiments.budget                        # half a minute
    python -m bench.experiments.budget --constants            # every constant: unit, source
    python -m bench.experiments.budget --measured runs/gpu    # with what `make gpu` measured
    python -m bench.experiments.budget --lengths FILE         # with the response lengths of a run

Result: the simulator predicts 7.9 hours for `oat_zero_7b`, 6.6 for `oat_zero_7b_fast`, and 28 for a
naive implementation. An engine of four GPUs saves time with 7 B parameters and costs time with
1.5 B. Eight published step times are 1.27 times what it predicts for them (0.82 to
1.97), which makes 10.1 hours of the 7.9. Three of the eight are of one system, NeMo-RL.

bench/results/budget.json and budget.png come from two cores of an AMD EPYC.
`bench.experiments.simulator` simulates the steps. No constant was fitted to the published step
times. The last line printed is the JSON.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import geometric_mean, stdev

import numpy as np

from bench.experiments.simulator import (
    GPUS,
    PERFECT_MACHINE,
    PHASES,
    RECIPE_MODELS,
    Machine,
    Queued,
    Result,
    Setup,
    decode_cost,
    drain,
    fitting,
    ledger,
    pass_seconds,
    recipe,
    recomputed,
    shape,
    simulate,
)
from bench.harness import (
    RESULTS,
    command_line,
    markdown,
    new_figure,
    provenance,
    save_figure,
    stacked_bars,
    write_json,
)
from drgrpo.run.files import read_jsonl
from drgrpo.types import UserError

PUBLISHED_HOURS, DRAWS = 27.0, 20
UNMEASURED = "no GPU measurement: all hardware constants are from data sheets and assumptions"


# ---- the ladder, and what comes next

NAIVE = dict(
    **dict(batching="padded", microbatch=1, forwards=1, drop=False, fused_head=False),
    **dict(sync="gloo", overlap_grading=False, one_eval=False, tp=1, slots=256),
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
    ("+ evaluation sets in one call", dict(one_eval=True)),
    ("+ an engine of four GPUs", dict(tp=4, slots=512)),
    ("+ compiled blocks = oat_zero_7b_fast", dict(fused_blocks=True)),
)
FAST = dict(forwards=0, checkpointing="selective", fused_blocks=True)
"""--old-logprob sampler --checkpointing selective --compile true"""

NO_GATHER = "no second gather (weights kept between passes)"
NEXT = (  # name, changes of the setup or of the rates, price
    ("a group's prompt trained once", dict(prompt_once=True), "exact"),
    ("lengths dealt evenly to engines (an oracle's)", dict(spread=True), "exact"),
    ("--tp 2", dict(tp=2, slots=256), "exact up to rounding"),
    ("n-gram speculation in the tail", dict(speculate=True), "exact in distribution"),
    ("first update's gradients in the tail", dict(train_in_tail=True), "exact; at most"),
    ("engine step without 1.5 ms of overhead", dict(engine_ms=0.5), "exact"),
    (NO_GATHER, dict(nvlink_share=1e9), "exact; at most, 15 GB"),
    ("one bulk weight sync", dict(tensor_ms=0.0), "exact"),
    ("tail carry-over, 10 %", dict(carry=0.1), "off-policy by a step"),
    ("tail carry-over, 30 %", dict(carry=0.30), "off-policy by a step"),
    ("one step off, 3 + 5 GPUs", dict(engines=3, asynchronous=True, tp=1), "off-policy by a step"),
    ("one step off, 4 + 4 GPUs", dict(engines=4, asynchronous=True), "off-policy by a step"),
    ("8-bit weights in rollouts", dict(eight_bit=True), "another sampler; int8 on an A100"),
)
EXACT = dict(prompt_once=True, speculate=True, train_in_tail=True, nvlink_share=1e9, tensor_ms=0.0)
STACKS = (
    ("oat_zero_7b_fast", {}),
    ("+ 10 % carried over", dict(carry=0.1)),
    ("+ 30 % carried over", dict(carry=0.3)),
    ("+ everything exact", EXACT),
    ("+ everything exact, 10 % carried over", EXACT | dict(carry=0.1)),
    ("+ everything exact, 30 % carried over", EXACT | dict(carry=0.3)),
    (
        "+ everything exact, log-probs recomputed",
        EXACT | dict(forwards=recomputed(Setup.minibatches)),
    ),
)
"""Exact are prompts once, speculation, no second gather, gradients in the tail, one bulk sync."""
EAGER_HALF, EAGER_TWICE = dict(eager_hidden=50, eager_mlp=5), dict(eager_hidden=200, eager_mlp=20)
SENSITIVITIES = (  # name, low end, high end
    ("mean length 500 / 1200", dict(mean=500), dict(mean=1200)),
    ("sigma 0.5 / 1.0", dict(sigma=0.5), dict(sigma=1.0)),
    ("truncated 0 / 10 %", dict(cap_share=0.0), dict(cap_share=0.10)),
    ("groups kept 35 / 80 %", dict(keep=0.35), dict(keep=0.80)),
    ("training share of GEMM rate 0.95 / 0.6", dict(train_share=0.95), dict(train_share=0.6)),
    ("decode share of copy rate 1 / 0.7", dict(decode_share=1.0), dict(decode_share=0.7)),
    ("all-reduce 15 / 60 us", {}, dict(tp_us=60.0)),
    ("engine overhead 1 / 6 ms", dict(engine_ms=1.0), dict(engine_ms=6.0)),
    ("eager bytes half / double", EAGER_HALF, EAGER_TWICE),
    ("Python per response 0.2 / 1.5 ms", dict(sample_ms=0.2), dict(sample_ms=1.5)),
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
    """The setup and the machine with other fields. UserError for a name that neither has."""
    setup_fields, rate_fields = set(vars(s)), set(vars(m.rates))
    if unknown := set(changes) - setup_fields - rate_fields:
        raise UserError(f"{sorted(unknown)}: fields neither of Setup nor of Rates")
    s = replace(s, **{k: v for k, v in changes.items() if k in setup_fields})
    rates = replace(m.rates, **{k: v for k, v in changes.items() if k in rate_fields})
    return fitting(s, m), replace(m, rates=rates)


@dataclass(frozen=True)
class Simulation:
    """How steps are simulated: where, how many, with the lengths of a run or with drawn ones
    (None)."""

    machine: Machine
    draws: int
    lengths: np.ndarray | None = None

    def __call__(self, s: Setup, changes: dict | None = None) -> Result:
        s, machine = changed(s, self.machine, changes or {})
        return simulate(s, machine, self.draws, file=self.lengths)


def ladder(run: Simulation) -> dict[str, Result]:
    s, rungs = recipe("oat_zero_7b"), {}
    for name, changes in RUNGS:
        rungs[name] = run(s, changes)
        s = rungs[name].setup
    return rungs


def floors(ours: Setup, run: Simulation) -> dict[str, Result]:
    """The same steps if every rate were the data sheet's, and if nothing but bytes and FLOPs took
    time."""
    run = replace(run, machine=PERFECT_MACHINE)
    best = replace(ours, checkpointing="none", microbatch=4096, prompt_once=True)
    return {"roofline": run(best), "roofline, half a step carried": run(best, dict(carry=0.5))}


# ---- published step times, predicted with the same constants

# The constants are the same for all rows. oat's row is the least independent. What is assumed of
# gloo and of equal counts in lockstep comes from asking what could take its 27 hours.
OAT = replace(recipe("oat_zero_7b"), **NAIVE)
FOREIGN = dict(drop=False, fused_head=False, overlap_grading=False, eval_every=0, save_every=0)
RECOMPUTE = FOREIGN | dict(forwards=2)
ONE_PASS = dict(group=1, minibatches=1, prompt=0, sigma=0.0, cap_share=0.0, forwards=0) | FOREIGN
SIMPLE_RL = Setup(
    **dict(gpu="H100", gpus=16, nodes=2, tp=2, microbatch=8192),
    **dict(prompts=1024, minibatches=4, cap=8192, prompt=150, mean=650, cap_share=0.01),
    **RECOMPUTE,
)
VERL = Setup(
    **dict(gpu="H20", gpus=32, nodes=2, tp=4, sp=4, slots=1024, microbatch=45056),
    **dict(prompts=512, group=16, minibatches=16, cap=20480),
    **dict(prompt=200, mean=1800, sigma=1.0, cap_share=0.01),
    **FOREIGN,
)
VERL_128 = replace(VERL, gpus=128, nodes=8, cap=28672)
NEMO = Setup(
    **dict(model="Llama-3.1-8B", gpu="H100", gpus=16, nodes=2, microbatch=4096),
    **dict(prompts=64, group=32, minibatches=4, cap=3900, prompt=130, mean=1060),
    **RECOMPUTE,
)
NEMO_5 = replace(NEMO, mean=1100)
NEMO_OFF = replace(NEMO_5, engines=8, asynchronous=True, eight_bit=True)
OPEN_R1 = Setup(
    **dict(engines=1, calls=16, batching="padded", microbatch=8, prompts=112, minibatches=1),
    **dict(cap=1024, prompt=150, mean=828, sigma=0.6, cap_share=0.4),
    **FOREIGN,
)
TITAN = Setup(
    **dict(model="Llama-3.1-8B", gpu="H100-2.4", checkpointing="selective"),
    **dict(prompts=16, cap=8192, mean=8192),
    **ONE_PASS,
)
PRIME = Setup(
    **dict(model="Qwen3-4B", gpu="H100", prompts=16, cap=16384, mean=16384, fused_blocks=True),
    **ONE_PASS | dict(fused_head=True),
)
PRIME_SMALL = replace(PRIME, model="Qwen3-0.6B", gpus=1, prompts=2)
WHOLE_STEPS = {  # name: seconds, setup, the guessed field that matters most, its ends
    "oat Dr. GRPO 7B, 8 x A100": (PUBLISHED_HOURS * 3600 / 500, OAT, "mean", 600, 1000),
    "SimpleRL-Zoo 7B, 16 x H100": (540, SIMPLE_RL, "mean", 500, 900),
    "verl DAPO 7B, 32 x H20": (749, VERL, "mean", 1200, 2600),
    "verl DAPO 7B, 128 x H20": (356, VERL_128, "mean", 1200, 2600),
    "NeMo-RL Llama-3.1-8B, 16 x H100": (97.7, NEMO, "sigma", 0.5, 1.0),
    "NeMo-RL v0.5, the same": (92.8, NEMO_5, "sigma", 0.5, 1.0),
    "NeMo-RL v0.5, one step off, 8 bits": (53.0, NEMO_OFF, "engines", 6, 10),
    "open-r1 7B, 7 + 1 x A100": (281, OPEN_R1, "cap_share", 0.2, 0.6),
}
TRAINING_ALONE = {
    "torchtitan Llama-3.1-8B, 8 x H100": (16384 / 5762, TITAN, "mean"),
    "the same, compiled": (16384 / 6667, replace(TITAN, fused_blocks=True), "mean"),
    "prime-rl Qwen3-4B, 8 x H100, 16k": (4.69, PRIME, "mean", 7625),
    "prime-rl Qwen3-0.6B, 1 x H100, 16k": (1.99, PRIME_SMALL, "mean", 11850),
}
SOURCES = """\
arXiv 2503.20783: 27 h; 500 steps: guess in sail-sg/understand-r1-zero issue 19
    500 steps, lengths, gloo rate
hkust-nlp/simpleRL-reason README: about 100 steps in 15 h, said of 7B and 14B together
    that 7B took as long as 14B, lengths, micro-batch
verl docs/advance/one_step_off.md
    lengths; batch and TP as in its script for 128
verl docs/advance/fully_async.md
    lengths, TP
NeMo-RL docs/about/performance-summary.md v0.4 (mean 1,060) and grpo-llama3.1-8b-instruct-2n8g.yaml
    spread of the lengths, two log-prob passes; PP 2 ignored
NeMo-RL docs/about/performance-summary.md v0.5 (mean about 1,100)
    as above
the same
    as above, how many GPUs sample; 8-bit training is not simulated
huggingface/open-r1 issue 161 (mean 828; rewards are multiples of 1/896)
    16 rounds of 7 prompts x 8, cap 1024
torchtitan benchmarks/llama3_h100_202412_torchtitan.md
    nothing
the same
    nothing
prime-rl benchmarks/baselines, 2026-01-15, step_time
    tokens (its throughput says 0.47 of these)
the same
    tokens (its throughput says 0.72 of these)
"""
"""Of every row in turn: the source, and what is guessed."""
VERL_PHASES = {"rollout": 321, "old": 88, "train": 286}
"""Seconds of verl's 749 on 32 GPUs."""


def validate(run: Simulation) -> tuple[list[dict], dict]:
    """Predicted against published, and the realism factor, which only whole steps count for.
    `left_out` is what a whole step's row gets with the factor of the other rows, over what is
    published."""
    lines = [line.strip() for line in SOURCES.splitlines()]
    published, rows = (WHOLE_STEPS | TRAINING_ALONE).items(), []
    cases = zip(published, lines[::2], lines[1::2], strict=True)
    for (name, (seconds, s, field, *ends)), source, guessed in cases:
        whole = name in WHOLE_STEPS
        results = [run(s), *(run(s, {field: end}) for end in ends)]
        predicted = [r.seconds if whole else r.phases["train"] for r in results]
        row = dict(name=name, published=seconds, predicted=predicted[0], whole=whole)
        row |= dict(low=min(predicted), high=max(predicted), ratio=seconds / predicted[0])
        rows.append(row | dict(source=source, guessed=guessed, phases=results[0].phases))
    whole = [row for row in rows if row["whole"]]
    for row in whole:
        others = [other["ratio"] for other in whole if other is not row]
        row["left_out"] = geometric_mean(others) / row["ratio"]
    return rows, realism([row["ratio"] for row in whole])


def realism(ratios: list[float]) -> dict:
    """Geometric mean of published over predicted, and one geometric standard deviation to each
    side."""
    factor, deviation = geometric_mean(ratios), math.exp(stdev(map(math.log, ratios)))
    low, high = factor / deviation, factor * deviation
    return {"factor": factor, "low": low, "high": high, "rows": len(ratios)}


# ---- input: a run's lengths, a GPU's measurements


def read_lengths(path: Path) -> np.ndarray:
    """Response lengths in tokens, from eval.py's responses.jsonl."""
    if not path.is_file():
        raise UserError(f"--lengths {path} does not exist; eval.py writes OUT/responses.jsonl")
    lengths = [row.get("tokens", 0) for row in read_jsonl(path)]
    if min(lengths, default=0) < 1:
        raise UserError(f"--lengths {path}: every response needs `tokens`, 1 or more")
    return np.array(lengths)


def measured(folder: Path) -> tuple[Machine, list[str]]:
    """The machine with the constants that FOLDER/gpu.json (bench/gpu.py) measured, and what became
    of each.

    {"device": name as CUDA reports it, "parts": {
        "ceilings": {"copy_gb_per_s": .., "gemm_tflops": ..},
        "step": [{"model", "checkpointing", "microbatch", "length", "mfu"}, ..],
        "rollout": [{"model", "sequences", "prompt", "length", "tokens_per_s"}, ..],
        "sync": [{"model", "seconds"}, ..]}}

    A step has microbatch // length sequences a pass. The responses of a rollout have one length. A
    sync runs on one GPU. Every part may be missing. Models are those of bench/shapes.py."""
    path = folder / "gpu.json"
    if not path.is_file():
        way_out = "run `make gpu` on a GPU first, or leave the option out"
        raise UserError(f"--measured {folder} holds no gpu.json; {way_out}")
    contents = json.loads(path.read_text())
    name, parts, notes = device_key(str(contents["device"])), contents["parts"], []
    m = Machine(gpus=dict(GPUS))
    for key, target in (("copy_gb_per_s", "copy"), ("gemm_tflops", "gemm")):
        if value := parts.get("ceilings", {}).get(key):
            before = getattr(m.gpus[name], target)
            notes.append(f"measured: ceilings.{key}: {name} {target} {before:g} -> {value:g}")
            source = f"data sheet; reached: measured, {path.name}"
            m.gpus[name] = replace(m.gpus[name], **{target: float(value)}, source=source)
    for part, (rates, _) in FITS.items():
        if rows := parts.get(part):
            try:
                before, m = m, calibrate(m, name, part, rows)
            except UserError as error:
                notes.append(f"measured, not used: {part}: {error}")
                continue
            values = [(n, getattr(before.rates, n), getattr(m.rates, n)) for n in rates]
            changes = ", ".join(f"{n} {old:g} -> {new:.3g}" for n, old, new in values)
            notes.append(f"measured: {part}, {len(rows)} rows: {changes}")
    if contents.get("rehearsal"):
        notes.append("a rehearsal on a CPU: these constants are no GPU's")
    return m, notes


def calibrate(m: Machine, gpu: str, part: str, rows: list[dict]) -> Machine:
    """The machine with the part's rates scaled so that they are off by a factor of 1. UserError if
    nothing makes it so, because other constants take too much of the time or too little."""
    rates, ratio = FITS[part]
    for _ in range(100):
        off = geometric_mean(ratio(m, gpu, row) for row in rows)
        if abs(off - 1) < 0.01:
            return m
        scale = min(2.0, max(0.5, off))
        scaled = {name: getattr(m.rates, name) * scale for name in rates}
        m = replace(m, rates=replace(m.rates, **scaled))
    names = " and ".join(rates)
    raise UserError(f"no {names} gives what was measured: another constant is off")


def step_ratio(m: Machine, gpu: str, row: dict) -> float:
    s = Setup(model=row["model"], gpu=gpu, gpus=1, prompt=0, checkpointing=row["checkpointing"])
    responses = [row["length"]] * max(1, row["microbatch"] // row["length"])
    speed = shape(s.model).flops(0, responses) / pass_seconds(s, m, responses, True)
    return row["mfu"] / (speed / (m.gpus[gpu].tflops * 1e12))


def rollout_ratio(m: Machine, gpu: str, row: dict) -> float:
    """What is not bandwidth is overhead."""
    s, sequences = Setup(model=row["model"], gpu=gpu, gpus=1), row["sequences"]
    queue = [Queued(row["length"], row["prompt"])] * sequences
    seconds = drain(queue, sequences, decode_cost(s, m))[0]
    return sequences * row["length"] / row["tokens_per_s"] / seconds


def sync_ratio(m: Machine, gpu: str, row: dict) -> float:
    lm = shape(row["model"])
    copying = 4 * lm.parameters / m.gpus[gpu].copy / 1e9
    return max(1e-3, row["seconds"] - copying) / (lm.tensors * m.rates.tensor_ms / 1e3)


FITS = {  # part of gpu.json: the rates that it fits, and what these seem to be off by, given a row
    "step": (("train_share",), step_ratio),
    "rollout": (("engine_ms", "engine_us"), rollout_ratio),
    "sync": (("tensor_ms",), sync_ratio),
}


def device_key(device: str) -> str:
    """The key in GPUS of a device's name as CUDA reports it."""
    if "A100" in device:
        return "A100-40" if "40GB" in device else "A100-80"
    for key in ("H100", "H200", "H20"):
        if key in device:
            return key
    way_out = "GPUS in bench/experiments/simulator.py has no data sheet: add it there"
    raise UserError(f"gpu.json was measured on {device!r}, of which {way_out}")


# ---- the report


def summary(r: Result) -> dict:
    """A result as it stands in the JSON."""
    values = {key: getattr(r, key) for key in ("seconds", "hours", "spread", "tail", "busiest")}
    setup = {"microbatch": r.setup.microbatch, "checkpointing": r.setup.checkpointing}
    return values | {"phases": r.phases} | setup


def named(results: dict[str, Result]) -> list[dict]:
    return [{"name": name} | summary(result) for name, result in results.items()]


def measure(run: Simulation) -> dict:
    """Everything that the report shows, as it stands in the JSON."""
    rows, real = validate(Simulation(run.machine, max(2, run.draws // 3)))
    rungs = ladder(run)
    naive, *_, ours = rungs.values()
    rungs["oat_zero_7b as shipped"] = run(recipe("oat_zero_7b"))
    rungs |= floors(ours.setup, run)
    prices = {name: price for name, _, price in NEXT}
    following = {name: run(ours.setup, changes) for name, changes, _ in NEXT}
    stacks = {name: run(ours.setup, changes) for name, changes in STACKS}
    ordered = sorted(named(following), key=lambda row: row["seconds"])
    sensitivities = []
    for name, *ends in SENSITIVITIES:
        hours = [run(ours.setup, changes).hours for changes in ends]
        sensitivities.append({"name": name, "hours": hours})
    machines = [measure_machine(run, *machine) for machine in MACHINES]
    engines = [measure_engines(run, *pair) for pair in product(RECIPE_MODELS, ("A100-80", "H100"))]
    return {
        "validation": rows,
        "realism": real,
        "anchor": PUBLISHED_HOURS / naive.hours,
        "ladder": named(rungs),
        "next": [{"price": prices[row["name"]]} | row for row in ordered],
        "stacks": named(stacks),
        "sensitivities": sensitivities,
        "machines": machines,
        "gpus_per_engine": engines,
    }


def measure_engines(run: Simulation, name: str, gpu: str) -> dict:
    """Seconds of a step by the GPUs of an engine. Each has as many sequences in all cases."""
    s, seconds = recipe(name, gpu=gpu), {}
    for tp in (1, 2, 4):
        seconds[str(tp)] = run(s, dict(tp=tp, slots=s.slots // s.tp * tp)).seconds
    return {"name": f"{name}, 8 x {gpu}", "seconds": seconds}


def measure_machine(run: Simulation, name: str, gpu: str, count: int, nodes: int) -> dict:
    s = recipe(name, gpu=gpu, gpus=count, nodes=nodes)
    fast = run(s, FAST)
    return {
        "name": f"{name}, {count} x {gpu}",
        "shipped": summary(run(s)),
        "fast": summary(fast),
        "sleeps": ledger(fast.setup, run.machine).sleep,
    }


def hours(row: dict, real: dict) -> str:
    """Raw hours, and hours with the realism factor (one deviation)."""
    scaled, low, high = (row["hours"] * real[key] for key in ("factor", "low", "high"))
    return f"{row['hours']:.1f} raw, {scaled:.1f} ({low:.1f}-{high:.1f})"


def text(result: dict) -> str:
    """The whole report in Markdown."""
    base = result["stacks"][0]["hours"]
    sections = {
        "Published and predicted, seconds per step (last four: training alone)": validation_text,
        "The 7B recipe on 8 x A100-80GB, seconds per step by phase; hours of 500": ladder_text,
        "Next features, each alone on top of oat_zero_7b_fast": next_text,
        "The features on top of each other": stacks_text,
        f"Sensitivities of oat_zero_7b_fast, raw hours ({base:.1f} as assumed)": ends_text,
        "Other machines: as shipped; fast, in what fits": machines_text,
        "GPUs of an engine (--tp), seconds per step as shipped": engines_text,
    }
    return "\n\n".join(f"## {title}\n\n{body(result)}" for title, body in sections.items())


def validation_text(result: dict) -> str:
    rows, real = result["validation"], result["realism"]
    heads = ["", "published", "predicted", "guesses at their ends"]
    heads += ["published / predicted", "left out", "guessed"]
    lines = []
    for r in rows:
        ends, ratio = f"{r['low']:.1f} to {r['high']:.1f}", f"{r['ratio']:.2f}"
        others = f"{r['left_out']:.2f}" if r["whole"] else ""
        published = [float(r["published"]), r["predicted"], ends, ratio, others]
        lines.append([r["name"], *published, r["guessed"]])
    verl = next(r for r in rows if r["name"].startswith("verl"))["phases"]
    phases = ", ".join(f"{p} {seconds / verl[p]:.2f}" for p, seconds in VERL_PHASES.items())
    whole = [r for r in rows if r["whole"]]
    bounded = [r["ratio"] for r in whole if not r["name"].startswith("SimpleRL")]
    return markdown(heads, lines) + (
        f"\n\nrealism factor (published / predicted, geometric mean of {real['rows']} whole steps):"
        f" {real['factor']:.2f}, one deviation {real['low']:.2f} to {real['high']:.2f};"
        f" {realism(bounded)['factor']:.2f} without SimpleRL-Zoo, whose 15 h are a bound."
        " left out: predicted x the factor of the other rows / published."
        f" verl's 32 GPUs by phase: {phases}."
    )


def ladder_text(result: dict) -> str:
    rows, real, anchor = (result[key] for key in ("ladder", "realism", "anchor"))
    naive, ours, shipped = rows[0], rows[len(RUNGS) - 1], rows[len(RUNGS)]
    lines = []
    for r in rows:
        total, speed = f"{r['seconds']:.1f} ± {r['spread']:.1f}", naive["seconds"] / r["seconds"]
        bound = r["name"].startswith("roofline")
        end = f"{r['hours']:.1f}" if bound else hours(r, real)
        lines.append([r["name"], *(r["phases"][p] for p in PHASES), total, f"{speed:.1f} x", end])
    return markdown(["", *PHASES, "s/step", "speed", "hours"], lines) + (
        f"\n\nanchored at {PUBLISHED_HOURS:g} h for the naive rung: as shipped"
        f" {shipped['hours'] * anchor:.1f} h, oat_zero_7b_fast {ours['hours'] * anchor:.1f} h."
        f" An engine runs fewer than 16 sequences in {ours['tail']:.0%} of the rollout; the busiest"
        f" rank has {naive['busiest']:.2f} x the mean tokens naive, {ours['busiest']:.2f} x ours."
    )


def next_text(result: dict) -> str:
    ours, lines = result["stacks"][0], []
    for r in result["next"]:
        saved = [ours[key] - r[key] for key in ("seconds", "hours")]
        lines.append([r["name"], *saved, r["price"]])
    return markdown(["", "s/step saved", "hours saved, raw", "price"], lines)


def stacks_text(result: dict) -> str:
    real, anchor, rows = result["realism"], result["anchor"], []
    for r in result["stacks"]:
        rows.append([r["name"], r["seconds"], hours(r, real), r["hours"] * anchor])
    return markdown(["", "s/step", "hours", "anchored at 27 h"], rows)


def ends_text(result: dict) -> str:
    base, rows = result["stacks"][0]["hours"], []
    for r in result["sensitivities"]:
        rows.append([r["name"], *(f"{h:.1f} ({h - base:+.1f})" for h in r["hours"])])
    return markdown(["", "first", "second"], rows)


def machines_text(result: dict) -> str:
    rows, real = result["machines"], result["realism"]
    heads = ["", "shipped, s/step", "hours", "fast, s/step", "hours", "micro-batch", "vLLM"]
    lines = []
    for row in rows:
        shipped, fast = (
            [row[key]["seconds"], hours(row[key], real)] for key in ("shipped", "fast")
        )
        state = "sleeps" if row["sleeps"] else "stays"
        lines.append([row["name"], *shipped, *fast, row["fast"]["microbatch"], state])
    return markdown(heads, lines)


def engines_text(result: dict) -> str:
    rows = [[row["name"], *row["seconds"].values()] for row in result["gpus_per_engine"]]
    return markdown(["", *result["gpus_per_engine"][0]["seconds"]], rows)


def draw(result: dict, path: Path) -> None:
    """Left: the ladder. Right: published against predicted."""
    figure, (bars, dots) = new_figure(1, 2, (15, 5), width_ratios=(2, 1))
    rows, factor = result["ladder"], result["realism"]["factor"]
    ends = stacked_bars(bars, {row["name"]: row["phases"] for row in rows}, PHASES)
    for y, (row, end) in enumerate(zip(rows, ends, strict=True)):
        bound, realistic = row["name"].startswith("roofline"), row["hours"] * factor
        label = "" if bound else f"  (x {factor:.2f}: {realistic:.1f} h)"
        bars.text(end, y, f" {row['hours']:.1f} h{label}", va="center", fontsize=8)
    title = "predicted: 7B, 8 x A100-80GB, hours of 500 steps"
    bars.set(xlabel="s per step", xlim=(0, 1.25 * max(ends)), title=title)
    bars.legend(fontsize=7, ncol=2, loc="center right")
    for row in result["validation"]:
        error = [[row["predicted"] - row["low"]], [row["high"] - row["predicted"]]]
        style = dict(fmt="o" if row["whole"] else "s", ms=5, capsize=2, label=row["name"])
        dots.errorbar(row["predicted"], row["published"], xerr=error, **style)
    dots.axline((1, 1), (2, 2), color="k", lw=0.8)
    dots.axline((1, factor), (2, 2 * factor), color="k", ls="--", lw=0.8)
    dots.set(xscale="log", yscale="log", xlabel="predicted, s per step", ylabel="published")
    dots.set_title("dashed: realism factor")
    dots.legend(fontsize=6)
    save_figure(figure, path)


def constants(m: Machine) -> str:
    """Every constant with its unit and source, then the GPUs, in Markdown."""
    rates = []
    for owner in (m.rates, Setup()):
        for f in (f for f in fields(owner) if f.metadata):
            value = getattr(owner, f.name)
            source = f.metadata["source"] if value == f.default else "measured: gpu.json"
            rates.append([f.name, f"{value:g}", f.metadata["unit"], source])
    gpus = [[name, *vars(gpu).values()] for name, gpu in m.gpus.items()]
    heads = ["GPU", "TFLOP/s", "GB/s", "GiB", "NVLink GB/s", "GEMM reached", "copy reached"]
    tables = (["constant", "value", "unit", "source"], rates), ([*heads, "source"], gpus)
    return "\n\n".join(markdown(*table) for table in tables)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--constants", action="store_true", help="print every constant and stop")
    add("--measured", type=Path, help="folder with gpu.json (default: bench/results, if there)")
    add("--lengths", type=Path, help="response lengths of a run")
    add("--draws", type=int, default=DRAWS, help=f"simulated steps of a setup ({DRAWS})")
    add("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    folder = args.measured or (RESULTS if (RESULTS / "gpu.json").is_file() else None)
    m, notes = measured(folder) if folder else (Machine(), [])
    if not any(note.startswith("measured:") for note in notes):
        notes.insert(0, UNMEASURED)
    if args.constants:
        print(*notes, "", constants(m), sep="\n")
        return
    lengths = read_lengths(args.lengths) if args.lengths else None
    result = {
        "where": provenance(),
        "notes": notes,
        "draws": args.draws,
        "seed": 0,
        "lengths": str(args.lengths or "lognormal"),
        "rates": asdict(m.rates),
        "data": {f.name: f.default for f in fields(Setup) if f.metadata},
    }
    result |= measure(Simulation(m, args.draws, lengths))
    draw(result, args.out / "budget.png")
    print("# The 27-hour budget", "", *notes, "", text(result), sep="\n")
    print(f"\n{time.perf_counter() - started:.0f} s\n")
    print(write_json(args.out / "budget.json", result))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
