"""Floating-point operations of a training pass, and the share of the hardware's peak that they make
(MFU)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from drgrpo.run.log import Stopwatch
from drgrpo.types import Rollout

if TYPE_CHECKING:
    from drgrpo.config import Config

PEAK_TFLOPS = {
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "B200": 2250,
    "L40S": 362,
    "RTX 4090": 165,
}
"""Dense bfloat16 peaks by what a device's name contains (vendors' data sheets)."""


def head_dim(config: PretrainedConfig) -> int:
    """Width of an attention head. Not every model's config has it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def training_flops(lm: PreTrainedModel, lengths: list[tuple[int, int]]) -> float:
    """Operations of forward and backward over packed (prompt, response) tokens: 3 x forward, or 2 x
    where the weights are frozen and LoRA trains beside them.

    Matmuls, causal attention, and the LM head on response tokens only. What activation
    checkpointing recomputes does not count."""
    config, blocks = lm.config, lm.base_model.layers
    weights = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
    tokens = sum(prompt + response for prompt, response in lengths)
    responses = sum(response for _, response in lengths)
    # Query-key pairs under a causal mask.
    pairs = sum((prompt + response) ** 2 / 2 for prompt, response in lengths)
    width = config.num_attention_heads * head_dim(config)
    attention = 4 * pairs * width * config.num_hidden_layers
    head = 2 * config.vocab_size * config.hidden_size * responses
    passes = 3 if lm.get_output_embeddings().weight.requires_grad else 2
    return passes * (2 * weights * tokens + head) + 3 * attention


def peak_flops(device: torch.device) -> float | None:
    """Operations per second of one device in bfloat16. None if the device is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def utilization(
    config: Config,
    lm: PreTrainedModel,
    rollouts: list[Rollout],
    advantage_PG: Tensor,
    timer: Stopwatch,
    device: torch.device,
) -> dict[str, float | None]:
    """What one device made of a step's training phase.

    tflops: 1e12 operations per second. mfu: their share of the device's peak, None if that is
    unknown. `rollouts` are those of all processes. A response that training skipped does not
    count."""
    advantages = advantage_PG.flatten().tolist()
    lengths = [
        (len(rollout.problem.prompt_ids), rollout.length)
        for rollout, advantage in zip(rollouts, advantages, strict=True)
        if advantage or not config.drops_zero_advantage
    ]
    speed = training_flops(lm, lengths) / dist.get_world_size() / timer.seconds["train"]
    peak = peak_flops(device)
    return {"tflops": speed / 1e12, "mfu": speed / peak if peak else None}
