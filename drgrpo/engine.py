"""Samplers behind one small interface: `generate`, `sync`, `sleep`, `wake`, `close`.

`engine_torch.TorchEngine` is a batched KV-cache sampler in plain PyTorch, for machines without a
GPU; `engine_vllm.VLLMEngine` is vLLM. Both return the log-probability of each token under the
distribution that it was drawn from, and both draw a sample from its request's seed alone, whatever
else is in the batch.
"""

from collections.abc import Callable

import torch
from transformers import GenerationConfig

from drgrpo.types import Completion

OnFinish = Callable[[int, Completion], None]


def ignore(index: int, completion: Completion) -> None:
    """For who does not need completions as they finish."""


def resolve_engine(name: str, device: torch.device) -> str:
    """What `auto` stands for on this machine."""
    return name if name != "auto" else "vllm" if device.type == "cuda" else "torch"


def stop_token_ids(path: str, tokenizer) -> tuple[int, ...]:
    """The model's own end tokens: those of its generation config and its tokenizer's."""
    eos = GenerationConfig.from_pretrained(path).eos_token_id
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def make_engine(
    name: str,
    path: str,
    tokenizer,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    max_tokens: int,
    kv_cache_gb: float,
    tp: int = 1,
    sleep: bool = False,
):
    """The engine called `name`, holding the weights at `path`. `max_tokens`: longest prompt and
    response together; `tp`, `sleep` and `kv_cache_gb` are vLLM's."""
    if name == "torch":
        from drgrpo.engine_torch import TorchEngine

        return TorchEngine(
            path, tokenizer, dtype=dtype, device=device, batch=batch, max_tokens=max_tokens
        )
    from drgrpo.engine_vllm import VLLMEngine

    return VLLMEngine(
        path,
        tokenizer,
        dtype=dtype,
        device=device,
        batch=batch,
        max_tokens=max_tokens,
        kv_cache_gb=kv_cache_gb,
        tp=tp,
        sleep=sleep,
    )
