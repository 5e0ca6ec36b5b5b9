"""Floating-point operations of a training pass, and the share of the hardware's peak that they make
(MFU)."""

import torch
from torch import nn

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


def training_flops(lm: nn.Module, lengths: list[tuple[int, int]]) -> float:
    """Forward and backward (3 x forward) over packed sequences of (prompt, response) tokens:
    matmuls, causal attention, and the LM head on response tokens only. What activation
    checkpointing computes again does not count."""
    config = lm.config
    weights = sum(
        p.numel() for block in lm.base_model.layers for p in block.parameters() if p.dim() > 1
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = sum(prompt + response for prompt, response in lengths)
    pairs = sum(
        (prompt + response) ** 2 / 2 for prompt, response in lengths
    )  # query-key pairs under a causal mask
    attention = 4 * pairs * config.num_attention_heads * head_dim * config.num_hidden_layers
    head = 2 * config.vocab_size * config.hidden_size * sum(response for _, response in lengths)
    return 3 * (2 * weights * tokens + attention + head)


def peak_flops(device: torch.device) -> float | None:
    """Of one device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
