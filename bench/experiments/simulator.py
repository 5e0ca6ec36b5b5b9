"""A simulated step of the trainer: how long sampling, training and the rest take on a machine.

`bench.experiments.budget` runs it and shows what comes out. A `Setup` describes the job and the
system. A `Machine` says what software and hardware reach. Response lengths are drawn at random.
Prompts go to processes as in train.py. Every engine's batch drains as responses end. The trainer's
own `drgrpo.pack` plans the micro-batches, and all processes run them in lockstep. FLOPs come from
`drgrpo.run.flops`, memory from `drgrpo.run.memory`.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field, replace
from functools import cache
from operator import itemgetter
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from bench.shapes import model_config
from bench.static_report import cost as head_cost
from drgrpo import pack
from drgrpo.config import RECIPES
from drgrpo.run.flops import training_flops
from drgrpo.run.memory import Ledger, engine_processes, make_ledger
from drgrpo.types import UserError

PHASES = ("rollout", "grade", "python", "old", "train", "sync", "eval", "save")
EVAL_SETS = {"aime24": 30, "amc": 83, "math500": 500, "minerva": 272, "olympiad_bench": 675}
"""Problems of each evaluation set."""
TAIL = 16
"""An engine with fewer sequences than this is in the tail of its rollout."""

Plan = list[list[list[list[int]]]]
"""Response lengths by [optimizer step][micro-batch][rank]."""


# ---- constants


@dataclass(frozen=True)
class GPU:
    tflops: float  # dense bfloat16, data sheet
    bandwidth: float  # GB/s, data sheet
    gib: float  # as torch reports it
    nvlink: float  # GB/s one way, data sheet
    gemm: float  # TFLOP/s that large cuBLAS GEMMs reach
    copy: float  # GB/s that long copies reach
    source: str


SHEET = "data sheet; gemm and copy reached are assumed"
GPUS = {
    "A100-80": GPU(312, 2039, 79.1, 300, 255, 1700, f"{SHEET}, as in bench/static_report.py"),
    "A100-40": GPU(312, 1555, 39.4, 300, 255, 1300, f"{SHEET} in the A100-80's shares"),
    "H100": GPU(989, 3350, 79.1, 450, 710, 2900, f"{SHEET}: 72 % (power limit) and 87 %"),
    "H100-2.4": GPU(989, 2400, 95.0, 450, 640, 2090, "torchtitan: 500 W, HBM2e; reached: assumed"),
    "H200": GPU(989, 4800, 139.8, 450, 710, 4200, f"{SHEET} in the H100's shares"),
    "H20": GPU(148, 4000, 95.1, 450, 135, 3480, f"{SHEET}: 91 % (no power limit) and 87 %"),
}


def constant(value: float, unit: str, source: str):
    return field(default=value, metadata={"unit": unit, "source": source})


def assumed(value: float, unit: str, why: str):
    return constant(value, unit, f"assumed: {why}")


def counted(value: float, unit: str, what: str):
    return constant(value, unit, f"counted: {what}")


GRADES = "measured: bench/results/grade.json"
PYTHON = "measured: bench/results/python.json, on a CPU"


@dataclass(frozen=True)
class Rates:
    """What software reaches on a GPU, and what the rest of a machine does."""

    decode_share: float = assumed(0.92, "of `copy`", "GEMVs, paged attention in a CUDA graph")
    prefill_share: float = assumed(0.60, "of `gemm`", "chunked prefill")
    engine_ms: float = assumed(2.0, "ms per engine step", "vLLM's scheduler and launches")
    engine_us: float = assumed(12.0, "us per sequence and engine step", "sampling, 152k tokens")
    tp_us: float = assumed(15.0, "us per all-reduce", "two per layer under tensor parallelism")
    train_share: float = assumed(0.85, "of `gemm`", "FlashAttention-2 and a block's GEMM shapes")
    half_tokens: float = assumed(600, "tokens", "micro-batch at which GEMMs reach half their rate")
    eager_hidden: float = counted(
        100, "bytes per token, layer, width", "eager RMSNorm, RoPE, residual, one pass"
    )
    eager_mlp: float = counted(
        10, "bytes per token, layer, MLP width", "eager SiLU and product, one pass"
    )
    fused_share: float = assumed(0.4, "of the eager bytes", "the same fused (torch.compile)")
    launch_ms: float = assumed(1.0, "ms per layer and pass", "hidden if the GPU is slower")
    naive_logits: float = counted(
        48, "bytes per logit, training", "unfused fp32 head, forward and backward"
    )
    naive_logits_held: float = constant(
        6, "bytes per logit", "bench/static_report.py: memory of an unfused head"
    )
    nvlink_share: float = assumed(0.80, "of NVLink", "NCCL all-gather in a node")
    inter_node: float = assumed(20.0, "GB/s per GPU", "200 Gb/s network, 80 % reached")
    adam_bytes: float = counted(40, "bytes per parameter", "clip, fused AdamW, zero_grad, float32")
    gloo: float = assumed(0.8, "GB/s", "per-tensor broadcast over the loopback device")
    tensor_ms: float = assumed(1.0, "ms per tensor", "gather and vLLM's loader, in Python")
    sleep_s: float = assumed(1.0, "s per step", "vLLM sleep level 2 and wake")
    naive_sleep_s: float = assumed(3.0, "s per step", "level 1, weights to the host and back")
    serial_grades: float = constant(173, "grades/s per process", f"{GRADES}, one at a time")
    pooled_grades: float = constant(353, "grades/s per process", f"{GRADES}, pool of 2")
    sample_ms: float = constant(0.43, "ms per response of a step", PYTHON)
    disk: float = assumed(2.0, "GB/s", "shared checkpoint storage")
    spec_gain: float = assumed(1.4, "x", "n-gram speculation below 16 sequences")


FULL = ("decode_share", "prefill_share", "train_share", "nvlink_share")
FREE = (
    *("engine_ms", "engine_us", "tp_us", "half_tokens", "eager_hidden", "eager_mlp"),
    *("launch_ms", "tensor_ms", "sleep_s", "sample_ms"),
)
ENDLESS = ("serial_grades", "pooled_grades", "disk")
PERFECT = Rates(
    **dict.fromkeys(FULL, 1) | dict.fromkeys(FREE, 0) | dict.fromkeys(ENDLESS, math.inf),
    inter_node=50,
    adam_bytes=28,
)


@dataclass(frozen=True)
class Machine:
    """Rates and GPUs. A measurement changes both."""

    rates: Rates = Rates()
    gpus: dict[str, GPU] = field(default_factory=lambda: GPUS)


PERFECT_MACHINE = Machine(
    PERFECT, {name: replace(gpu, gemm=gpu.tflops, copy=gpu.bandwidth) for name, gpu in GPUS.items()}
)


@dataclass(frozen=True)
class Shape:
    """What the simulator needs of a model. FLOPs of one (prompt, response) are
    linear (p + r) + square (p + r)^2 + head r."""

    config: PretrainedConfig
    parameters: int
    tensors: int
    linear: float
    square: float
    head: float

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token in bfloat16."""
        c = self.config
        return 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim

    @property
    def read(self) -> int:
        """Weights that a decode step reads. An untied input embedding is only looked up."""
        c = self.config
        return self.parameters - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)

    def flops(self, prompt: int, responses: list[int], shared: int | None = None) -> float:
        """FLOPs of forward and backward. `shared` counts all prompt tokens, if responses share
        prompts."""
        answered = sum(responses)
        square = sum((prompt + n) ** 2 for n in responses)
        tokens = answered + (prompt * len(responses) if shared is None else shared)
        return self.linear * tokens + self.square * square + self.head * answered


@cache
def shape(name: str) -> Shape:
    """Built on the meta device. `training_flops` is a quadratic, and three of its values give the
    three coefficients."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model_config(name))
    one, two, response = (training_flops(lm, [pair]) for pair in ((1, 0), (2, 0), (0, 1)))
    square = (two - 2 * one) / 2
    tensors = len(list(lm.parameters()))
    return Shape(lm.config, lm.num_parameters(), tensors, one - square, square, response - one)


# ---- what is run


@dataclass(frozen=True)
class Setup:
    """A system and its job. The defaults are train.py on the 7B recipe. `recipe` fills them from
    drgrpo/config.py."""

    model: str = "Qwen2.5-7B"
    gpu: str = "A100-80"
    gpus: int = 8
    nodes: int = 1  # each holds one copy of the sharded model (--dp-replicate)
    steps: int = 500
    prompts: int = 128
    group: int = 8
    minibatches: int = 8
    cap: int = 3000
    eval_every: int = 16
    save_every: int = 50
    # the data
    prompt: int = assumed(120, "tokens of a prompt", "a MATH problem in its template")
    mean: float = assumed(800, "tokens of a response", "with truncated ones; no 7B length is known")
    sigma: float = constant(0.75, "of the logarithm of the length", "assumed")
    between: float = assumed(0.5, "of its variance", "lies between questions")
    cap_share: float = assumed(0.02, "of responses", "truncated")
    eval_cap_share: float = assumed(0.05, "of responses", "truncated in the harder evaluation")
    keep: float = assumed(0.55, "of groups", "have an advantage that is not zero")
    # the system
    engines: int = 0  # GPUs that only sample while the others only train; 0: all do both
    tp: int = 1  # GPUs of an engine
    sp: int = 1  # GPUs that share a sequence in training; train.py has only 1
    slots: int = 256  # sequences that an engine runs at once
    calls: int = 1  # a step's prompts are sampled in so many rounds, one after the other
    batching: str = "packed"  # balanced, with a token budget; "padded": equal counts, padded
    microbatch: int = 16384  # tokens (packed) or sequences (padded)
    forwards: float = 1  # extra forward passes: old log-probs, reference
    drop: bool = True
    fused_head: bool = True
    checkpointing: str = "full"
    sync: str = "in process"  # or "gloo"
    overlap_grading: bool = True
    one_eval: bool = True  # all evaluation sets in one call
    fused_blocks: bool = False  # --compile
    carry: float = 0.0  # --carry-over: share of responses that a step leaves to the next one
    carry_steps: int = 2  # --carry-steps: how often a response is left at most
    # not in train.py: what might come next
    asynchronous: bool = False  # sampling overlaps with everything else
    train_in_tail: bool = False  # the first optimizer step's gradients come from the tail
    speculate: bool = False
    eight_bit: bool = False  # weights of the rollouts
    spread: bool = False  # long and short responses are dealt evenly to engines
    prompt_once: bool = False  # a group's prompt is trained on once

    @property
    def samplers(self) -> int:
        return (self.engines or self.gpus) // self.tp

    @property
    def trainers(self) -> int:
        return (self.gpus - self.engines) // self.sp

    @property
    def shards(self) -> int:
        return max(1, self.trainers * self.sp // self.nodes)

    @property
    def responses(self) -> int:
        return self.prompts * self.group


RECIPE_MODELS = {"oat_zero_7b": "Qwen2.5-7B", "oat_zero_1_5b": "Qwen2.5-1.5B"}


def recomputed(minibatches: int) -> float:
    """Forward passes for old log-probs. The first update of a step needs none."""
    return 1 - 1 / minibatches


def recipe(name: str, **changes) -> Setup:
    """train.py's setup of a recipe."""
    c, lm = RECIPES[name](), shape(RECIPE_MODELS[name])
    tp = engine_processes(c, lm.config, lm.parameters, changes.get("gpus", Setup.gpus))
    alike = ("steps", "minibatches", "eval_every", "save_every", "checkpointing")
    job = {key: getattr(c, key) for key in alike}
    job |= dict(model=RECIPE_MODELS[name], prompts=c.prompts_per_step, group=c.group_size)
    job |= dict(cap=c.max_new_tokens, microbatch=c.tokens_per_microbatch)
    job |= dict(tp=tp, slots=c.sampler_batch * tp)
    passes = recomputed(c.minibatches) if c.old_logprob == "recompute" else 0
    job |= dict(forwards=passes, drop=c.drops_zero_advantage)
    return Setup(**job | changes)


def ledger(s: Setup, m: Machine) -> Ledger:
    """The ledger of drgrpo/run/memory.py on a GPU from which an unfused head's logits are taken
    first. UserError if it does not fit."""
    lm = shape(s.model)
    tokens = s.microbatch if s.batching == "packed" else s.microbatch * (s.prompt + s.cap)
    logits = 0 if s.fused_head else m.rates.naive_logits_held * tokens * lm.config.vocab_size
    changes = dict(checkpointing=s.checkpointing, tokens_per_microbatch=tokens, tp=s.tp)
    changes |= dict(max_new_tokens=s.cap, sampler_batch=s.slots // s.tp)
    config = replace(RECIPES["oat_zero_7b"](), **changes)
    gpu_bytes = int(m.gpus[s.gpu].gib * 2**30 - logits)
    return make_ledger(config, lm.config, lm.parameters, s.prompt, s.shards, gpu_bytes)


def fitting(s: Setup, m: Machine) -> Setup:
    """The setup with its packed micro-batch halved until it fits. UserError if not even 1024 tokens
    do."""
    if s.batching == "padded":
        return s
    try:
        ledger(s, m)
        return s
    except UserError:
        if s.microbatch <= 1024:
            raise
    return fitting(replace(s, microbatch=s.microbatch // 2), m)


# ---- rollout


@dataclass(frozen=True)
class Decode:
    """Seconds of one engine step. Weights are read or multiplied, whichever takes longer. Then the
    cache is read."""

    weights: float
    per_sequence: float
    per_kv_token: float
    overhead: float
    overhead_per_sequence: float
    tail_gain: float = 1.0

    def span(self, sequences: int, kv: float, ticks: int) -> float:
        """Seconds of `ticks` steps. Each adds a token to every one of `sequences`, which start
        with `kv` tokens in all."""
        reads = kv * ticks + sequences * ticks * (ticks - 1) / 2
        compute = max(self.weights, self.per_sequence * sequences)
        step = compute + self.overhead + self.overhead_per_sequence * sequences
        gain = self.tail_gain if sequences < TAIL else 1.0
        return (ticks * step + reads * self.per_kv_token) / gain


def decode_cost(s: Setup, m: Machine) -> Decode:
    """The cost of one engine of `s.tp` GPUs, which all-reduce twice a layer."""
    lm, gpu, r = shape(s.model), m.gpus[s.gpu], m.rates
    layers, heads = lm.config.num_hidden_layers, lm.config.num_attention_heads
    if heads % s.tp:
        raise UserError(f"--tp {s.tp} does not divide the {heads} attention heads of {s.model}")
    bandwidth = s.tp * r.decode_share * gpu.copy * 1e9
    flops = s.tp * gpu.gemm * 1e12
    reduced_bytes = 2 * layers * 2 * (s.tp - 1) / s.tp * 2 * lm.config.hidden_size
    reduce_seconds = reduced_bytes / (r.nvlink_share * gpu.nvlink * 1e9)
    return Decode(
        weights=(1 if s.eight_bit else 2) * lm.read / bandwidth,
        per_sequence=2 * lm.read / flops,
        per_kv_token=lm.kv_bytes / bandwidth,
        overhead=r.engine_ms / 1e3 + 2 * layers * r.tp_us * 1e-6 * (s.tp > 1),
        overhead_per_sequence=r.engine_us / 1e6 + reduce_seconds,
        tail_gain=r.spec_gain if s.speculate else 1.0,
    )


class Queued(NamedTuple):
    """A sequence that has not ended. carried: how often a step has left it to the next one."""

    tokens: int  # to draw
    context: int  # tokens so far
    carried: int = 0


Queue = list[Queued]


def drain(
    queue: Queue, slots: int, cost: Decode, unfinished: int = 0, most: float = math.inf
) -> tuple[float, float, Queue]:
    """Samples `queue` in order until all but `unfinished` sequences have ended, and with them all
    that were carried `most` times.

    Returns (seconds, seconds in the tail, the sequences that have not ended). The batch is constant
    between two ends, so its steps are summed in closed form."""
    waiting, running = deque(queue), []
    kv, tick, seconds, tail = 0, 0, 0.0, 0.0
    due = sum(item.carried >= most for item in queue)
    while due or len(waiting) + len(running) > unfinished:
        while waiting and len(running) < slots:
            tokens, context, carried = waiting.popleft()
            heapq.heappush(running, (tick + tokens, context + tokens, carried))
            kv += context
        end, context, carried = heapq.heappop(running)
        due -= carried >= most
        count, ticks = len(running) + 1, end - tick
        span = cost.span(count, kv, ticks)
        seconds += span
        tail += span * (count < TAIL)
        kv += count * ticks - context
        tick = end
    stopped = [Queued(end - tick, context - (end - tick), n) for end, context, n in running]
    rest = [item._replace(carried=item.carried + 1) for item in [*stopped, *waiting]]
    return seconds, tail, rest


def draw(s: Setup, rng: np.random.Generator, size: tuple[int, int], cap_share: float, file):
    """Response lengths [prompts, group]. They are lognormal, with questions of their own length, or
    drawn from those of a run in `file`."""
    if file is not None:
        return rng.choice(file, size)
    untruncated_mean = max(1.0, (s.mean - s.cap_share * s.cap) / (1 - s.cap_share))
    question_noise = math.sqrt(s.between) * rng.normal(size=(size[0], 1))
    noise = question_noise + math.sqrt(1 - s.between) * rng.normal(size=size)
    length_PG = np.exp(math.log(untruncated_mean) - s.sigma**2 / 2 + s.sigma * noise)
    length_PG[rng.random(size) < cap_share] = s.cap
    return np.clip(length_PG, 1, s.cap).astype(int)


def sample(
    s: Setup, m: Machine, length_PG: np.ndarray, carried: list[Queue]
) -> tuple[float, float, list[Queue]]:
    """One rollout phase, as long as its slowest engine: (seconds, seconds in the tail, what every
    engine carries on)."""
    cost = decode_cost(s, m)
    slots = max(1, min(s.slots, int(cache_tokens(s, m) / (s.prompt + length_PG.mean()))))
    prefill_rate = m.rates.prefill_share * m.gpus[s.gpu].gemm * 1e12 * s.tp
    flops = shape(s.model).linear / 3  # a token's
    seconds, tails, unfinished = [], [], []
    for engine, lengths in enumerate(deal(s, length_PG)):
        going_on = carried[engine] if carried else []
        queue = going_on + [Queued(int(n), s.prompt) for n in lengths]
        stop = round(s.carry * len(lengths) / (1 - s.carry))
        decode, tail, rest = drain(queue, slots, cost, stop, s.carry_steps)
        prefilled = s.prompt * len(lengths) / length_PG.shape[1]  # a group's prompt is cached
        prefilled += sum(item.context for item in going_on)  # the weights have changed since
        seconds.append(flops * prefilled / prefill_rate + decode)
        tails.append(tail)
        unfinished.append(rest)
    return max(seconds), max(tails), unfinished


def deal(s: Setup, length_PG: np.ndarray) -> list[np.ndarray]:
    """The response lengths of every engine. With `s.spread` every length is known in advance and
    dealt like cards, back and forth, which is the best that an ordering could hope for."""
    if not s.spread:
        return [length_PG[engine :: s.samplers].ravel() for engine in range(s.samplers)]
    ordered = np.sort(length_PG.ravel())[::-1]
    turn = np.arange(len(ordered)) % (2 * s.samplers)
    owner = np.minimum(turn, 2 * s.samplers - 1 - turn)
    return [ordered[owner == engine] for engine in range(s.samplers)]


def cache_tokens(s: Setup, m: Machine) -> float:
    """Tokens that an engine's key-value cache holds."""
    lm, gpu = shape(s.model), m.gpus[s.gpu]
    if s.engines:  # nothing else lives there
        return (0.9 * gpu.gib * 2**30 * s.tp - 2 * lm.parameters) / lm.kv_bytes
    return ledger(s, m).kv_cache * 2**30 * s.tp / lm.kv_bytes


# ---- training


def plan(s: Setup, length_PG: np.ndarray, kept_P: np.ndarray, step: int) -> Plan:
    """What every rank trains on: packed as train.py does it, or in equal counts, padded."""
    if s.batching == "padded":
        return plan_padded(s, length_PG, step)
    length_B, planned = length_PG.ravel(), []
    kept_B = np.repeat(kept_P | (not s.drop), s.group)
    for chosen in pack.minibatches(len(length_B), s.minibatches, 0, step):
        tokens = {i: s.prompt + int(length_B[i]) for i in chosen if kept_B[i]}
        ranks = pack.microbatches(tokens, s.trainers, s.microbatch * s.sp)
        planned.append([])
        for parts in zip(*ranks, strict=True):
            planned[-1].append([length_B[part].tolist() for part in parts])
    return planned


def plan_padded(s: Setup, length_PG: np.ndarray, step: int) -> Plan:
    """Every rank trains on its own samples, in micro-batches padded to their longest."""
    order = np.random.default_rng((1, step)).permutation(s.group * (s.prompts // s.trainers))
    ranks = [length_PG[rank :: s.trainers].ravel()[order] for rank in range(s.trainers)]
    planned = []
    for part in np.array_split(np.arange(len(order)), s.minibatches):
        planned.append([])
        for i in range(part[0], part[-1] + 1, s.microbatch):
            rows = [rank[i : i + s.microbatch] for rank in ranks]
            planned[-1].append([[int(row.max())] * len(row) for row in rows])
    return planned


def pass_seconds(s: Setup, m: Machine, responses: list[int], training: bool) -> float:
    """One micro-batch on one GPU with its communication. Computing, launching and FSDP2's traffic
    overlap, so the slowest counts."""
    lm, gpu, r = shape(s.model), m.gpus[s.gpu], m.rates
    c, answered = lm.config, sum(responses)
    prompts = math.ceil(len(responses) / s.group) if s.prompt_once else len(responses)
    tokens = answered + s.prompt * prompts
    matmuls = 3 + (s.checkpointing == "full") if training else 1
    sweeps = 3 + (s.checkpointing != "none") if training else 1
    rate = r.train_share * gpu.gemm * 1e12 / (1 + r.half_tokens / max(tokens, 1))
    multiply = matmuls * lm.flops(s.prompt, responses, s.prompt * prompts) / 3 / rate
    eager = r.eager_hidden * c.hidden_size + r.eager_mlp * c.intermediate_size
    eager *= c.num_hidden_layers * (r.fused_share if s.fused_blocks else 1)
    moved = sweeps * tokens * eager + head_bytes(s, r, answered, training)
    busy = (multiply + moved / (gpu.copy * 1e9)) / s.sp
    launches = sweeps * c.num_hidden_layers * r.launch_ms / 1e3
    return max(busy, launches, traffic_seconds(s, m, training))


def head_bytes(s: Setup, r: Rates, tokens: int, training: bool) -> float:
    """Memory traffic of the LM head beside its GEMMs. Our log-prob pass writes and reads fp32
    logits once."""
    c = shape(s.model).config
    if not s.fused_head:
        return tokens * c.vocab_size * r.naive_logits * (1 if training else 0.5)
    if not training:
        return 8 * tokens * c.vocab_size
    traffic = head_cost(max(tokens, 1), c.hidden_size, c.vocab_size, 4096)
    return traffic["logits_bytes_worst"] + traffic["dweight_bytes"]


def traffic_seconds(s: Setup, m: Machine, training: bool) -> float:
    """FSDP2 in a node gathers bfloat16 weights per pass and scatters float32 gradients. Across
    nodes (HSDP) it reduces the gradients."""
    parameters, others = shape(s.model).parameters, (s.shards - 1) / s.shards
    nvlink = m.rates.nvlink_share * m.gpus[s.gpu].nvlink * 1e9
    node = (2 * 2 + 4 if training else 2) * parameters * others / nvlink
    if not training:
        return node
    shard_bytes = 4 * parameters / s.shards
    return node + 2 * (s.nodes - 1) / s.nodes * shard_bytes / (m.rates.inter_node * 1e9)


def train_seconds(s: Setup, m: Machine, planned: Plan, training: bool) -> float:
    """All micro-batches of a step in lockstep. Each lasts as long as on the rank with most to
    do."""
    passes = 0.0
    for ranks in (ranks for part in planned for ranks in part):
        passes += max(pass_seconds(s, m, rank, training) for rank in ranks)
    if not training:
        return passes
    adam = m.rates.adam_bytes * shape(s.model).parameters / s.shards / (m.gpus[s.gpu].copy * 1e9)
    return passes + len(planned) * adam


# ---- a step, and many


@dataclass(frozen=True)
class Result:
    setup: Setup
    phases: dict[str, float]  # mean seconds
    spread: float  # standard deviation of a step, seconds
    tail: float  # share of the rollout in which an engine runs fewer than TAIL sequences
    busiest: float  # tokens of the busiest rank over the mean, averaged over micro-batches

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def hours(self) -> float:
        return self.seconds * self.setup.steps / 3600


def other_phases(s: Setup, m: Machine, rollout: float) -> dict[str, float]:
    """Phases that do not depend on the lengths drawn."""
    lm, gpu, r = shape(s.model), m.gpus[s.gpu], m.rates
    answers = s.responses / s.gpus
    if s.overlap_grading:  # at least the last answer waits
        grade = max(1.0, answers - rollout * r.pooled_grades) / r.pooled_grades
    else:
        grade = answers / r.serial_grades
    if s.sync == "gloo":
        sync = 2 * lm.parameters / (r.gloo * 1e9) + r.naive_sleep_s
    else:
        asleep = not s.engines and ledger(s, m).sleep
        wire = 2 * lm.parameters * (1 / (r.nvlink_share * gpu.nvlink) + 2 / gpu.copy) / 1e9
        sync = wire + lm.tensors * r.tensor_ms / 1e3 + r.sleep_s * asleep
    save = (12 + 2) * lm.parameters / (r.disk * 1e9) / s.save_every if s.save_every else 0.0
    return {"grade": grade, "python": s.responses * r.sample_ms / 1e3, "sync": sync, "save": save}


def evaluation(s: Setup, m: Machine, rng: np.random.Generator, file: np.ndarray | None) -> float:
    """Seconds of evaluation per step. All sets go into one call, or each has a call and a tail of
    its own."""
    if not s.eval_every:
        return 0.0
    sizes = [sum(EVAL_SETS.values())] if s.one_eval else EVAL_SETS.values()
    whole, seconds = replace(s, carry=0.0), 0.0
    for size in sizes:
        length_PG = draw(s, rng, (size, 1), s.eval_cap_share, file)
        seconds += sample(whole, m, length_PG, [])[0]
    return (s.steps // s.eval_every + 2) / s.steps * seconds


def overlapped(s: Setup, row: dict[str, float], tail: float) -> float:
    """Seconds of the rollout that other phases do not hide."""
    if s.asynchronous:
        hidden = sum(row[p] for p in PHASES[1:] if p not in ("sync", "eval"))
        return max(0.0, row["rollout"] - hidden)
    if s.train_in_tail:
        return row["rollout"] - min(tail, row["train"] / s.minibatches)
    return row["rollout"]


def imbalance(s: Setup, planned: Plan) -> float:
    """Tokens of the busiest rank over the mean, over all micro-batches."""
    busiest = average = 0.0
    for ranks in (ranks for part in planned for ranks in part):
        loads = [s.prompt * len(rank) + sum(rank) for rank in ranks]
        busiest += max(loads)
        average += mean(loads)
    return busiest / max(1e-9, average)


def simulate(
    s: Setup, m: Machine, draws: int = 20, seed: int = 0, file: np.ndarray | None = None
) -> Result:
    """Means over `draws` consecutive steps. One seed draws the same lengths for every setup."""
    rows, tails, loads, carried = [], [], [], []
    warm = 4 if s.carry else 0  # steps until as much is carried out of a step as into it
    for step in range(-warm, draws):
        rng = np.random.default_rng((seed, step + warm))
        length_PG = draw(s, rng, (s.prompts, s.group), s.cap_share, file)
        rounds = [sample(s, m, part, carried) for part in np.array_split(length_PG, s.calls)]
        seconds, tail_seconds, unfinished = zip(*rounds, strict=True)
        carried = unfinished[-1] if s.carry else []
        if step < 0:
            continue
        rollout, tail = sum(seconds), sum(tail_seconds)
        planned = plan(s, length_PG, rng.random(s.prompts) < s.keep, step)
        row = {
            "rollout": rollout,
            "train": train_seconds(s, m, planned, True),
            "old": s.forwards * train_seconds(s, m, planned, False),
            **other_phases(s, m, rollout),
            "eval": evaluation(s, m, rng, file),
        }
        row["rollout"] = overlapped(s, row, tail)
        rows.append(row)
        tails.append(tail / rollout)
        loads.append(imbalance(s, planned))
    totals = [sum(row.values()) for row in rows]
    phases = {p: mean(map(itemgetter(p), rows)) for p in PHASES}
    return Result(s, phases, stdev(totals) if draws > 1 else 0.0, mean(tails), mean(loads))
