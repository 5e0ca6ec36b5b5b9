"""A simulated step of the trainer: what sampling, training and the rest take on a given machine.
`bench.experiments.budget` asks it.

A `Setup` says what is run, `Rates` and `GPU` what software and hardware reach. Response lengths are
drawn, the prompts dealt to processes as train.py does it, and every engine's batch drains as
responses end. The trainer's own `drgrpo.pack` plans the micro-batches, which all processes run in
lockstep; FLOPs are `drgrpo.run.flops`, memory is `drgrpo.run.memory`.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import mean, stdev

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from bench.static_report import cost as head_cost
from drgrpo import pack
from drgrpo.config import RECIPES
from drgrpo.run.flops import training_flops
from drgrpo.run.memory import Ledger, make_ledger
from drgrpo.types import UserError

PHASES = ("rollout", "grade", "python", "old", "train", "sync", "eval", "save")
EVAL_SETS = {
    "aime24": 30,
    "amc": 83,
    "math500": 500,
    "minerva": 272,
    "olympiad_bench": 675,
}  # problems; 1,560 in all
TAIL = 16  # sequences of an engine: with fewer a rollout is in its tail


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


ASSUMED = "data sheet; gemm and copy reached are assumed"
GPUS = {
    "A100-80": GPU(312, 2039, 79.1, 300, 255, 1700, f"{ASSUMED}, as in bench/static_report.py"),
    "A100-40": GPU(312, 1555, 39.4, 300, 255, 1300, f"{ASSUMED} in the A100-80's shares"),
    "H100": GPU(989, 3350, 79.1, 450, 710, 2900, f"{ASSUMED}: 72 % (power limit) and 87 %"),
    "H100-2.4": GPU(
        989, 2400, 95.0, 450, 640, 2090, "torchtitan's benchmarks: 500 W, HBM2e; reached: assumed"
    ),
    "H200": GPU(989, 4800, 139.8, 450, 710, 4200, f"{ASSUMED} in the H100's shares"),
    "H20": GPU(
        148, 4000, 95.1, 450, 135, 3480, f"{ASSUMED}: 91 % (small chip, no power limit) and 87 %"
    ),
}


def constant(value: float, unit: str, source: str):
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Rates:
    """What software reaches on a GPU, and what the rest of a machine does."""

    decode_share: float = constant(
        0.92, "of `copy`", "assumed: GEMVs and paged attention of a CUDA graph"
    )
    prefill_share: float = constant(0.60, "of `gemm`", "assumed: chunked prefill")
    engine_ms: float = constant(
        2.0, "ms per engine step", "assumed: vLLM's scheduler and launches, in this process"
    )
    engine_us: float = constant(
        12.0, "us per sequence and engine step", "assumed: sampling and log-probs, 152k vocabulary"
    )
    tp_us: float = constant(
        15.0, "us per all-reduce", "assumed: two per layer under tensor parallelism"
    )
    train_share: float = constant(
        0.85, "of `gemm`", "assumed: FlashAttention-2 and GEMM shapes of a block below peak"
    )
    half_tokens: float = constant(
        600, "tokens", "assumed: micro-batch at which GEMMs reach half of their rate"
    )
    eager_hidden: float = constant(
        100, "bytes per token, layer, width", "counted: eager RMSNorm, RoPE, residual, one pass"
    )
    eager_mlp: float = constant(
        10, "bytes per token, layer, MLP width", "counted: eager SiLU and product, one pass"
    )
    fused_share: float = constant(
        0.4, "of the eager bytes", "assumed: the same fused (torch.compile)"
    )
    launch_ms: float = constant(
        1.0,
        "ms per layer and pass",
        "assumed: Python, hooks, launches; hidden if the GPU is slower",
    )
    naive_logits: float = constant(
        48, "bytes per logit, training", "counted: unfused fp32 head, forward and backward"
    )
    naive_logits_held: float = constant(
        6, "bytes per logit", "bench/static_report.py: memory of an unfused head"
    )
    nvlink_share: float = constant(0.80, "of NVLink", "assumed: NCCL all-gather in a node")
    inter_node: float = constant(20.0, "GB/s per GPU", "assumed: 200 Gb/s network, 80 % reached")
    adam_bytes: float = constant(
        40, "bytes per parameter", "counted: clip, fused AdamW and zero_grad in float32"
    )
    gloo: float = constant(0.8, "GB/s", "assumed: per-tensor broadcast over the loopback device")
    tensor_ms: float = constant(
        1.0, "ms per tensor", "assumed: gather and vLLM's loader, in Python"
    )
    sleep_s: float = constant(1.0, "s per step", "assumed: vLLM sleep level 2 and wake")
    naive_sleep_s: float = constant(
        3.0, "s per step", "assumed: level 1, weights to the host and back"
    )
    serial_grades: float = constant(
        173, "grades/s per process", "measured: bench/results/grade.json, one at a time, workers"
    )
    pooled_grades: float = constant(
        353, "grades/s per process", "measured: bench/results/grade.json, pool of 2"
    )
    sample_ms: float = constant(
        1.5, "ms per response of a step", "assumed: pickle, gather, pack; every process does all"
    )
    disk: float = constant(2.0, "GB/s", "assumed: shared checkpoint storage")
    spec_gain: float = constant(1.4, "x", "assumed: n-gram speculation below 16 sequences")


PERFECT = Rates(
    decode_share=1,
    prefill_share=1,
    engine_ms=0,
    engine_us=0,
    tp_us=0,
    train_share=1,
    half_tokens=0,
    eager_hidden=0,
    eager_mlp=0,
    launch_ms=0,
    nvlink_share=1,
    inter_node=50,
    adam_bytes=28,
    tensor_ms=0,
    sleep_s=0,
    serial_grades=math.inf,
    pooled_grades=math.inf,
    sample_ms=0,
    disk=math.inf,
)


@dataclass(frozen=True)
class Machine:
    """Rates and GPUs: what a measurement changes."""

    rates: Rates = Rates()
    gpus: dict[str, GPU] = field(default_factory=lambda: GPUS)


PERFECT_MACHINE = Machine(
    PERFECT, {n: replace(g, gemm=g.tflops, copy=g.bandwidth) for n, g in GPUS.items()}
)

MODELS = {  # the published config.json of each
    "Qwen2.5-7B": (Qwen2Config, (152064, 3584, 18944, 28, 28, 4), {}),
    "Qwen2.5-1.5B": (Qwen2Config, (151936, 1536, 8960, 28, 12, 2), {"tie_word_embeddings": True}),
    "Llama-3.1-8B": (LlamaConfig, (128256, 4096, 14336, 32, 32, 8), {}),
    "Qwen3-4B": (
        Qwen3Config,
        (151936, 2560, 9728, 36, 32, 8),
        {"head_dim": 128, "tie_word_embeddings": True},
    ),
    "Qwen3-0.6B": (
        Qwen3Config,
        (151936, 1024, 3072, 28, 16, 8),
        {"head_dim": 128, "tie_word_embeddings": True},
    ),
}
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Shape:
    """What the simulator needs of a model. FLOPs of one (prompt, response): linear (p + r) + square
    (p + r)^2 + head r."""

    config: object
    parameters: int
    tensors: int
    linear: float
    square: float
    head: float

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token, bfloat16."""
        c = self.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return 4 * c.num_hidden_layers * c.num_key_value_heads * head_dim

    @property
    def read(self) -> int:
        """Weights that a decode step reads: an untied input embedding is only looked up."""
        return self.parameters - (
            0
            if self.config.tie_word_embeddings
            else self.config.vocab_size * self.config.hidden_size
        )

    def flops(self, prompt: int, responses: list[int], shared: int | None = None) -> float:
        """Forward and backward; `shared`: prompt tokens in all, if not one prompt for each
        response."""
        answered, square = sum(responses), sum((prompt + n) ** 2 for n in responses)
        tokens = answered + (prompt * len(responses) if shared is None else shared)
        return self.linear * tokens + self.square * square + self.head * answered


@cache
def shape(name: str) -> Shape:
    """Built on the meta device; the three coefficients of `training_flops`, a quadratic, from three
    of its values."""
    kind, sizes, more = MODELS[name]
    config = kind(**dict(zip(SHAPE, sizes, strict=True)) | {"tie_word_embeddings": False} | more)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    one, two, response = (training_flops(lm, [pair]) for pair in ((1, 0), (2, 0), (0, 1)))
    square = (two - 2 * one) / 2
    return Shape(
        lm.config,
        lm.num_parameters(),
        len(list(lm.parameters())),
        one - square,
        square,
        response - one,
    )


# ---- what is run


@dataclass(frozen=True)
class Setup:
    """A system and its job. The defaults are train.py on the 7B recipe; `recipe` fills them from
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
    prompt: int = constant(120, "tokens of a prompt", "assumed: a MATH problem in its template")
    mean: float = constant(
        800,
        "tokens of a response",
        "assumed: truncated ones included; the paper plots no 7B length",
    )
    sigma: float = constant(0.75, "of the logarithm of the length", "assumed")
    between: float = constant(0.5, "of its variance", "assumed: lies between questions")
    cap_share: float = constant(0.02, "of responses", "assumed: truncated")
    eval_cap_share: float = constant(
        0.05, "of responses", "assumed: truncated in the evaluation, whose problems are harder"
    )
    keep: float = constant(0.55, "of groups", "assumed: have an advantage that is not zero")
    # the system
    engines: int = 0  # GPUs that only sample while the others only train; 0: all do both
    tp: int = 1  # GPUs of an engine
    sp: int = 1  # GPUs that share a sequence in training; train.py has only 1
    slots: int = 256  # sequences that an engine runs at once
    calls: int = 1  # a step's prompts are sampled in so many rounds, one after the other
    batching: str = "packed"  # "packed": balanced, token budget; "padded": equal counts, `microbatch` sequences, padded
    microbatch: int = 16384  # tokens (packed) or sequences (padded)
    forwards: int = 1  # extra forward passes: old log-probs, reference
    drop: bool = True
    fused_head: bool = True
    checkpointing: str = "full"
    sync: str = "in process"  # or "gloo"
    overlap_grading: bool = True
    one_eval: bool = True  # all evaluation sets in one call
    fused_blocks: bool = False  # --compile
    # not in train.py: what might come next
    carry: float = (
        0.0  # share of responses that a step leaves unfinished and the next one goes on with
    )
    asynchronous: bool = False  # sampling overlaps with everything else
    train_in_tail: bool = (
        False  # the first optimizer step's gradients are computed while the tail is sampled
    )
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


def recipe(name: str, **changes) -> Setup:
    """train.py's setup of a recipe."""
    c = RECIPES[name]()
    return replace(
        Setup(),
        model={"oat_zero_7b": "Qwen2.5-7B", "oat_zero_1_5b": "Qwen2.5-1.5B"}[name],
        steps=c.steps,
        prompts=c.prompts_per_step,
        group=c.group_size,
        minibatches=c.minibatches,
        cap=c.max_new_tokens,
        eval_every=c.eval_every,
        save_every=c.save_every,
        slots=c.sampler_batch,
        microbatch=c.tokens_per_microbatch,
        forwards=int(c.old_logprob == "recompute"),
        drop=c.drops,
        checkpointing=c.checkpointing,
        **changes,
    )


def ledger(s: Setup, m: Machine) -> Ledger:
    """drgrpo/run/memory.py's, an unfused head's logits taken from the GPU first. UserError if it
    does not fit."""
    lm, tokens = (
        shape(s.model),
        s.microbatch if s.batching == "packed" else s.microbatch * (s.prompt + s.cap),
    )
    logits = 0 if s.fused_head else m.rates.naive_logits_held * tokens * lm.config.vocab_size
    return make_ledger(
        lm.config,
        lm.parameters,
        shards=s.shards,
        bytes_each=2,
        checkpointing=s.checkpointing,
        microbatch=tokens,
        max_tokens=s.prompt + s.cap,
        sequences=s.slots,
        tp=s.tp,
        kv_cache_gb=0,
        sleep="auto",
        gpu_bytes=int(m.gpus[s.gpu].gib * 2**30 - logits),
    )


def fitting(s: Setup, m: Machine) -> Setup:
    """With the largest packed micro-batch, of at most the asked one, that fits. UserError if not
    even 1024 tokens do."""
    while s.batching == "packed":
        try:
            ledger(s, m)
            break
        except UserError:
            if s.microbatch <= 1024:
                raise
            s = replace(s, microbatch=s.microbatch // 2)
    return s


# ---- rollout


@dataclass(frozen=True)
class Decode:
    """Seconds of one engine step: weights are read or multiplied, whichever takes longer; then the
    cache is read."""

    weights: float
    per_sequence: float
    per_kv_token: float
    overhead: float
    overhead_per_sequence: float
    tail_gain: float = 1.0

    def span(self, sequences: int, kv: float, ticks: int) -> float:
        """Seconds of `ticks` steps, each of which adds a token to every one of `sequences` that
        start with `kv` in all."""
        reads = kv * ticks + sequences * ticks * (ticks - 1) / 2
        each = (
            max(self.weights, self.per_sequence * sequences)
            + self.overhead
            + self.overhead_per_sequence * sequences
        )
        return (ticks * each + reads * self.per_kv_token) / (
            self.tail_gain if sequences < TAIL else 1.0
        )


def decode_cost(s: Setup, m: Machine) -> Decode:
    """Of one engine of `s.tp` GPUs, which all-reduce twice a layer."""
    lm, gpu, r = shape(s.model), m.gpus[s.gpu], m.rates
    heads, layers, width = (
        getattr(lm.config, n) for n in ("num_attention_heads", "num_hidden_layers", "hidden_size")
    )
    if heads % s.tp:
        raise UserError(f"--tp {s.tp} does not divide the {heads} attention heads of {s.model}")
    bandwidth, flops = s.tp * r.decode_share * gpu.copy * 1e9, s.tp * gpu.gemm * 1e12
    reduced = (
        2 * layers * 2 * (s.tp - 1) / s.tp * 2 * width / (r.nvlink_share * gpu.nvlink * 1e9)
    )  # seconds per sequence
    return Decode(
        weights=(1 if s.eight_bit else 2) * lm.read / bandwidth,
        per_sequence=2 * lm.read / flops,
        per_kv_token=lm.kv_bytes / bandwidth,
        overhead=r.engine_ms / 1e3 + 2 * layers * r.tp_us * 1e-6 * (s.tp > 1),
        overhead_per_sequence=r.engine_us / 1e6 + reduced,
        tail_gain=r.spec_gain if s.speculate else 1.0,
    )


def drain(
    queue: list[tuple[int, int]], slots: int, cost: Decode, leave: int = 0
) -> tuple[float, float, list[tuple[int, int]]]:
    """(seconds, of these in the tail, what is left) of sampling `queue`, pairs of (tokens to come,
    context), in order, until all but `leave` have ended. Between two ends the batch is constant, so
    its steps are summed in closed form."""
    waiting, running, kv, tick, seconds, tail = deque(queue), [], 0, 0, 0.0, 0.0
    while len(waiting) + len(running) > leave:
        while waiting and len(running) < slots:
            left, context = waiting.popleft()
            heapq.heappush(running, (tick + left, context + left))
            kv += context
        end, context = heapq.heappop(running)
        n, ticks = len(running) + 1, end - tick
        span = cost.span(n, kv, ticks)
        seconds, tail, tick, kv = (
            seconds + span,
            tail + span * (n < TAIL),
            end,
            kv + n * ticks - context,
        )
    return (
        seconds,
        tail,
        [(end - tick, context - (end - tick)) for end, context in running] + list(waiting),
    )


def draw(
    s: Setup,
    rng: np.random.Generator,
    prompts: int,
    group: int,
    cap_share: float,
    file: np.ndarray | None,
) -> np.ndarray:
    """Response lengths [prompts, group]: lognormal with questions of their own length, or drawn
    from those of a run."""
    if file is not None:
        return rng.choice(file, (prompts, group))
    inner = max(
        1.0, (s.mean - s.cap_share * s.cap) / (1 - s.cap_share)
    )  # mean of those that end by themselves
    noise = math.sqrt(s.between) * rng.normal(size=(prompts, 1)) + math.sqrt(
        1 - s.between
    ) * rng.normal(size=(prompts, group))
    length = np.exp(math.log(inner) - s.sigma**2 / 2 + s.sigma * noise)
    length[rng.random((prompts, group)) < cap_share] = s.cap
    return np.clip(length, 1, s.cap).astype(int)


def sample(
    s: Setup, m: Machine, length_PG: np.ndarray, carried: list[list[tuple[int, int]]]
) -> tuple[float, float, list]:
    """(seconds, of these in the tail, carried on) of one rollout phase: the slowest engine
    counts."""
    lm, cost = shape(s.model), decode_cost(s, m)
    slots = max(1, min(s.slots, int(cache_tokens(s, m) / (s.prompt + length_PG.mean()))))
    rate = m.rates.prefill_share * m.gpus[s.gpu].gemm * 1e12 * s.tp
    seconds, tails, left = [], [], []
    for engine in range(s.samplers):
        mine = (
            spread(length_PG, s.samplers)[engine]
            if s.spread
            else length_PG[engine :: s.samplers].ravel()
        )
        prefill = (
            lm.linear / 3 * s.prompt * len(mine) / length_PG.shape[1] / rate
        )  # a group's prompt once: it is cached
        queue = (carried[engine] if carried else []) + [(int(n), s.prompt) for n in mine]
        took, tail, rest = drain(queue, slots, cost, round(s.carry * len(mine) / (1 - s.carry)))
        seconds, tails, left = [*seconds, prefill + took], [*tails, tail], [*left, rest]
    return max(seconds), max(tails), left


def spread(length_PG: np.ndarray, engines: int) -> list[np.ndarray]:
    """Every response known in advance and dealt like cards, back and forth: the best that an
    ordering could hope for."""
    ordered = np.sort(length_PG.ravel())[::-1]
    turn = np.arange(len(ordered)) % (2 * engines)
    return [
        ordered[np.minimum(turn, 2 * engines - 1 - turn) == engine] for engine in range(engines)
    ]


def cache_tokens(s: Setup, m: Machine) -> float:
    """Tokens that an engine's key-value cache holds."""
    lm, gpu = shape(s.model), m.gpus[s.gpu]
    if s.engines:  # nothing else lives there
        return (0.9 * gpu.gib * 2**30 * s.tp - 2 * lm.parameters) / lm.kv_bytes
    return ledger(s, m).kv_cache * 2**30 * s.tp / lm.kv_bytes


# ---- training


def plan(
    s: Setup, length_PG: np.ndarray, kept_P: np.ndarray, step: int
) -> list[list[list[list[int]]]]:
    """[minibatches][micro-batches][ranks] lists of response lengths, as train.py packs, or equal
    counts, padded."""
    lengths, kept = length_PG.ravel().tolist(), np.repeat(kept_P | (not s.drop), s.group)
    if s.batching == "packed":
        chosen = [
            [i for i in part if kept[i]]
            for part in pack.minibatches(len(lengths), s.minibatches, 0, step)
        ]
        tokens, budget = {i: s.prompt + n for i, n in enumerate(lengths)}, s.microbatch * s.sp
        dealt = [
            pack.microbatches({i: tokens[i] for i in part}, s.trainers, budget) for part in chosen
        ]
        return [
            [[[lengths[i] for i in bins[j]] for bins in ranks] for j in range(len(ranks[0]))]
            for ranks in dealt
        ]
    order = np.random.default_rng((1, step)).permutation(s.group * (s.prompts // s.trainers))
    mine = [length_PG[rank :: s.trainers].ravel()[order].tolist() for rank in range(s.trainers)]
    cuts = [
        range(part[0], part[-1] + 1, s.microbatch)
        for part in np.array_split(np.arange(len(order)), s.minibatches)
    ]
    return [
        [[[max(m[i : i + s.microbatch])] * len(m[i : i + s.microbatch]) for m in mine] for i in cut]
        for cut in cuts
    ]


def pass_seconds(s: Setup, m: Machine, responses: list[int], training: bool) -> float:
    """One micro-batch on one GPU, communication included: of computing, launching and FSDP2's
    traffic the slowest counts."""
    lm, gpu, r = shape(s.model), m.gpus[s.gpu], m.rates
    c, answered = lm.config, sum(responses)
    shared = s.prompt * (math.ceil(len(responses) / s.group) if s.prompt_once else len(responses))
    tokens = answered + shared
    matmuls = 3 + (s.checkpointing == "full") if training else 1
    sweeps = 3 + (s.checkpointing != "none") if training else 1
    rate = r.train_share * gpu.gemm * 1e12 / (1 + r.half_tokens / max(tokens, 1))
    multiply = matmuls * lm.flops(s.prompt, responses, shared) / 3 / rate
    eager = c.num_hidden_layers * (
        r.eager_hidden * c.hidden_size + r.eager_mlp * c.intermediate_size
    )
    moved = sweeps * tokens * eager * (r.fused_share if s.fused_blocks else 1) + head_bytes(
        s, r, answered, training
    )
    busy = (multiply + moved / (gpu.copy * 1e9)) / s.sp
    return max(
        busy, sweeps * c.num_hidden_layers * r.launch_ms / 1e3, traffic_seconds(s, m, training)
    )


def head_bytes(s: Setup, r: Rates, tokens: int, training: bool) -> float:
    """Memory traffic of the LM head beside its GEMMs. Our log-prob pass writes and reads fp32
    logits once."""
    c = shape(s.model).config
    if not s.fused_head:
        return tokens * c.vocab_size * r.naive_logits * (1 if training else 0.5)
    if not training:
        return 8 * tokens * c.vocab_size
    counted = head_cost(max(tokens, 1), c.hidden_size, c.vocab_size, 4096)
    return counted["logits_bytes_worst"] + counted["dweight_bytes"]


def traffic_seconds(s: Setup, m: Machine, training: bool) -> float:
    """FSDP2 in a node: bfloat16 weights gathered per pass, float32 gradients scattered; and reduced
    across nodes (HSDP)."""
    parameters, others = shape(s.model).parameters, (s.shards - 1) / s.shards
    node = (
        (2 * 2 + 4 if training else 2)
        * parameters
        * others
        / (m.rates.nvlink_share * m.gpus[s.gpu].nvlink * 1e9)
    )
    across = (
        2 * (s.nodes - 1) / s.nodes * 4 * parameters / s.shards / (m.rates.inter_node * 1e9)
        if training
        else 0.0
    )
    return node + across


def train_seconds(s: Setup, m: Machine, planned: list, training: bool) -> float:
    """All micro-batches of a step, in lockstep: each takes as long as on the rank that has most to
    do."""
    passes = sum(
        max(pass_seconds(s, m, rank, training) for rank in ranks)
        for part in planned
        for ranks in part
    )
    optimizer = (
        len(planned)
        * m.rates.adam_bytes
        * shape(s.model).parameters
        / s.shards
        / (m.gpus[s.gpu].copy * 1e9)
    )
    return passes + (optimizer if training else 0.0)


# ---- a step, and many


@dataclass(frozen=True)
class Result:
    setup: Setup
    phases: dict[str, float]  # mean seconds
    spread: float  # standard deviation of a step, seconds
    tail: float  # share of the rollout in which an engine runs fewer than 16 sequences
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
    grade = (
        max(1.0, answers - rollout * r.pooled_grades) / r.pooled_grades
    )  # at least the last answer's
    if not s.overlap_grading:
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
    """Seconds of one evaluation: all sets in one call, or one after the other, each with a tail of
    its own."""
    sizes = [sum(EVAL_SETS.values())] if s.one_eval else EVAL_SETS.values()
    whole = replace(s, carry=0.0)
    return sum(sample(whole, m, draw(s, rng, n, 1, s.eval_cap_share, file), [])[0] for n in sizes)


def simulate(
    s: Setup, m: Machine, draws: int = 20, seed: int = 0, file: np.ndarray | None = None
) -> Result:
    """Means over `draws` steps that follow each other, the same for every setup of one seed."""
    rows, tails, busiest, carried = [], [], [], []
    warm = 4 if s.carry else 0  # until as much is carried out of a step as into it
    for step in range(-warm, draws):
        rng = np.random.default_rng((seed, step + warm))
        length_PG = draw(s, rng, s.prompts, s.group, s.cap_share, file)
        rounds = [sample(s, m, part, carried) for part in np.array_split(length_PG, s.calls)]
        rollout, tail, carried = (
            sum(r[0] for r in rounds),
            sum(r[1] for r in rounds),
            rounds[-1][2] if s.carry else [],
        )
        if step < 0:
            continue
        planned = plan(s, length_PG, rng.random(s.prompts) < s.keep, step)
        row = {
            "rollout": rollout,
            "train": train_seconds(s, m, planned, True),
            "old": s.forwards * train_seconds(s, m, planned, False),
            **other_phases(s, m, rollout),
        }
        times = (s.steps // s.eval_every + 2) / s.steps if s.eval_every else 0.0
        row["eval"] = times * evaluation(s, m, rng, file) if times else 0.0
        if s.asynchronous:
            row["rollout"] = max(
                0.0, rollout - sum(row[p] for p in PHASES[1:] if p not in ("sync", "eval"))
            )
        elif s.train_in_tail:
            row["rollout"] -= min(tail, row["train"] / s.minibatches)
        rows.append(row)
        tails.append(tail / rollout)
        loads = [
            [s.prompt * len(rank) + sum(rank) for rank in ranks]
            for part in planned
            for ranks in part
        ]
        busiest.append(sum(map(max, loads)) / max(1e-9, sum(map(mean, loads))))
    totals = [sum(row.values()) for row in rows]
    phases = {p: mean(row[p] for row in rows) for p in PHASES}
    return Result(s, phases, stdev(totals) if draws > 1 else 0.0, mean(tails), mean(busiest))
