"""What fits: a ledger of a process's GPU memory, in GiB. It decides whether vLLM stays while the
trainer works, and how large its KV cache is."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from drgrpo.config import Config
from drgrpo.run.flops import head_dim
from drgrpo.types import UserError

GIB = 2**30
USABLE = 0.92  # of a GPU: CUDA contexts, NCCL buffers and fragmentation take the rest
SMALLEST_CACHE = 0.5  # GiB


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """GiB per process. `kept` is always allocated, `training` only while training, `sampling` only
    while vLLM is awake."""

    kept: dict[str, float]
    training: dict[str, float]
    sampling: dict[str, float]
    gpu: float | None
    kv_cache: float
    sleep: bool

    def __str__(self) -> str:
        phases = {"kept": self.kept, "training": self.training, "sampling": self.sampling}
        parts = []
        for phase, items in phases.items():
            sizes = ", ".join(f"{name} {size:.2f}" for name, size in items.items())
            parts.append(f"{phase} {sum(items.values()):.2f} ({sizes})")
        habit = "sleeps" if self.sleep else "stays"
        end = "no GPU" if self.gpu is None else f"of {self.gpu:.1f}, vLLM {habit} while training"
        total = "; ".join([*parts, end])
        return f"memory ledger, GiB per process (activations are estimates): {total}"


def ledger_of(
    config: Config, lm: nn.Module, longest: int, world: int, device: torch.device
) -> Ledger:
    """The ledger of a run on `world` processes, this one on `device`.

    `longest`: tokens of the longest prompt. UserError if training or sampling alone does not
    fit."""
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
    GPU, None if there is none."""
    shards = world // config.dp_replicate
    kept = kept_gib(parameters, shards, reference=bool(config.kl_coef))
    training = training_gib(config, lm, parameters, shards)
    weights = getattr(torch, config.dtype).itemsize * parameters / config.tp / GIB
    if gpu_bytes is None:
        gpu, sleeps, cache = None, False, config.kv_cache_gb or 0.25
    else:
        gpu, extra = gpu_bytes / GIB, sum(training.values())
        free = USABLE * gpu - sum(kept.values())
        if free - max(weights, extra) < SMALLEST_CACHE:
            raise UserError(refusal(parameters, shards, gpu, sum(kept.values()), extra, weights))
        wanted = wanted_cache_gib(config, lm, longest)
        sleeps, cache = plan_sampling(config, wanted, free - weights, extra)
    sampling = {"vLLM weights": weights, "key-value cache": cache}
    return Ledger(
        kept=kept, training=training, sampling=sampling, gpu=gpu, kv_cache=cache, sleep=sleeps
    )


def kept_gib(parameters: int, shards: int, reference: bool) -> dict[str, float]:
    """Master weights and Adam's two moments in float32, shared by `shards` processes, and for a KL
    penalty a second model's weights."""
    share = 4 * parameters / shards / GIB
    kept = {"master weights": share, "Adam": 2 * share}
    return kept | ({"reference": share} if reference else {})


def training_gib(
    config: Config, lm: PretrainedConfig, parameters: int, shards: int
) -> dict[str, float]:
    """What forward and backward passes of one micro-batch add."""
    element_size = getattr(torch, config.dtype).itemsize
    vocabulary = lm.vocab_size * lm.hidden_size
    embeddings = vocabulary * (1 if lm.tie_word_embeddings else 2)
    block_params = (parameters - embeddings) / lm.num_hidden_layers
    # Elements that a token leaves in a block for the backward pass.
    activation_width = {
        "none": 6 * lm.hidden_size + 2 * kv_width(lm) + 4 * lm.intermediate_size,
        "selective": 4 * lm.hidden_size + 2 * kv_width(lm) + 2 * lm.intermediate_size,
        "full": lm.hidden_size,
    }
    # The backward pass holds one block in full, whatever is recomputed.
    elements = lm.num_hidden_layers * activation_width[config.checkpointing]
    elements += activation_width["none"]
    sizes = {
        "gradients": 4 * parameters / shards,
        # FSDP2 prefetches: two blocks at a time, beside embedding and LM head.
        "gathered weights": element_size * (2 * vocabulary + 2 * block_params),
        "activations": config.tokens_per_microbatch * elements * element_size,
        # The weight's gradient in float32, and 16-bit logits of 4096 tokens.
        "LM head": 4 * vocabulary + 2 * 4096 * lm.vocab_size,
    }
    return {name: size / GIB for name, size in sizes.items()}


def wanted_cache_gib(config: Config, lm: PretrainedConfig, longest: int) -> float:
    """A cache for all sequences that a sampler runs at once, each of the greatest length."""
    tokens = config.sampler_batch * (longest + config.max_new_tokens)
    elements = tokens * 2 * lm.num_hidden_layers * kv_width(lm)
    return elements * getattr(torch, config.dtype).itemsize / GIB


def plan_sampling(
    config: Config, wanted: float, free: float, training: float
) -> tuple[bool, float]:
    """(whether vLLM sleeps while training, GiB of its KV cache).

    `free`: GiB beside what is kept and vLLM's weights. `training`: GiB of the training phase.
    --sleep auto lets vLLM stay if at least half of the wanted cache fits beside training."""
    free_while_training = free - training
    sleeps = config.sleep == "on"
    if config.sleep == "auto":
        sleeps = free_while_training < wanted / 2
    fitting = min(wanted, free if sleeps else free_while_training)
    return sleeps, config.kv_cache_gb or max(fitting, SMALLEST_CACHE)


def refusal(
    parameters: int, shards: int, gpu: float, kept: float, training: float, weights: float
) -> str:
    """The message if the model does not fit. The last four are GiB."""
    return (
        f"{parameters / 1e9:.1f} B parameters on {shards} processes do not fit a GPU of "
        f"{gpu:.0f} GiB: {kept:.0f} GiB for weights and Adam, then {training:.0f} to train or "
        f"{weights:.0f} and a cache to sample; use more processes, fewer --dp-replicate, a "
        "smaller --tokens-per-microbatch or more --tp"
    )


def kv_width(lm: PretrainedConfig) -> int:
    """Elements of one token's keys in one layer. Its values have as many."""
    return lm.num_key_value_heads * head_dim(lm)
