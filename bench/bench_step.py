"""What is each throughput feature worth? One optimizer step and one whole RL step by phase,
features on and off.

    python -m bench.bench_step                                    # CPU: the tiny recipe's model, a wider one, whole RL steps
    python -m bench.bench_step --device cuda --shape 1.5b         # a GPU: made-up weights and rollouts, nothing downloaded
    python -m bench.bench_step --device cuda --shape 7b --layers 8 --seconds 540
    python -m bench.bench_step --rehearse                         # what a GPU would run, on a toy shape, in a minute

The training phase of a step (pack, old log-probs, every optimizer step) runs through train.py's own
functions on the same rollouts, with everything on and with one feature at a time off. Variants take
turns in one process. Before one is timed, its gradient norms must be those of "everything on" (to
1e-3 in float32, 3e-2 in bfloat16); the learning rate is 0, so that the weights stay. On a CPU whole
steps of train.py follow, for the phases outside training.

Time is that of CUDA events, or of the wall clock on a CPU. Peak memory is the CUDA allocator's, all
in all; on a CPU what one step allocates beyond what was there. tok/s counts trained tokens, prompts
included; MFU has no recomputation and no padding in its numerator. A variant that runs out of
memory is a row that says so, and so is one that --seconds did not reach. The JSON is rewritten
after every variant; the last line printed is that JSON.
"""

import argparse
import gc
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist, median
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

import drgrpo.model
import train
from bench.harness import ROOT, markdown, peak_memory, provenance, write_json
from drgrpo import data, distributed, pack
from drgrpo.advantage import group_advantage
from drgrpo.config import CHOICES, RECIPES, Config
from drgrpo.engine_torch import TorchEngine
from drgrpo.grade import Grader
from drgrpo.model import (
    ATTENTION,
    Objective,
    Policy,
    load_policy,
    make_policy,
    recompute_activations,
    resolve_attention,
)
from drgrpo.rollout import rollout, tokenize
from drgrpo.run.flops import peak_flops, training_flops
from drgrpo.run.log import read_jsonl
from drgrpo.run.memory import GIB, USABLE, make_ledger
from drgrpo.templates import get_template
from drgrpo.tiny.tokenizer import byte_tokenizer
from drgrpo.tiny.warmup import Warmup, build_tiny_model, cached_tiny_model
from drgrpo.types import Completion, Problem, Rollout, Sampling, UserError

CPU = torch.device("cpu")
WIDE = Warmup(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=768,
)

SHAPES = {  # the config.json of each model on the hub
    "0.6b": dict(
        model_type="qwen3",
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "1.5b": dict(
        model_type="qwen2",
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "3b": dict(
        model_type="llama",
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=128_256,
        tie_word_embeddings=True,
    ),
    "7b": dict(
        model_type="qwen2",
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18_944,
        vocab_size=152_064,
        tie_word_embeddings=False,
    ),
    "toy": dict(
        model_type="qwen3",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=512,
        tie_word_embeddings=True,
    ),
}

PROMPT, SIGMA, MEDIAN, CUT, NO_ADVANTAGE = 120, 0.75, 0.195, 0.02, 0.45
"""Made-up rollouts, a model of a 7B run: tokens of a prompt; response lengths are lognormal, their
median a share of the budget (at 3000 tokens the mean is 790), and a share more hits the budget;
share of responses whose whole group has one reward."""

PUBLISHED = {
    "tokens_per_s": 12_327,
    "mfu": 0.1148,
    "step_s": 1.92,
    "what": "prime-rl on one H100 80GB, 2026-01-20",
    "source": "https://github.com/PrimeIntellect-ai/prime-rl, commit aa1bec0, benchmarks/baselines/"
    "benchmark-1xh100-Qwen--Qwen3-0.6B-rl-full-1gpu-Recompute-flash_attention_3-16384-cp1-ep1.json",
}
"""Qwen3-0.6B, two micro-batches of 16384 tokens a step, every block recomputed; mfu by its own
count of FLOPs."""

PHASES = ("pack", "old log-probs", "forward", "head + loss", "backward", "optimizer")
STEP_PHASES = ("rollout", "grade", "pack", "old", "train", "sync", "save")
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
OUT_OF_MEMORY, NOT_REACHED = "out of memory", "not reached"


# ---- features, and what stands in for them when they are off. A variant is what it changes: fields
# of the config, and `head` and `rows`


def features(config: Config, sweep: bool) -> dict[str, dict]:
    """Everything on, then one feature at a time off; `sweep`: activation checkpointing by tokens of
    a micro-batch too."""
    levels = [c for c in CHOICES["checkpointing"] if c != config.checkpointing]
    full = config.tokens_per_microbatch
    return {
        "everything on": {},
        "zero-advantage responses kept": {"drop_zero_advantage": False},
        "padded rows": {"rows": padded_rows},
        "one response per micro-batch": {"tokens_per_microbatch": 1},
        "equal counts, not balanced": {"rows": equal_counts},
        "LM head not fused with the loss": {"head": whole_logits},
        "old log-probs recomputed": {"old_logprob": "recompute"},
        **{f"checkpointing {level}": {"checkpointing": level} for level in levels},
        **{
            f"checkpointing {level}, {tokens} tokens": {
                "checkpointing": level,
                "tokens_per_microbatch": tokens,
            }
            for level in CHOICES["checkpointing"]
            for tokens in (full // 4, full // 2)
            if sweep
        },
    }


def whole_logits(
    hidden_ND,
    weight_VD,
    target_N,
    advantage_N,
    *,
    old_logprob,
    clip_low,
    clip_high,
    temperature,
    scale,
    **_,
):
    """The LM head as trainers write it: all logits at once in the compute type, log-probs in
    float32, autograd. Without the KL penalty and the sampler's weights, which no variant has."""
    logits_NV = (hidden_ND @ weight_VD.T).float() / temperature
    logprob_N = -F.cross_entropy(logits_NV, target_N, reduction="none")
    log_ratio_N = logprob_N - (logprob_N.detach() if old_logprob is None else old_logprob)
    ratio_N = log_ratio_N.exp()
    free_N, clipped_N = (
        ratio_N * advantage_N,
        ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N,
    )
    stats = {"logprob": logprob_N, "log_ratio": log_ratio_N, "clipped": free_N > clipped_N}
    return -scale * torch.minimum(free_N, clipped_N).sum(), {
        name: stat.detach() for name, stat in stats.items()
    }


def equal_counts(lengths: dict[int, int], world: int, budget: int) -> list[list[list[int]]]:
    """`pack.microbatches` without balance: in the order of arrival, as many responses to each
    process and each micro-batch, in as few micro-batches as stay within the budget."""
    shares = [part.tolist() for part in np.array_split(np.array([*lengths], dtype=int), world)]
    for count in range(1, 1 + max(1, *map(len, shares))):
        plan = [
            [part.tolist() for part in np.array_split(np.array(share, dtype=int), count)]
            for share in shares
        ]
        if all(sum(lengths[i] for i in part) <= budget for parts in plan for part in parts):
            break
    return plan


def padded_rows(lengths: dict[int, int], world: int, budget: int) -> list[list[list[int]]]:
    """`pack.microbatches` for padded rows, of one process: in the order of arrival, as many as rows
    x longest <= budget."""
    assert world == 1
    batches = [[]]
    for i in lengths:
        row = [*batches[-1], i]
        if len(row) * max(lengths[j] for j in row) <= budget or not batches[-1]:
            batches[-1] = row
        else:
            batches.append([i])
    return [batches]


@contextmanager
def padded_model(lm) -> Iterator[None]:
    """The model runs its packed sequences [1, T] as rows [S, L], padded on the right to the
    longest, with an attention mask and PyTorch's SDPA, as transformers does by itself."""
    body, own = lm.base_model.forward, lm.config._attn_implementation

    def forward(input_ids, cu_seq_lens_q, max_length_q, **_):
        length_S = cu_seq_lens_q.diff()
        mask_SL = torch.arange(max_length_q, device=length_S.device) < length_S[:, None]
        token_SL = input_ids.new_zeros(mask_SL.shape).masked_scatter(mask_SL, input_ids[0])
        hidden_SLD = body(
            input_ids=token_SL, attention_mask=mask_SL, use_cache=False
        ).last_hidden_state
        return BaseModelOutput(last_hidden_state=hidden_SLD[mask_SL][None])

    lm.config._attn_implementation = "sdpa"
    try:
        with patch.object(lm.base_model, "forward", forward):
            yield
    finally:
        lm.config._attn_implementation = own


@contextmanager
def switched(policy: Policy, config: Config, changes: dict) -> Iterator[None]:
    """The trainer with these features off."""
    policy.lm.gradient_checkpointing_disable()
    recompute_activations(policy.lm, config.checkpointing)
    with ExitStack() as stack:
        if "head" in changes:
            stack.enter_context(patch.object(drgrpo.model, "linear_drgrpo_loss", changes["head"]))
        if "rows" in changes:
            stack.enter_context(patch.object(pack, "microbatches", changes["rows"]))
        if changes.get("rows") is padded_rows:
            stack.enter_context(padded_model(policy.lm))
        yield


# ---- the training phase of a step, by phase


class Clock:
    """Marks on the device's own timeline: what lies between two of them belongs to the phase that
    the later one names."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        self.mark("start")

    def mark(self, phase: str) -> None:
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((phase, moment))

    def seconds(self) -> dict[str, float]:
        phases = dict.fromkeys(PHASES, 0.0)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (_, before), (phase, moment) in zip(self.marks, self.marks[1:], strict=False):
            cuda = self.device.type == "cuda"
            phases[phase] += before.elapsed_time(moment) / 1e3 if cuda else moment - before
        return phases

    @contextmanager
    def watching(self, policy: Policy) -> Iterator[None]:
        """Marks the end of every forward pass, of every head with its loss, and of every backward
        pass."""

        def marking(function, phase):
            def run(*args, **kwargs):
                result = function(*args, **kwargs)
                self.mark(phase)
                return result

            return run

        ends = (
            (policy.lm.base_model, "forward", "forward"),
            (drgrpo.model, "linear_drgrpo_loss", "head + loss"),
            (torch.Tensor, "backward", "backward"),
        )
        with ExitStack() as stack:
            for owner, name, phase in ends:
                stack.enter_context(patch.object(owner, name, marking(getattr(owner, name), phase)))
            yield


class Trainer:
    """A policy, its optimizer and the rollouts of one step. `make_rollouts` gets the policy, whose
    log-probs the sampler is to report, and returns (rollouts, advantage_PG)."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        build: Callable[[], Policy],
        make_rollouts: Callable,
    ):
        self.config, self.device, self.build = config, device, build
        self.start()
        self.rollouts, self.advantage_PG = make_rollouts(self.policy)

    def start(self) -> None:
        """Anew after running out of memory, which leaves FSDP2 in the middle of a pass."""
        self.policy = self.optimizer = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.policy = self.build()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.0, fused=True)
        for parameter in self.policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # its states belong to no variant's memory
        self.optimizer.zero_grad()

    def changed(self, changes: dict) -> Config:
        return replace(
            self.config, **{k: v for k, v in changes.items() if k in asdict(self.config)}
        )

    def step(self, changes: dict) -> tuple[list[float], dict[str, float]]:
        """(gradient norm of every optimizer step, seconds by phase)."""
        config, objective, norms = self.changed(changes), Objective(), []
        with switched(self.policy, config, changes):
            clock = Clock(self.device)
            updates = train.plan_updates(
                config, self.rollouts, self.advantage_PG, 1, 0, 1, self.device
            )
            clock.mark("pack")
            old = [
                [train.old_logprob(config, self.policy, b, objective) for b in batches]
                for batches in updates
            ]
            clock.mark("old log-probs")
            with clock.watching(self.policy):
                for batches, logprobs in zip(updates, old, strict=True):
                    work = [
                        (batch, old_N, None) for batch, old_N in zip(batches, logprobs, strict=True)
                    ]
                    norms.append(
                        train.train_minibatch(
                            config,
                            self.policy,
                            self.optimizer,
                            work,
                            objective,
                            lr=0.0,
                            check_parity=False,
                        )["grad_norm"]
                    )
                    clock.mark("optimizer")
            return norms, clock.seconds()

    def trained(self, changes: dict) -> list[tuple[int, int]]:
        """(prompt, response) tokens of the responses that are trained on."""
        drops = self.changed(changes).drops
        pairs = zip(self.rollouts, self.advantage_PG.flatten().tolist(), strict=True)
        return [
            (len(r.problem.prompt_ids), r.length)
            for r, advantage in pairs
            if advantage or not drops
        ]

    def facts(self) -> dict:
        return {
            "parameters": self.policy.lm.num_parameters(),
            "dtype": self.config.dtype,
            "responses": len(self.rollouts),
            "optimizer_steps": self.config.minibatches,
            "tokens_per_microbatch": self.config.tokens_per_microbatch,
            "checkpointing": self.config.checkpointing,
            "response_tokens": sum(r.length for r in self.rollouts),
            "zero_advantage": (self.advantage_PG == 0).float().mean().item(),
        }


class Budget:
    """Seconds that may be spent. Something new may start while what is left exceeds the longest so
    far."""

    def __init__(self, seconds: float):
        self.end, self.longest = time.perf_counter() + seconds, 0.0

    def allows(self) -> bool:
        return self.end - time.perf_counter() > self.longest

    @contextmanager
    def spending(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.longest = max(self.longest, time.perf_counter() - start)


def measure(
    trainer: Trainer, variants: dict[str, dict], repeats: int, budget: Budget, publish: Callable
) -> None:
    """Every variant in turns A B C A B C; the first one is the reference. `publish` gets all rows
    after each."""
    rows = {name: {"variant": name, "skipped": NOT_REACHED, "turns": []} for name in variants}
    reference = next(iter(rows.values()))
    for _ in range(repeats):
        for name, changes in variants.items():
            if rows[name]["skipped"] == OUT_OF_MEMORY or not budget.allows():
                continue
            with budget.spending():
                try:
                    visit(trainer, changes, rows[name], reference)
                except torch.OutOfMemoryError:
                    rows[name]["skipped"] = OUT_OF_MEMORY
                if (
                    rows[name]["skipped"] == OUT_OF_MEMORY
                ):  # here, where the traceback does not hold the tensors any more
                    trainer.start()
            publish([summary(trainer, variants[n], row) for n, row in rows.items()])
            if reference["skipped"] == OUT_OF_MEMORY:
                raise UserError(
                    f"{OUT_OF_MEMORY} with everything on: choose fewer --layers or --responses"
                )


def visit(trainer: Trainer, changes: dict, row: dict, reference: dict) -> None:
    """One timed turn, after a first one that warms up, counts memory and must agree with the
    reference."""
    if "grad_norms" not in row:
        norms: list[float] = []
        row["peak_bytes"] = peak(lambda: norms.extend(trainer.step(changes)[0]), trainer.device)
        row["grad_norms"], limit = norms, TOLERANCE[trainer.config.dtype]
        if not all(
            abs(a - b) <= limit * b for a, b in zip(norms, reference["grad_norms"], strict=True)
        ):
            sys.exit(
                f"not timing a wrong variant: {row['variant']!r} has gradient norms {norms}, {reference['variant']!r} has "
                f"{reference['grad_norms']}"
            )
    row["turns"].append(trainer.step(changes)[1])
    row["skipped"] = None


def peak(run: Callable, device: torch.device) -> int:
    """Bytes: all that the CUDA allocator held at its worst moment; on a CPU what the call added."""
    if device.type != "cuda":
        return peak_memory(run, "cpu")
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def summary(trainer: Trainer, changes: dict, row: dict) -> dict:
    """Medians over the turns, and what follows from them."""
    if row["skipped"]:
        return {"variant": row["variant"], "skipped": row["skipped"]}
    totals, lengths = [sum(turn.values()) for turn in row["turns"]], trainer.trained(changes)
    seconds, limit = median(totals), peak_flops(trainer.device)
    speed = training_flops(trainer.policy.lm, lengths) / seconds
    return {
        "variant": row["variant"],
        "turns": len(totals),
        "seconds": {"median": seconds, "low": min(totals), "high": max(totals)},
        "phases": {phase: median(turn[phase] for turn in row["turns"]) for phase in PHASES},
        "tokens_per_s": sum(map(sum, lengths)) / seconds,
        "peak_bytes": row["peak_bytes"],
        "tflops": speed / 1e12,
        "mfu": speed / limit if limit else None,
        "grad_norms": row["grad_norms"],
    }


# ---- made-up models and rollouts, at the sizes of real ones


def lm_config(shape: str, layers: int) -> PretrainedConfig:
    sizes = SHAPES[shape] | {"num_hidden_layers": layers, "max_position_embeddings": 32_768}
    return AutoConfig.for_model(**sizes)


def build_policy(shape: str, layers: int, dtype: torch.dtype, device: torch.device) -> Policy:
    """Random weights from one seed, in float32, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(
            lm_config(shape, layers),
            dtype=torch.float32,
            attn_implementation=ATTENTION[resolve_attention("auto", device, dtype)],
        )
    return make_policy(lm, dtype=dtype, device=device)


def needed_bytes(shape: str, layers: int, config: Config) -> float:
    """The memory ledger's estimate for one process that trains alone."""
    lm = lm_config(shape, layers)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(lm).num_parameters()
    ledger = make_ledger(
        lm,
        parameters,
        shards=1,
        bytes_each=2,
        checkpointing=config.checkpointing,
        microbatch=config.tokens_per_microbatch,
        max_tokens=0,
        sequences=0,
        tp=1,
        kv_cache_gb=0.0,
        sleep="on",
        gpu_bytes=None,
    )
    return GIB * (sum(ledger.kept.values()) + sum(ledger.training.values()))


def layers_that_fit(shape: str, config: Config, free: int) -> int:
    """All of the model's layers, or as many as `free` bytes hold with their gradients, optimizer
    states and activations."""
    for layers in range(SHAPES[shape]["num_hidden_layers"], 0, -1):
        if needed_bytes(shape, layers, config) <= USABLE * free:
            return layers
    raise UserError(
        f"--shape {shape}: not one layer fits {free / GIB:.1f} GiB, of which {needed_bytes(shape, 1, config) / GIB:.1f} are "
        "needed beside its vocabulary; choose a smaller --shape"
    )


def lengths_like_a_run(count: int, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Response lengths in tokens, [count]: quantiles and not draws, so that few are as typical as
    many."""
    quantile_B = (np.arange(count) + 0.5) / count
    normal_B = np.array([NormalDist().inv_cdf(q) for q in quantile_B])
    length_B = (
        rng.permutation(np.exp(math.log(MEDIAN * budget) + SIGMA * normal_B))
        .clip(1, budget)
        .astype(int)
    )
    length_B[rng.permutation(count)[: round(CUT * count)]] = budget
    return length_B


def made_up_rewards(prompts: int, group: int, rng: np.random.Generator) -> Tensor:
    """[P, G]: the first groups have 1, 2, ... right answers, the others, a share of `NO_ADVANTAGE`,
    all or none."""
    reward_PG = torch.zeros(prompts, group)
    for p in range(prompts):
        mixed = p < round((1 - NO_ADVANTAGE) * prompts)
        right = 1 + p % (group - 1) if mixed else group * (p % 2)
        reward_PG[p, rng.permutation(group)[:right]] = 1.0
    return reward_PG


def made_up(
    config: Config, device: torch.device, length_B, prompt: int, policy: Policy
) -> tuple[list[Rollout], Tensor]:
    """Rollouts of random tokens that the policy itself gives log-probs to, as a sampler with its
    weights would."""
    rng, vocab = np.random.default_rng(0), policy.lm.config.vocab_size
    problems = [
        Problem(p, "", "", rng.integers(vocab, size=prompt).tolist())
        for p in range(config.prompts_per_step)
    ]
    tokens = [rng.integers(vocab, size=length).tolist() for length in length_B]
    lengths = {i: prompt + len(t) for i, t in enumerate(tokens)}
    logprobs: dict[int, list[float]] = {}
    for chosen in pack.microbatches(lengths, 1, config.tokens_per_microbatch)[0]:
        parts = [
            (problems[i // config.group_size].prompt_ids, tokens[i], [0.0] * len(tokens[i]), 0.0)
            for i in chosen
        ]
        logprob_N = train.logprob(policy, pack.pack(parts, device), Objective()).tolist()
        for i in chosen:
            logprobs[i], logprob_N = logprob_N[: len(tokens[i])], logprob_N[len(tokens[i]) :]
    completions = [
        Completion(t, logprobs[i], len(t) < config.max_new_tokens) for i, t in enumerate(tokens)
    ]
    reward_PG = made_up_rewards(config.prompts_per_step, config.group_size, rng)
    rollouts = [Rollout(problems[i // config.group_size], c, "") for i, c in enumerate(completions)]
    return rollouts, group_advantage(reward_PG, config.algo)


def imbalance(config: Config, world: int = 8) -> dict[str, float]:
    """Tokens of the busiest of `world` processes over the mean, in a step of the paper's size, by
    how responses are dealt. FSDP2 makes processes wait for one another at every micro-batch, so the
    busiest of each one counts."""
    rng = np.random.default_rng(0)
    length_B = PROMPT + lengths_like_a_run(config.rollouts_per_step, config.max_new_tokens, rng)
    advantage_B = group_advantage(
        made_up_rewards(config.prompts_per_step, config.group_size, rng), config.algo
    ).flatten()
    budget, found = config.tokens_per_microbatch, {}
    for name, split, room in (
        ("balanced", pack.microbatches, budget),
        ("equal counts", equal_counts, budget),
        ("equal counts, one response per micro-batch", equal_counts, 1),
    ):
        busiest = total = 0
        for chosen in pack.minibatches(
            config.rollouts_per_step, config.minibatches, seed=0, step=1
        ):
            lengths = {i: int(length_B[i]) for i in chosen if advantage_B[i]}
            plan = split(lengths, world, room)
            tokens = np.array(
                [[sum(lengths[i] for i in part) for part in parts] for parts in plan]
            )  # [world, micro-batches]
            busiest, total = busiest + world * tokens.max(0).sum(), total + tokens.sum()
        found[name] = float(busiest / total)
    return found


# ---- what is measured where


def sample(config: Config, path: str, policy: Policy) -> tuple[list[Rollout], Tensor]:
    """Rollouts of the model at `path` with their advantages; made-up rewards where it gets nothing
    right."""
    tokenizer, template = byte_tokenizer(), get_template("arithmetic")
    problems, _ = tokenize(data.load_problems("arithmetic"), template, tokenizer, 64)
    engine = TorchEngine(
        path, tokenizer, dtype=torch.float32, device=CPU, batch=256, max_tokens=256
    )
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens, stop_token_ids=(tokenizer.eos_token_id,)
    )
    rollouts = rollout(
        engine, tokenizer, problems[: config.prompts_per_step], config.group_size, sampling, 0, 1
    )
    with Grader("hash") as grader:
        grades = grader([r.text for r in rollouts], [r.problem.answer for r in rollouts])
    reward_PG = torch.tensor([g.score for g in grades]).view(-1, config.group_size)
    if not reward_PG.any():  # random weights: half of the groups get one right answer in four
        reward_PG[::2, ::4] = 1.0
    return rollouts, group_advantage(reward_PG, config.algo)


def on_cpu(report: dict, args, budget: Budget, save: Callable) -> None:
    """The tiny recipe's model and a wider one, then whole steps."""
    config = RECIPES["tiny"]()
    config, cache = (
        replace(config, prompts_per_step=args.responses // config.group_size),
        ROOT / config.cache_dir,
    )
    variants = features(config, sweep=False)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(WIDE, folder)
        tiny = cached_tiny_model(Warmup(), cache, report=lambda line: None)
        for name, path, repeats in (
            ("tiny", str(tiny), 3 * args.repeats),
            ("wide", folder, args.repeats),
        ):
            build = partial(load_policy, path, dtype=torch.float32, device=CPU)
            make = partial(Trainer, config, CPU, build, partial(sample, config, path))
            run_case(report, name, make, variants, repeats, budget, save)
    report["steps"] = [{"run": run, "skipped": NOT_REACHED} for run in WHOLE_STEPS]
    for row, flags in zip(report["steps"], WHOLE_STEPS.values(), strict=True):
        if budget.allows():
            with budget.spending():
                row |= {"skipped": None} | whole_steps(flags, args.steps, cache)
        save()


def at_size(
    report: dict, args, budget: Budget, save: Callable, device: torch.device, shape: str
) -> None:
    """A made-up model of that shape on the paper's recipe: one process's share of a step."""
    config = replace(
        RECIPES["oat_zero_7b"](), prompts_per_step=args.responses // 8, old_logprob="sampler"
    )
    if args.rehearse:
        config = replace(config, minibatches=2, max_new_tokens=96, tokens_per_microbatch=512)
    whole, free = (
        SHAPES[shape]["num_hidden_layers"],
        torch.cuda.mem_get_info()[0] if device.type == "cuda" else GIB,
    )
    layers = args.layers or layers_that_fit(shape, config, free)
    build = partial(build_policy, shape, layers, torch.bfloat16, device)
    length_B = lengths_like_a_run(
        config.rollouts_per_step, config.max_new_tokens, np.random.default_rng(0)
    )
    prompt = PROMPT * config.max_new_tokens // 3000
    make = partial(
        Trainer, config, device, build, partial(made_up, config, device, length_B, prompt)
    )
    facts = {"layers": layers, "layers_of_the_model": whole}
    if layers < whole:
        needed, room = (
            f"{x / GIB:.0f} GiB" for x in (needed_bytes(shape, whole, config), USABLE * free)
        )
        facts["left_out"] = (
            f"{whole - layers} of {whole} layers (the memory ledger says {needed} for all, of {room})"
        )
    run_case(report, shape, make, features(config, sweep=True), args.repeats, budget, save, facts)
    if layers < whole and "phases" in report["cases"][shape]["rows"][0]:
        report["cases"][shape]["extrapolated"] = extrapolated(report["cases"][shape])
    if shape in ("0.6b", "toy"):
        tokens = config.tokens_per_microbatch
        config = replace(
            config, prompts_per_step=1, group_size=2, minibatches=1, max_new_tokens=tokens - 1
        )
        make = partial(
            Trainer, config, device, build, partial(made_up, config, device, [tokens - 1] * 2, 1)
        )
        run_case(
            report,
            f"{shape}, two sequences of {tokens} tokens",
            make,
            {"everything on": {}},
            args.repeats,
            budget,
            save,
            {"published": PUBLISHED} if shape == "0.6b" else {},
        )


def run_case(report, name, make_trainer, variants, repeats, budget, save, facts=None) -> None:
    """One table of the report. The trainer is made here, so that the one before it is gone."""
    case = report["cases"][name] = {
        **(facts or {}),
        "rows": [{"variant": v, "skipped": NOT_REACHED} for v in variants],
    }
    if budget.allows():
        trainer = make_trainer()
        case |= trainer.facts()
        measure(trainer, variants, repeats, budget, lambda rows: save(case.update(rows=rows)))
    save()


def extrapolated(case: dict) -> dict:
    """Seconds with all layers if the passes through the blocks grow with their number. The
    optimizer's share is left as it was, so this is a little too low."""
    first = case["rows"][0]
    blocks = first["phases"]["forward"] + first["phases"]["backward"]
    grown = blocks * (case["layers_of_the_model"] / case["layers"] - 1)
    return {
        "variant": first["variant"],
        "layers": case["layers_of_the_model"],
        "seconds": first["seconds"]["median"] + grown,
    }


WHOLE_STEPS = {
    "everything on": (),
    "the paper's way": (
        "--old-logprob",
        "recompute",
        "--drop-zero-advantage",
        "false",
        "--tokens-per-microbatch",
        "1",
    ),
    "everything on, vLLM": ("--engine", "vllm"),
}
"""Runs of train.py. The paper's way: log-probs recomputed, every response trained on, one at a
time."""


def whole_steps(flags: tuple[str, ...], steps: int, cache: Path) -> dict:
    """Medians over the steps of a short run of the tiny recipe that saves at each, without the
    first third."""
    if "vllm" in flags and importlib.util.find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--recipe",
            "tiny",
            "--out",
            f"{folder}/run",
            "--steps",
            str(steps),
            "--eval-data",
            "",
            "--save-every",
            "1",
            "--cache-dir",
            str(cache),
            *flags,
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        rows = read_jsonl(f"{folder}/run/metrics.jsonl")[steps // 3 :]
    of = lambda get: median(map(get, rows))  # noqa: E731
    totals = [row["seconds"]["total"] for row in rows]
    return {
        "turns": len(rows),
        "seconds": {"median": median(totals), "low": min(totals), "high": max(totals)},
        "phases": {
            phase: of(lambda row, phase=phase: row["seconds"][phase]) for phase in STEP_PHASES
        },
        "tokens_per_s": of(lambda row: row["tokens_per_s"]),
        "peak_bytes": GIB * of(lambda row: max(row["gb"].values())),
        "tflops": of(lambda row: row["tflops"]),
        "mfu": None,
    }


# ---- reporting


def variants_table(rows: list[dict], label: str, phases: tuple[str, ...]) -> str:
    """A table of rows with numbers, or with the reason why there are none."""
    base = next((row["seconds"]["median"] for row in rows if "seconds" in row), None)
    heads = [
        label,
        "seconds (range)",
        "times",
        "tok/s",
        "peak GB",
        "TFLOP/s (MFU)",
        *(f"{phase}, ms" for phase in phases),
    ]
    lines = []
    for r in rows:
        if r.get("skipped"):
            lines.append([r[label], r["skipped"], *["-"] * (len(heads) - 2)])
            continue
        s, mfu = r["seconds"], "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
        lines.append(
            [
                r[label],
                f"{s['median']:.3f} ({s['low']:.3f}-{s['high']:.3f})",
                f"{s['median'] / base:.2f}",
                f"{r['tokens_per_s']:,.0f}",
                f"{r['peak_bytes'] / 1e9:.3g}",
                f"{r['tflops']:.3g} ({mfu})",
                *(f"{1e3 * r['phases'][phase]:.1f}" for phase in phases),
            ]
        )
    return markdown(heads, lines)


def text(report: dict) -> str:
    """Everything, for people."""
    parts = []
    for name, case in report["cases"].items():
        parts += [f"{name}: {describe(case)}", variants_table(case["rows"], "variant", PHASES)]
        if found := case.get("extrapolated"):
            parts.append(
                f"extrapolated, not measured: {found['variant']}, {found['layers']} layers, {found['seconds']:.2f} s"
            )
        if found := case.get("published"):
            numbers = f"{found['tokens_per_s']:,} tok/s, MFU {found['mfu']:.1%}"
            parts.append(f"published: {found['what']}, {numbers} ({found['source']})")
    if "steps" in report:
        parts.append("whole steps of the tiny recipe (tok/s: sampled; peak: resident memory)")
        parts.append(variants_table(report["steps"], "run", STEP_PHASES))
    shares = ", ".join(f"{name} {ratio:.2f}" for name, ratio in report["imbalance"].items())
    return "\n\n".join([*parts, f"tokens of the busiest of 8 processes over the mean: {shares}"])


def describe(case: dict) -> str:
    if "parameters" not in case:
        return NOT_REACHED
    left_out = f"; left out: {case['left_out']}" if "left_out" in case else ""
    return (
        f"{case['parameters']:,} parameters, {case['dtype']}{left_out}; {case['responses']} responses of "
        f"{case['response_tokens']:,} tokens in {case['optimizer_steps']} optimizer steps, {case['zero_advantage']:.0%} "
        f"without advantage; {case['tokens_per_microbatch']} tokens per micro-batch, checkpointing {case['checkpointing']}"
    )


def plot(report: dict, path: Path) -> None:
    """Stacked bars, one panel per table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = [(name, "variant", PHASES, case["rows"]) for name, case in report["cases"].items()]
    if "steps" in report:
        tables.append(("whole steps, tiny recipe", "run", STEP_PHASES, report["steps"]))
    figure, axes = plt.subplots(
        len(tables),
        1,
        figsize=(9, sum(1.1 + 0.3 * len(rows) for *_, rows in tables)),
        squeeze=False,
        height_ratios=[2 + len(rows) for *_, rows in tables],
        layout="constrained",
    )
    for axis, (name, label, phases, rows) in zip(axes[:, 0], tables, strict=True):
        names, left = [row[label] for row in rows], np.zeros(len(rows))
        for phase, color in zip(phases, plt.get_cmap("tab10").colors, strict=False):
            width = np.array([row["phases"][phase] if "phases" in row else 0.0 for row in rows])
            axis.barh(names, width, left=left, color=color, label=phase)
            left += width
        for y, row in enumerate(rows):
            axis.text(
                left[y],
                y,
                " " + (row.get("skipped") or f"{row['seconds']['median']:.3f} s"),
                va="center",
                size=7,
            )
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{name}, seconds")
        axis.tick_params(labelsize=8)
        axis.legend(
            fontsize=7,
            ncols=len(phases),
            loc="lower center",
            bbox_to_anchor=(0.5, -0.05 - 2.2 / (2 + len(rows))),
        )
    figure.suptitle(
        f"one step by phase: {report['where']['device']}, torch {report['where']['torch']}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shape",
        choices=[name for name in SHAPES if name != "toy"],
        help="cuda: whose sizes (1.5b)",
    )
    parser.add_argument(
        "--layers", type=int, help="cuda: so many of its layers (default: all, or as many as fit)"
    )
    parser.add_argument(
        "--responses", type=int, help="of one step (cpu: 256; cuda: 128, an eighth of the paper's)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="turns (the tiny model: three times as many)"
    )
    parser.add_argument("--steps", type=int, default=9, help="cpu: whole steps of each run")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start nothing that would end later"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="what a GPU would run, on a CPU and a toy shape"
    )
    parser.add_argument(
        "--out", type=Path, help="folder (default: bench/results, of a rehearsal runs)"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; --rehearse runs the same on a CPU")
    if args.device == "cpu" and (args.shape or args.layers):
        parser.error("--shape and --layers are for --device cuda; a CPU runs its own two sizes")
    args.shape = args.shape or "1.5b"
    if not 1 <= (args.layers or 1) <= SHAPES[args.shape]["num_hidden_layers"]:
        parser.error(
            f"--layers {args.layers}: {args.shape} has {SHAPES[args.shape]['num_hidden_layers']}"
        )
    args.out = args.out or ROOT / ("runs" if args.rehearse else "bench/results")
    args.responses = args.responses or (
        32 if args.rehearse else 128 if args.device == "cuda" else 256
    )
    if args.responses % 8:
        parser.error(f"--responses {args.responses}: groups have 8, so choose a multiple")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    budget = Budget(args.seconds)
    torch.set_num_threads(1)  # of CPU work: what two cores share is noisier than what one has
    distributed.start()
    name = (
        "step_rehearsal"
        if args.rehearse
        else f"step_{args.shape}"
        if args.device == "cuda"
        else "step"
    )
    path = args.out / f"{name}.json"
    arguments = {k: str(v) for k, v in vars(args).items() if k != "out"}
    report = {
        "where": provenance(args.device),
        "arguments": arguments,
        "cases": {},
        "imbalance": imbalance(RECIPES["oat_zero_7b"]()),
    }
    save = lambda *_: write_json(path, report)  # noqa: E731
    try:
        if args.rehearse:
            at_size(report, args, budget, save, CPU, "toy")
        elif args.device == "cuda":
            at_size(
                report,
                args,
                budget,
                save,
                torch.device("cuda", torch.cuda.current_device()),
                args.shape,
            )
        else:
            on_cpu(report, args, budget, save)
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        distributed.stop()
    plot(report, path.with_suffix(".png"))
    print(text(report), f"wrote {path} and {path.with_suffix('.png')}", save(), sep="\n\n")


if __name__ == "__main__":
    main()
