"""What fits: a ledger of a process's GPU memory, in GiB. It decides whether vLLM stays while the
trainer works, and how large its KV cache is.

The formulas of training agree with `drgrpo.run.rehearse`, which counts the trainer's own
allocations, within 10 %. No GPU has confirmed those of vLLM."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedModel

from drgrpo.kernels.linear_drgrpo import default_chunk_tokens, sizes_on
from drgrpo.lora import ALL
from drgrpo.model import resolve_logits
from drgrpo.run.flops import head_dim
from drgrpo.types import MAX_BATCHED_TOKENS, UserError, comma_list

if TYPE_CHECKING:  # drgrpo.config runs the rehearsal, which needs this file
    from drgrpo.config import Config

GIB = 2**30
USABLE = 0.95  # of a GPU: the allocator's fragmentation takes the rest
SMALLEST_CACHE = 0.5  # GiB
SMALLEST_PART = 3e9  # bytes of weights that are worth a process of an engine
CONTEXT, NCCL = 0.6, 0.9  # GiB: CUDA and cuBLAS; the buffers of collectives
GRAPHS = 1.0  # GiB of CUDA graphs. vLLM logs 0.2 to 1.5, and keeps them when it sleeps

Sizes = dict[str, float]
"""GiB by kind."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """GiB per process.

    kept: always allocated. training: only while training. sampler: what vLLM holds, and frees if it
    sleeps while training. sampling: only while vLLM samples, or receives weights. tp: processes
    that share an engine."""

    kept: Sizes
    training: Sizes
    sampler: Sizes
    sampling: Sizes
    gpu: float | None
    tp: int
    kv_cache: float
    sleep: bool

    @property
    def peaks(self) -> Sizes:
        """the highest sum of each phase"""
        kept, sampler = sum(self.kept.values()), sum(self.sampler.values())
        return {
            "training": kept + sum(self.training.values()) + (0.0 if self.sleep else sampler),
            "sampling": kept + sampler + sum(self.sampling.values()),
        }

    @property
    def usable(self) -> float:
        """what both phases have to stay within"""
        return float("inf") if self.gpu is None else USABLE * self.gpu

    @property
    def fits(self) -> bool:
        return max(self.peaks.values()) <= self.usable + 1e-6  # a cache may fill it exactly

    def __str__(self) -> str:
        names = ("kept", "training", "sampler", "sampling")
        parts = [f"{name} {show(getattr(self, name))}" for name in names]
        habit = "sleeps" if self.sleep else "stays"
        end = "no GPU"
        if self.gpu is not None:
            peaks = ", ".join(f"{name} {size:.1f}" for name, size in self.peaks.items())
            verdict = "" if self.fits else ", which is too much"
            end = (
                f"vLLM has --tp {self.tp} and {habit} while training; peaks {peaks} of "
                f"{self.usable:.1f}{verdict}"
            )
        return f"memory ledger, GiB per process (estimates): {'; '.join([*parts, end])}"


def show(sizes: Sizes) -> str:
    """The sum, and each kind that there is in brackets."""
    kinds = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items() if size)
    return f"{sum(sizes.values()):.2f} ({kinds})"


def ledger_of(
    config: Config, lm: PreTrainedModel, longest: int, world: int, device: torch.device
) -> Ledger:
    """The ledger of a run on `world` processes, this one on `device`.

    `longest`: tokens of the longest prompt. UserError if it does not fit."""
    on_gpu = device.type == "cuda"
    gpu_bytes = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
    return make_ledger(config, lm.config, lm.num_parameters(), longest, world, gpu_bytes)


def make_ledger(
    config: Config,
    lm: PretrainedConfig,
    parameters: int,
    longest: int,
    world: int,
    gpu_bytes: int | None,
) -> Ledger:
    """The same without weights or a GPU: `lm` and `parameters` describe the model, `gpu_bytes` the
    GPU, None if there is none.

    A cache that --kv-cache-gb names is not refused."""
    ledger = draft_ledger(config, lm, parameters, longest, world, gpu_bytes)
    if not ledger.fits and not config.kv_cache_gb:
        raise UserError(refusal(config, ledger, parameters, world))
    return ledger


def draft_ledger(
    config: Config,
    lm: PretrainedConfig,
    parameters: int,
    longest: int,
    world: int,
    gpu_bytes: int | None,
    training: Sizes | None = None,
) -> Ledger:
    """The same whether it fits or not. `training`: what a rehearsal found, else the formula's."""
    if not config.tp:
        engine = engine_processes(config, lm, parameters, world) if gpu_bytes else 1
        config = replace(config, tp=engine)
    shards = world // config.dp_replicate
    kept = kept_gib(config, lm, parameters, shards)
    if config.kl_coef and not config.lora_rank:  # LoRA's reference is the frozen base
        # FSDP2 never frees what the root of a model without gradients gathers.
        kept["reference"] = kept["master weights"] + config_bytes(config) * root_size(lm) / GIB
    training = training or training_gib(config, lm, parameters, shards, gpu_bytes)
    sampler, sampling = sampler_gib(config, lm, parameters), sampling_gib(config, lm)
    wanted = wanted_cache_gib(config, lm, longest)
    if gpu_bytes is None:
        gpu, sleeps, cache = None, False, config.kv_cache_gb or 0.25
    else:
        gpu = gpu_bytes / GIB
        kept |= {"CUDA": CONTEXT} | ({"NCCL": NCCL} if world > 1 else {}) | {"CUDA graphs": GRAPHS}
        free = USABLE * gpu - sum(kept.values()) - sum(sampler.values())
        asleep, beside = sum(sampling.values()), sum(training.values())
        sleeps, cache = plan_sampling(config, wanted, free - asleep, free - max(asleep, beside))
    return Ledger(
        kept=kept,
        training=training,
        sampler=sampler | {"key-value cache": cache},
        sampling=sampling,
        gpu=gpu,
        tp=config.tp,
        kv_cache=cache,
        sleep=sleeps,
    )


# ---- training


def kept_gib(config: Config, lm: PretrainedConfig, parameters: int, shards: int) -> Sizes:
    """Weights and Adam's two moments, shared by `shards` processes. What is trained is float32, and
    what LoRA freezes has the compute type."""
    trained = trained_parameters(config, lm, parameters)
    weights = 4 * trained + config_bytes(config) * (parameters - trained)
    return {"master weights": weights / shards / GIB, "Adam": 8 * trained / shards / GIB}


def training_gib(
    config: Config, lm: PretrainedConfig, parameters: int, shards: int, gpu_bytes: int | None = None
) -> Sizes:
    """What a micro-batch adds, beside the gradients of those before it, at its highest moment.

    The moments are the LM head, the backward pass of the last block, that of the embedding, and the
    root's reduce-scatter. FSDP2's root holds the embedding, the final norm and the LM head."""
    element_size, tokens = config_bytes(config), fullest_tokens(config, lm)
    root, vocabulary = root_size(lm), lm.vocab_size * lm.hidden_size
    block = (parameters - root) / lm.num_hidden_layers
    trained = trained_parameters(config, lm, parameters)
    # LoRA trains nothing of the root.
    trained_vocabulary, trained_root = (0, 0) if config.lora_rank else (vocabulary, root)
    trained_block = (trained - trained_root) / lm.num_hidden_layers
    width = activation_widths(config, lm)
    left = tokens * lm.num_hidden_layers * width[config.checkpointing] * element_size
    # A block's input is kept beside what is recomputed from it.
    kept_width = {"none": width["none"], "selective": width["selective"], "full": 0}
    recomputed = width["none"] - kept_width[config.checkpointing]
    gradients = 4 * trained / shards
    responses = tokens * config.max_new_tokens // longest_sequence(config, lm)
    head_inputs = lm.hidden_size * (tokens * (4 + element_size) + 2 * responses * element_size)
    at_head = {
        "gathered weights": element_size * (root + block),
        "gradients": gradients,
        "activations": left + head_inputs,
        "LM head": 4 * trained_vocabulary + logits_bytes(config, lm, responses, gpu_bytes),
        "temporaries": 0.0,
    }
    in_backward = {
        # The next block arrives while this one is used.
        "gathered weights": element_size * (root + 2 * block),
        "gradients": gradients + 4 * trained_block,
        "activations": left + tokens * recomputed * element_size,
        "LM head": element_size * trained_vocabulary,
        "temporaries": tokens * (2 * lm.intermediate_size + 1.3 * lm.hidden_size) * element_size,
    }
    at_embedding = {
        "gathered weights": element_size * root,
        "gradients": gradients + 4 * trained_block,
        # A tied weight has two gradients, and autograd may add them into a third.
        "LM head": element_size * trained_vocabulary * (3 if lm.tie_word_embeddings else 2),
    }
    # Gradients and their float32 copy, then the copy and this process's share of it.
    at_root = {"gradients": gradients + max(element_size + 4, 4 + 4 / shards) * trained_root}
    moments = (at_head, in_backward, at_embedding, at_root)
    moment = max(moments, key=lambda sizes: sum(sizes.values()))
    return {name: size / GIB for name, size in moment.items()}


def activation_widths(config: Config, lm: PretrainedConfig) -> dict[str, int]:
    """Elements that a token leaves in a block for the backward pass, by checkpointing.

    A norm leaves its input in float32, what it normalizes, and its output. Attention leaves
    queries, keys, values and its output, and the MLP four products."""
    heads, keys = lm.num_attention_heads * head_dim(lm), 2 * kv_width(lm)
    outputs = heads + keys + 2 * lm.hidden_size + 2 * lm.intermediate_size
    return {
        "none": 8 * lm.hidden_size + 2 * heads + keys + 4 * lm.intermediate_size,
        # The block's input, and what `keep_matmuls` keeps. LoRA has a second product per layer.
        "selective": 3 * lm.hidden_size
        + (2 * heads + keys + 2 * lm.intermediate_size)
        + (outputs if config.lora_rank else 0),
        "full": lm.hidden_size,
    }


def logits_bytes(
    config: Config, lm: PretrainedConfig, responses: int, gpu_bytes: int | None
) -> int:
    """One chunk of the LM head's logits. Shifted logits take a copy of the LM head too."""
    cuda = torch.device("cuda")
    sizes = sizes_on(cuda, gpu_bytes)
    chunk = min(default_chunk_tokens(responses, lm.hidden_size, lm.vocab_size, sizes), responses)
    if resolve_logits(config.logits, getattr(torch, config.dtype), cuda) == "shifted":
        return config_bytes(config) * (chunk + lm.hidden_size) * lm.vocab_size
    return 4 * chunk * lm.vocab_size


# ---- sampling


def sampler_gib(config: Config, lm: PretrainedConfig, parameters: int) -> Sizes:
    """What vLLM holds beside its cache: weights, and counts of every token that it has sampled."""
    weights = config_bytes(config) * parameters / config.tp
    return {"weights": weights / GIB, "token counts": 4 * batch_logits(config, lm) / GIB}


def sampling_gib(config: Config, lm: PretrainedConfig) -> Sizes:
    """What vLLM adds while it samples, or while it receives weights if that is more.

    A batch of prompts fills the widest place of a block, the MLP. Logits of a decode step exist
    three times in float32. A weight arrives gathered, and vLLM makes its own layout of it: about
    three times the largest weight."""
    width = 4 * lm.hidden_size + 3 * lm.intermediate_size // config.tp
    step = config_bytes(config) * MAX_BATCHED_TOKENS * width + 12 * batch_logits(config, lm)
    sync = 3 * config_bytes(config) * lm.vocab_size * lm.hidden_size
    if step > sync:
        return {"activations and logits": step / GIB}
    return {"weight sync": sync / GIB}


def wanted_cache_gib(config: Config, lm: PretrainedConfig, longest: int) -> float:
    """A cache for all sequences that a sampler runs at once, each of the greatest length.

    `tp` processes share the heads. A process holds one key-value head at least."""
    tokens = config.sampler_batch * config.tp * (longest + config.max_new_tokens)
    width = max(kv_width(lm) // config.tp, head_dim(lm))
    return tokens * 2 * lm.num_hidden_layers * width * config_bytes(config) / GIB


def engine_processes(config: Config, lm: PretrainedConfig, parameters: int, world: int) -> int:
    """Processes that share a vLLM engine: 4, 2 or 1.

    Most of a rollout is spent on an engine's last few sequences, whose tokens take as long as the
    weights take to be read. Processes that share an engine read a part each, and then add up what
    they have over NVLink. `python -m bench.experiments.budget` predicts that this pays for 7 B
    parameters, with 3.8 GB a process, and not for 1.5 B, with 1.5 GB. The limit lies between. An
    engine stays on one node. A run that is only planned is one of a single node."""
    if config.engine == "torch":
        return 1
    planned = os.environ.get("WORLD_SIZE") != str(world)
    node = world if planned else math.gcd(world, int(os.environ["LOCAL_WORLD_SIZE"]))
    for tp in (4, 2):
        divides = node % tp == lm.num_attention_heads % tp == lm.num_key_value_heads % tp == 0
        if divides and config_bytes(config) * parameters / tp >= SMALLEST_PART:
            return tp
    return 1


def plan_sampling(config: Config, wanted: float, free: float, beside: float) -> tuple[bool, float]:
    """(whether vLLM sleeps while training, GiB of its KV cache).

    `free`: GiB for the cache if vLLM sleeps while training. `beside`: GiB if it stays. --sleep auto
    lets vLLM stay if at least half of the wanted cache fits beside training. The cache holds one
    sequence at least, because vLLM does not start otherwise."""
    sleeps = config.sleep == "on" or (config.sleep == "auto" and beside < wanted / 2)
    sleeps = sleeps and config.engine != "torch"  # which frees nothing
    smallest = max(SMALLEST_CACHE, wanted / (config.sampler_batch * config.tp))
    fitting = min(wanted, free if sleeps else beside)
    return sleeps, config.kv_cache_gb or max(fitting, smallest)


def refusal(config: Config, ledger: Ledger, parameters: int, world: int) -> str:
    """The message if the model does not fit."""
    training, sampling = ledger.peaks.values()
    return (
        f"{parameters / 1e9:.1f} B parameters on {world // config.dp_replicate} processes do not "
        f"fit a GPU of {ledger.gpu:.0f} GiB, {ledger.usable:.1f} of them usable: training takes "
        f"{training:.1f} GiB and sampling {sampling:.1f}; use more processes, fewer "
        "--dp-replicate, --checkpointing full, a smaller --tokens-per-microbatch, --sleep auto or "
        f"more --tp. `python train.py --recipe {config.recipe} --rehearse {world}xCARD` finds the "
        "flags, and --kv-cache-gb takes the decision from this estimate"
    )


# ---- sizes of a model and a config


def config_bytes(config: Config) -> int:
    """Bytes of an element of the compute type."""
    return getattr(torch, config.dtype).itemsize


def longest_prompt(config: Config, lm: PretrainedConfig) -> int:
    """Tokens of the longest prompt that a run keeps."""
    return min(config.max_prompt_tokens, lm.max_position_embeddings - config.max_new_tokens)


def longest_sequence(config: Config, lm: PretrainedConfig) -> int:
    """Tokens of the longest prompt and response together."""
    return longest_prompt(config, lm) + config.max_new_tokens


def fullest_tokens(config: Config, lm: PretrainedConfig) -> int:
    """Tokens of the fullest micro-batch. A longer sequence runs alone."""
    return max(config.tokens_per_microbatch, longest_sequence(config, lm))


def trained_parameters(config: Config, lm: PretrainedConfig, parameters: int) -> int:
    """All of them, or the elements of LoRA's two factors beside each targeted linear layer."""
    if not config.lora_rank:
        return parameters
    heads, keys = lm.num_attention_heads * head_dim(lm), kv_width(lm)
    hidden, inner = lm.hidden_size, lm.intermediate_size
    inputs_and_outputs = {
        "q_proj": hidden + heads,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": heads + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    targets = comma_list(config.lora_targets)
    widths = [
        width for name, width in inputs_and_outputs.items() if targets == [ALL] or name in targets
    ]
    return lm.num_hidden_layers * config.lora_rank * sum(widths)


def root_size(lm: PretrainedConfig) -> int:
    """Elements of the embedding and, where it is not the same, the LM head."""
    return lm.vocab_size * lm.hidden_size * (1 if lm.tie_word_embeddings else 2)


def batch_logits(config: Config, lm: PretrainedConfig) -> int:
    """Logits of one decode step of a full batch."""
    return config.sampler_batch * config.tp * lm.vocab_size


def kv_width(lm: PretrainedConfig) -> int:
    """Elements of one token's keys in one layer. Its values have as many."""
    return lm.num_key_value_heads * head_dim(lm)
