"""Where does a step's time go, and what is each throughput feature worth?

    python -m bench.bench_step                                # CPU: the tiny recipe, a wider model
    python -m bench.bench_step --device cuda --shape 1.5b     # GPU: made-up weights and rollouts
    python -m bench.bench_step --device cuda --shape 7b --layers 8 --seconds 540
    python -m bench.bench_step --rehearse                     # what a GPU runs, on a toy shape

The training phase of a step is packing, old log-probs and every optimizer step. It runs through
train.py's own functions on the same rollouts, with everything on and with one feature at a time
off. Variants take turns in one process. Before one is timed, its gradient norms must be those of
"everything on", to 1e-3 in float32 and 3e-2 in bfloat16. The learning rate is 0, so the weights
stay. On a CPU whole steps of train.py follow, for the phases outside training.

Time is that of CUDA events, or of the wall clock on a CPU. Peak memory is all that the CUDA
allocator held. On a CPU it is what one step allocates beyond what was there. tok/s counts trained
tokens, prompts included. MFU has no recomputation and no padding in its numerator. A variant that
runs out of memory, or that --seconds did not reach, is a row that says so. The JSON is rewritten
after every variant, and it is the last line printed.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise, product
from operator import itemgetter
from pathlib import Path
from statistics import NormalDist, median
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

import drgrpo.model
import train
from bench.harness import (
    RESULTS,
    ROOT,
    command_line,
    markdown,
    new_figure,
    peak_memory,
    provenance,
    save_figure,
    stacked_bars,
    write_json,
)
from bench.shapes import SHAPES, model_config
from drgrpo import data, distributed, pack
from drgrpo.advantage import group_advantage
from drgrpo.config import RECIPES, Config
from drgrpo.engine_torch import TorchEngine
from drgrpo.grade import Grader
from drgrpo.imitation import CACHE
from drgrpo.model import (
    Objective,
    Policy,
    attention_implementation,
    load_policy,
    make_policy,
    recompute_activations,
    resolve_logits,
)
from drgrpo.rollout import Sampler, tokenize
from drgrpo.run.files import read_jsonl
from drgrpo.run.flops import peak_flops, training_flops
from drgrpo.run.memory import GIB, USABLE, kept_gib, training_gib
from drgrpo.templates import get_template
from drgrpo.tiny.tokenizer import byte_tokenizer
from drgrpo.tiny.warmup import Warmup, build_tiny_model, cached_tiny_model
from drgrpo.types import Completion, Problem, Rollout, Sampling, UserError

CPU = torch.device("cpu")
WIDE = Warmup(
    **dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4),
    **dict(num_attention_heads=4, num_key_value_heads=2),
)

PROMPT, SIGMA, MEDIAN, CUT, NO_ADVANTAGE = 120, 0.75, 0.195, 0.02, 0.45
"""Made-up rollouts, a model of a 7B run. A prompt has PROMPT tokens. Response lengths are
lognormal, with SIGMA and with a MEDIAN in shares of the budget. At 3000 tokens the mean is 790. A
share CUT more hits the budget. A share NO_ADVANTAGE is in groups with one reward."""

PUBLISHED = "prime-rl on one H100 80GB, 2026-01-20: 12,327 tok/s, MFU 11.5 % by its own count"
"""Qwen3-0.6B, two micro-batches of 16384 tokens a step, every block recomputed.
PrimeIntellect-ai/prime-rl, commit aa1bec0, benchmarks/baselines."""
PHASES = ("pack", "old log-probs", "forward", "head + loss", "backward", "optimizer")
STEP_PHASES = ("rollout", "grade", "pack", "old", "train", "sync", "save")
LEVELS = ("none", "selective", "full")  # of activation checkpointing
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
OUT_OF_MEMORY, NOT_REACHED = "out of memory", "not reached"


# ---- features, and what stands in for them when they are off
#
# A variant is what it changes: fields of the config, and `head` and `rows`.


def features(config: Config, sweep: bool) -> dict[str, dict]:
    """Everything on, then one feature at a time off. `sweep` adds activation checkpointing by
    tokens of a micro-batch."""
    variants = {
        "everything on": {},
        "zero-advantage responses kept": {"drop_zero_advantage": False},
        "padded rows": {"rows": padded_rows},
        "one response per micro-batch": {"tokens_per_microbatch": 1},
        "equal counts, not balanced": {"rows": equal_counts},
        "LM head not fused with the loss": {"head": whole_logits},
        "old log-probs recomputed": {"old_logprob": "recompute"},
    }
    full = config.tokens_per_microbatch
    for level in LEVELS:
        if level != config.checkpointing:
            variants[f"checkpointing {level}"] = {"checkpointing": level}
    for level, tokens in product(LEVELS, (full // 4, full // 2)) if sweep else ():
        changes = {"checkpointing": level, "tokens_per_microbatch": tokens}
        variants[f"checkpointing {level}, {tokens} tokens"] = changes
    return variants


def whole_logits(
    hidden_ND, weight_VD, target_N, advantage_N, *, old_logprob, clip_low, clip_high, scale, **how
):
    """The LM head as trainers write it: all logits at once in the compute type, log-probs in
    float32, autograd. It has no KL penalty and no sampler's weights, as no variant has."""
    logits_NV = (hidden_ND @ weight_VD.T).float() / how["temperature"]
    logprob_N = -F.cross_entropy(logits_NV, target_N, reduction="none")
    log_ratio_N = logprob_N - (logprob_N.detach() if old_logprob is None else old_logprob)
    ratio_N = log_ratio_N.exp()
    free_N = ratio_N * advantage_N
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N
    stats = {"logprob": logprob_N, "log_ratio": log_ratio_N, "clipped": free_N > clipped_N}
    loss = -scale * torch.minimum(free_N, clipped_N).sum()
    return loss, {name: stat.detach() for name, stat in stats.items()}


def even_parts(items: list[int], count: int) -> list[list[int]]:
    """`count` parts of equal length, to one, in the order of the items."""
    return [part.tolist() for part in np.array_split(np.array(items, dtype=int), count)]


def load(lengths: dict[int, int], part: Sequence[int]) -> int:
    return sum(lengths[i] for i in part)


def equal_counts(lengths: dict[int, int], world: int, budget: int) -> list[list[list[int]]]:
    """`pack.microbatches` without balance. In the order of arrival, every process and every
    micro-batch gets as many responses, in as few micro-batches as stay within the budget."""
    shares = even_parts([*lengths], world)
    for count in range(1, 1 + max(1, *map(len, shares))):
        plan = [even_parts(share, count) for share in shares]
        if max(load(lengths, part) for parts in plan for part in parts) <= budget:
            break
    return plan


def padded_rows(lengths: dict[int, int], world: int, budget: int) -> list[list[list[int]]]:
    """`pack.microbatches` for padded rows, of one process. In the order of arrival, a micro-batch
    gets as many as rows x longest <= budget."""
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
        output = body(input_ids=token_SL, attention_mask=mask_SL, use_cache=False)
        return BaseModelOutput(last_hidden_state=output.last_hidden_state[mask_SL][None])

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
    """Marks on the device's own timeline. What lies between two of them belongs to the phase that
    the later one names."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []
        self.mark("start")

    def mark(self, phase: str) -> None:
        moment = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            moment.record()
        self.marks.append((phase, moment))

    def seconds(self) -> dict[str, float]:
        phases = dict.fromkeys(PHASES, 0.0)
        if self.cuda:
            torch.cuda.synchronize()
        for (_, before), (phase, moment) in pairwise(self.marks):
            phases[phase] += before.elapsed_time(moment) / 1e3 if self.cuda else moment - before
        return phases

    @contextmanager
    def watching(self, policy: Policy) -> Iterator[None]:
        """Marks the end of every forward pass, of every head with its loss, and of every backward
        pass."""

        def marking(function: Callable, phase: str) -> Callable:
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


@dataclass
class Trainer:
    """A policy, its optimizer and the rollouts of one step. `make_rollouts` gets the policy, whose
    log-probs the sampler is to report, and returns (rollouts, advantage_PG)."""

    config: Config
    device: torch.device
    build: Callable[[], Policy]
    make_rollouts: Callable[[Policy], tuple[list[Rollout], Tensor]]

    def __post_init__(self):
        self.start()
        self.rollouts, self.advantage_PG = self.make_rollouts(self.policy)

    def start(self) -> None:
        """Builds the policy, anew after running out of memory, which leaves FSDP2 in the middle of
        a pass."""
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
        known = asdict(self.config)
        return replace(self.config, **{k: v for k, v in changes.items() if k in known})

    def step(self, changes: dict) -> tuple[list[float], dict[str, float]]:
        """(gradient norm of every optimizer step, seconds by phase)."""
        config, norms = self.changed(changes), []
        with switched(self.policy, config, changes):
            clock = Clock(self.device)
            plan = train.plan_updates(config, self.rollouts, self.advantage_PG, 1, self.device)
            clock.mark("pack")
            train.add_logprobs(config, self.policy, None, plan)
            clock.mark("old log-probs")
            with clock.watching(self.policy):
                how = config, self.policy, self.optimizer
                for batches in plan:
                    norms.append(train.train_minibatch(*how, batches, 0.0).grad_norm)
                    clock.mark("optimizer")
            return norms, clock.seconds()

    def trained(self, changes: dict) -> list[tuple[int, int]]:
        """(prompt, response) tokens of the responses that are trained on."""
        drops = self.changed(changes).drops_zero_advantage
        pairs = zip(self.rollouts, self.advantage_PG.flatten().tolist(), strict=True)
        kept = [r for r, advantage in pairs if advantage or not drops]
        return [(len(r.problem.prompt_ids), r.length) for r in kept]

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
    """Seconds that may be spent. Something new may start while the rest exceeds the longest so
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
    """Every variant in turns A B C A B C. The first one is the reference. `publish` gets all rows
    after each."""
    rows = {name: {"variant": name, "skipped": NOT_REACHED, "turns": []} for name in variants}
    reference = next(iter(rows.values()))
    for _, (name, changes) in product(range(repeats), variants.items()):
        row = rows[name]
        if row["skipped"] == OUT_OF_MEMORY or not budget.allows():
            continue
        with budget.spending():
            row["skipped"] = OUT_OF_MEMORY  # until the turn has ended
            with suppress(torch.OutOfMemoryError):
                visit(trainer, changes, row, reference)
            if row["skipped"] == OUT_OF_MEMORY:
                trainer.start()
        publish([summary(trainer, variants[key], value) for key, value in rows.items()])
        if reference["skipped"] == OUT_OF_MEMORY:
            message = "with everything on: choose fewer --layers or --responses"
            raise UserError(f"{OUT_OF_MEMORY} {message}")


def visit(trainer: Trainer, changes: dict, row: dict, reference: dict) -> None:
    """One timed turn. A first one warms up, counts memory and must agree with the reference."""
    if "grad_norms" not in row:
        norms: list[float] = []
        row["peak_bytes"] = peak(lambda: norms.extend(trainer.step(changes)[0]), trainer.device)
        row["grad_norms"] = norms
        expected, limit = reference["grad_norms"], TOLERANCE[trainer.config.dtype]
        if any(abs(a - b) > limit * b for a, b in zip(norms, expected, strict=True)):
            norms = f"gradient norms {norms}, {reference['variant']!r} has {expected}"
            sys.exit(f"not timing a wrong variant: {row['variant']!r} has {norms}")
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
    lengths, times = trainer.trained(changes), over_turns(row["turns"], PHASES)
    seconds, limit = times["seconds"]["median"], peak_flops(trainer.device)
    speed = training_flops(trainer.policy.lm, lengths) / seconds
    return {
        **{key: row[key] for key in ("variant", "peak_bytes", "grad_norms")},
        **times,
        "tokens_per_s": sum(map(sum, lengths)) / seconds,
        "tflops": speed / 1e12,
        "mfu": speed / limit if limit else None,
    }


def over_turns(turns: list[dict], phases: tuple[str, ...]) -> dict:
    """Seconds of the whole and by phase. A turn without a total is the sum of its phases."""
    totals = [turn.get("total", sum(turn.values())) for turn in turns]
    return {
        "turns": len(turns),
        "seconds": {"median": median(totals), "low": min(totals), "high": max(totals)},
        "phases": {phase: median(map(itemgetter(phase), turns)) for phase in phases},
    }


# ---- made-up models and rollouts, at the sizes of real ones


def lm_config(model: str, layers: int) -> PretrainedConfig:
    return model_config(model, num_hidden_layers=layers, max_position_embeddings=32_768)


def build_policy(model: str, layers: int, dtype: torch.dtype, device: torch.device) -> Policy:
    """Random weights from one seed, in float32, made on the device."""
    torch.manual_seed(0)
    attention = attention_implementation("auto", device, dtype)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(
            lm_config(model, layers), dtype=torch.float32, attn_implementation=attention
        )
    objective = Objective(logits_dtype=resolve_logits("auto", dtype, device))
    return make_policy(lm, objective, dtype=dtype, device=device)


def needed_bytes(model: str, layers: int, config: Config) -> float:
    """The memory ledger's estimate for one process that trains alone."""
    lm = lm_config(model, layers)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(lm).num_parameters()
    kept = kept_gib(config, lm, parameters, shards=1)
    training = training_gib(config, lm, parameters, shards=1)
    return GIB * sum([*kept.values(), *training.values()])


def layers_that_fit(model: str, config: Config, free: int) -> int:
    """All of the model's layers, or as many as `free` bytes hold with their gradients, optimizer
    states and activations."""
    for layers in range(model_config(model).num_hidden_layers, 0, -1):
        if needed_bytes(model, layers, config) <= USABLE * free:
            return layers
    needed = needed_bytes(model, 1, config) / GIB
    room = f"{free / GIB:.1f} GiB, and one needs {needed:.1f} with the vocabulary"
    raise UserError(f"{model}: not one layer fits {room}; choose a smaller --shape")


def lengths_like_a_run(count: int, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Response lengths in tokens, [count]. They are quantiles and not draws, so that few are as
    typical as many."""
    quantile_B = (np.arange(count) + 0.5) / count
    normal_B = np.array([NormalDist().inv_cdf(q) for q in quantile_B])
    lognormal_B = np.exp(math.log(MEDIAN * budget) + SIGMA * normal_B)
    length_B = rng.permutation(lognormal_B).clip(1, budget).astype(int)
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
    config: Config, device: torch.device, length_B: Sequence[int], prompt: int, policy: Policy
) -> tuple[list[Rollout], Tensor]:
    """Rollouts of random tokens. The policy itself gives their log-probs, as a sampler with its
    weights would."""
    rng, vocab = np.random.default_rng(0), policy.lm.config.vocab_size
    prompts = rng.integers(vocab, size=(config.prompts_per_step, prompt)).tolist()
    problems = [Problem(p, "", "", ids) for p, ids in enumerate(prompts)]
    rollouts = []
    for i, length in enumerate(length_B):
        problem, ids = problems[i // config.group_size], rng.integers(vocab, size=length).tolist()
        part = pack.Sequence(problem.prompt_ids, ids, [0.0] * len(ids), 0.0)
        logprob_N = policy.logprob(pack.pack([part], device))
        completion = Completion(ids, logprob_N.tolist(), len(ids) < config.max_new_tokens)
        rollouts.append(Rollout(problem, completion, ""))
    reward_PG = made_up_rewards(config.prompts_per_step, config.group_size, rng)
    return rollouts, group_advantage(reward_PG, config.algo)


DEALS = {  # how responses are dealt
    "balanced": pack.microbatches,
    "equal counts": equal_counts,
    "equal counts, one response per micro-batch": lambda *how: equal_counts(*how[:2], 1),
}


def imbalance(config: Config, world: int = 8) -> dict[str, float]:
    """Tokens of the busiest of `world` processes over the mean, in a step of the paper's size, by
    how responses are dealt. FSDP2 makes processes wait for one another at every micro-batch, so the
    busiest of each one counts."""
    rng = np.random.default_rng(0)
    length_B = PROMPT + lengths_like_a_run(config.rollouts_per_step, config.max_new_tokens, rng)
    reward_PG = made_up_rewards(config.prompts_per_step, config.group_size, rng)
    advantage_B = group_advantage(reward_PG, config.algo).flatten()
    shares = {}
    for name, split in DEALS.items():
        busiest = total = 0
        for chosen in pack.minibatches(len(length_B), config.minibatches, seed=0, step=1):
            lengths = {i: int(length_B[i]) for i in chosen if advantage_B[i]}
            for parts in zip(*split(lengths, world, config.tokens_per_microbatch), strict=True):
                loads = [load(lengths, part) for part in parts]
                busiest += world * max(loads)
                total += sum(loads)
        shares[name] = busiest / total
    return shares


# ---- what is measured where


def sample(config: Config, path: str, policy: Policy) -> tuple[list[Rollout], Tensor]:
    """Rollouts of the model at `path` with their advantages. Rewards are made up where it gets
    nothing right."""
    tokenizer, template = byte_tokenizer(), get_template("arithmetic")
    problems, _ = tokenize(data.load_problems("arithmetic"), template, tokenizer, 64)
    problems = problems[: config.prompts_per_step]
    engine = TorchEngine(
        path, tokenizer, dtype=torch.float32, device=CPU, batch=256, max_tokens=256
    )
    stop = (tokenizer.eos_token_id,)
    sampling = Sampling(max_new_tokens=config.max_new_tokens, stop_token_ids=stop)
    sampler = Sampler(engine, tokenizer, seed=0)
    with Grader("hash") as grader:
        rollouts, grades = sampler.rollout(problems, config.group_size, sampling, 1, grader)
        rewards = [grade.result().score for grade in grades]
    reward_PG = torch.tensor(rewards).view(-1, config.group_size)
    if not reward_PG.any():  # random weights: every second group gets one answer in four
        reward_PG[::2, ::4] = 1.0
    return rollouts, group_advantage(reward_PG, config.algo)


@dataclass
class Cases:
    """The tables of a report, filled and saved while they are measured."""

    report: dict
    repeats: int
    budget: Budget
    save: Callable[[], str]

    def run(
        self, name: str, make_trainer: Callable[[], Trainer], variants: dict[str, dict], **facts
    ) -> None:
        """One table. The trainer is made here, so that the one before it is gone."""
        rows = [{"variant": v, "skipped": NOT_REACHED} for v in variants]
        case = self.report["cases"][name] = facts | {"rows": rows}

        def publish(rows: list[dict]) -> None:
            case["rows"] = rows
            self.save()

        if self.budget.allows():
            trainer = make_trainer()
            case |= trainer.facts()
            measure(trainer, variants, self.repeats, self.budget, publish)
        self.save()


def on_cpu(cases: Cases, args: argparse.Namespace) -> None:
    """The tiny recipe's model and a wider one, then whole steps."""
    config = RECIPES["tiny"]()
    config = replace(config, prompts_per_step=args.responses // config.group_size)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(WIDE, folder)
        tiny = str(cached_tiny_model(Warmup(), ROOT / CACHE, log=lambda line: None))
        for name, path, turns in (("tiny", tiny, 3), ("wide", folder, 1)):
            build = partial(load_policy, path, Objective(), dtype=torch.float32, device=CPU)
            make = partial(Trainer, config, CPU, build, partial(sample, config, path))
            cases.repeats = turns * args.repeats
            cases.run(name, make, features(config, sweep=False))
    rows = [{"run": run, "skipped": NOT_REACHED} for run in WHOLE_STEPS]
    cases.report["steps"] = rows
    for row, flags in zip(rows, WHOLE_STEPS.values(), strict=True):
        if cases.budget.allows():
            with cases.budget.spending():
                row |= {"skipped": None} | whole_steps(flags)
        cases.save()


def at_size(cases: Cases, args: argparse.Namespace, device: torch.device, shape: str) -> None:
    """A made-up model of that shape on the paper's recipe: one process's share of a step."""
    config = RECIPES["oat_zero_7b"]()
    config = replace(config, prompts_per_step=args.responses // 8, old_logprob="sampler")
    if args.rehearse:
        config = replace(config, minibatches=2, max_new_tokens=96, tokens_per_microbatch=512)
    model, tokens = SHAPES.get(shape, shape), config.tokens_per_microbatch
    every = model_config(model).num_hidden_layers
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else GIB
    layers = args.layers or layers_that_fit(model, config, free)
    build = partial(build_policy, model, layers, torch.bfloat16, device)

    def run(name: str, config: Config, length_B: Sequence[int], prompt: int, variants, **facts):
        rollouts = partial(made_up, config, device, length_B, prompt)
        cases.run(name, partial(Trainer, config, device, build, rollouts), variants, **facts)

    facts = {}
    if layers < every:
        needed, room = needed_bytes(model, every, config) / GIB, USABLE * free / GIB
        ledger = f"the memory ledger says {needed:.0f} GiB for all, of {room:.0f} GiB"
        facts["left_out"] = f"{every - layers} of {every} layers ({ledger})"
    rng = np.random.default_rng(0)
    length_B = lengths_like_a_run(config.rollouts_per_step, config.max_new_tokens, rng)
    prompt = PROMPT * config.max_new_tokens // 3000
    run(shape, config, length_B, prompt, features(config, sweep=True), **facts)
    if shape in ("0.6b", "toy"):
        two = dict(prompts_per_step=1, group_size=2, minibatches=1, max_new_tokens=tokens - 1)
        facts = {"published": PUBLISHED} if shape == "0.6b" else {}
        name, length_B = f"{shape}, two sequences of {tokens} tokens", [tokens - 1] * 2
        run(name, replace(config, **two), length_B, 1, {"everything on": {}}, **facts)


PAPERS_WAY = "--old-logprob recompute --drop-zero-advantage false --tokens-per-microbatch 1"
WHOLE_STEPS = {
    "everything on": (),
    "the paper's way": PAPERS_WAY.split(),
    "everything on, vLLM": ["--engine", "vllm"],
}
"""Runs of train.py. The paper's way recomputes log-probs and trains on every response, one at a
time."""


def whole_steps(flags: Sequence[str]) -> dict:
    """Medians over the steps of a short run of the tiny recipe that saves at each, without the
    first third."""
    if "vllm" in flags and importlib.util.find_spec("vllm") is None:
        return {"skipped": "vLLM is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        job = ["--out", f"{folder}/run", "--steps", "9", "--eval-data", "", "--save-every", "1"]
        command = [sys.executable, "train.py", "--recipe", "tiny", *job, *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            output = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
            raise RuntimeError(f"{' '.join(command)} failed:\n{output}")
        rows = read_jsonl(f"{folder}/run/metrics.jsonl")[3:]
    speed = {key: median(map(itemgetter(key), rows)) for key in ("tokens_per_s", "tflops")}
    resident = GIB * median(max(row["gb"].values()) for row in rows)
    times = over_turns([row["seconds"] for row in rows], STEP_PHASES)
    return times | speed | {"peak_bytes": resident, "mfu": None}


# ---- reporting


def variants_table(rows: list[dict], label: str, phases: tuple[str, ...]) -> str:
    """Rows with numbers, or with the reason why there are none, in Markdown."""
    base = next((row["seconds"]["median"] for row in rows if "seconds" in row), None)
    heads = [label, "seconds (range)", "times", "tok/s", "peak GB", "TFLOP/s (MFU)"]
    lines = []
    for r in rows:
        if r.get("skipped"):
            lines.append([r[label], r["skipped"], *["-"] * (len(heads) + len(phases) - 2)])
            continue
        s, mfu = r["seconds"], "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
        line = [r[label], f"{s['median']:.3f} ({s['low']:.3f}-{s['high']:.3f})"]
        line += [f"{s['median'] / base:.2f}", f"{r['tokens_per_s']:,.0f}"]
        line += [f"{r['peak_bytes'] / 1e9:.3g}", f"{r['tflops']:.3g} ({mfu})"]
        lines.append(line + [1e3 * r["phases"][phase] for phase in phases])
    return markdown([*heads, *(f"{phase}, ms" for phase in phases)], lines)


def text(report: dict) -> str:
    """The whole report in Markdown."""
    parts = []
    for name, case in report["cases"].items():
        parts += [f"{name}: {describe(case)}", variants_table(case["rows"], "variant", PHASES)]
        if "published" in case:
            parts.append(f"published: {case['published']}")
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
        f"{case['parameters']:,} parameters, {case['dtype']}{left_out}; {case['responses']} "
        f"responses of {case['response_tokens']:,} tokens in {case['optimizer_steps']} optimizer "
        f"steps, {case['zero_advantage']:.0%} without advantage; {case['tokens_per_microbatch']} "
        f"tokens per micro-batch, checkpointing {case['checkpointing']}"
    )


def draw(report: dict, path: Path) -> None:
    """Stacked bars, one panel per table."""
    tables = [(name, "variant", PHASES, case["rows"]) for name, case in report["cases"].items()]
    if "steps" in report:
        tables.append(("whole steps, tiny recipe", "run", STEP_PHASES, report["steps"]))
    sizes = [2 + len(rows) for *_, rows in tables]
    height = sum(0.5 + 0.3 * size for size in sizes)
    figure, axes = new_figure(len(tables), 1, (9, height), squeeze=False, height_ratios=sizes)
    for axis, (name, label, phases, rows) in zip(axes[:, 0], tables, strict=True):
        draw_panel(axis, label, phases, rows)
        axis.set_title(f"{name}, seconds")
    where = report["where"]
    figure.suptitle(f"one step by phase: {where['device']}, torch {where['torch']}")
    save_figure(figure, path, dpi=120)


def draw_panel(axis, label: str, phases: tuple[str, ...], rows: list[dict]) -> None:
    ends = stacked_bars(axis, {row[label]: row.get("phases", {}) for row in rows}, phases)
    for y, (row, end) in enumerate(zip(rows, ends, strict=True)):
        outcome = row.get("skipped") or f"{row['seconds']['median']:.3f} s"
        axis.text(end, y, f" {outcome}", va="center", size=7)
    axis.margins(x=0.12)
    axis.tick_params(labelsize=8)
    below = (0.5, -0.05 - 2.2 / (2 + len(rows)))
    axis.legend(fontsize=7, ncols=len(phases), loc="lower center", bbox_to_anchor=below)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--shape", choices=SHAPES, help="cuda: whose sizes (1.5b)")
    add("--layers", type=int, help="cuda: so many of its layers (default: as many as fit)")
    add("--responses", type=int, help="of one step (cpu: 256; cuda: 128, the paper's eighth)")
    add("--repeats", type=int, default=3, help="turns (the tiny model: three times as many)")
    add("--seconds", type=float, default=math.inf, help="start nothing that would end later")
    add("--rehearse", action="store_true", help="what a GPU would run, on a CPU and a toy shape")
    add("--out", type=Path, help="folder (default: bench/results, of a rehearsal runs)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; --rehearse runs the same on a CPU")
    if args.device == "cpu" and (args.shape or args.layers):
        parser.error("--shape and --layers are for --device cuda; a CPU runs its own two sizes")
    args.shape = args.shape or "1.5b"
    layers = model_config(SHAPES[args.shape]).num_hidden_layers
    if not 1 <= (args.layers or 1) <= layers:
        parser.error(f"--layers {args.layers}: {args.shape} has {layers}")
    args.out = args.out or (ROOT / "runs" if args.rehearse else RESULTS)
    default = 32 if args.rehearse else 128 if args.device == "cuda" else 256
    args.responses = args.responses or default
    if args.responses % 8:
        parser.error(f"--responses {args.responses}: groups have 8, so choose a multiple")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    budget = Budget(args.seconds)
    torch.set_num_threads(1)  # of CPU work: two cores that share it are noisier than one
    distributed.start()
    on_gpu = args.device == "cuda"
    name = "step_rehearsal" if args.rehearse else f"step_{args.shape}" if on_gpu else "step"
    path = args.out / f"{name}.json"
    report = {
        "where": provenance(args.device),
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "cases": {},
        "imbalance": imbalance(RECIPES["oat_zero_7b"]()),
    }
    cases = Cases(report, args.repeats, budget, lambda: write_json(path, report))
    try:
        if args.rehearse:
            at_size(cases, args, CPU, "toy")
        elif on_gpu:
            at_size(cases, args, torch.device("cuda", torch.cuda.current_device()), args.shape)
        else:
            on_cpu(cases, args)
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        distributed.stop()
    picture = path.with_suffix(".png")
    draw(report, picture)
    print(text(report), f"wrote {path} and {picture}", cases.save(), sep="\n\n")


if __name__ == "__main__":
    main()
