"""The sampler's interface, and which sampler a run gets.

`engine_torch.TorchEngine` is plain PyTorch with a KV cache, for machines without a GPU.
`engine_vllm.VLLMEngine` is vLLM. Another sampler is another class with these five members.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from drgrpo.types import Completion, OnFinish, Request, Sampling, UserError, never, no_callback
from drgrpo.vllm_options import parse_vllm_options


class Engine(Protocol):
    """A sampler with its own copy of the policy's weights.

    Every completion holds the log-probability of each token under the distribution that it was
    drawn from. On a CPU a completion depends on its request's seed and on the weights alone. On a
    GPU that holds up to rounding: matrix products of other batches add in other orders, and now
    and then a token changes. vLLM's batch-invariant mode removes that. With drafts a completion
    also depends on when the others of its batch end."""

    name: str

    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        on_finish: OnFinish = no_callback,
        enough: Callable[[], bool] = never,
    ) -> list[Completion]:
        """One completion per request, in order. It begins with what the request has already drawn,
        and `max_new_tokens` counts the whole.

        `on_finish(i, completion)` is called once request i is complete, in any order. Once
        `enough()` is true, the completions of the other requests are returned open."""

    def sync(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sample from these weights from now on. They come under their Hugging Face names.

        A sleeping engine wakes, and what it cached with the old weights is dropped. RuntimeError
        if a weight is missing."""

    def sleep(self) -> None:
        """Free memory for the trainer until the next `sync`, if the engine can."""

    def close(self) -> None:
        """Release the engine at the end of the program."""


def resolve_engine(name: str, device: torch.device) -> str:
    """The engine that `auto` stands for on this device, or `name`."""
    if name == "auto":
        return "vllm" if device.type == "cuda" else "torch"
    return name


def stop_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The model's own end tokens: those of its generation config and its tokenizer's."""
    eos = GenerationConfig.from_pretrained(path).eos_token_id
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


class EngineConfig(Protocol):
    """The fields of `Config`, or of eval.py's, that concern the sampler."""

    @property
    def engine(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def sampler_batch(self) -> int: ...
    @property
    def tp(self) -> int: ...
    @property
    def batch_invariant(self) -> bool: ...
    @property
    def vllm(self) -> str: ...
    @property
    def speculate(self) -> str: ...


def check_batch_invariance(engine: str, device: torch.device) -> None:
    """UserError unless `engine` has a batch-invariant mode on this device.

    vLLM 0.32 documents compute capability 8.0 and checks nothing itself."""
    if engine != "vllm" or device.type != "cuda":
        raise UserError(
            f"--batch-invariant is a mode of vLLM on a GPU, and the engine here is {engine} on "
            f"{device.type}; leave the flag out. On a CPU a sample depends on its seed alone anyway"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise UserError(
            f"--batch-invariant needs a GPU of compute capability 8.0 or higher, as an A100; "
            f"this one has {major}.{minor}. Leave the flag out"
        )


def check_drafts(engine: str, device: torch.device) -> None:
    """UserError unless `engine` verifies drafts on this device.

    With drafts, vLLM 0.32 without a GPU divides logits by memory that nothing was written to:
    `_expand_kernel_impl` in vllm/utils/cpu_triton_utils.py fills a copy of its output."""
    if engine != "vllm" or device.type != "cuda":
        raise UserError(
            f"--speculate ngram is for vLLM on a GPU, and the engine here is {engine} on "
            f"{device.type}; leave the flag out. vLLM 0.32 samples wrong tokens from drafts "
            "without a GPU"
        )


def make_engine(
    config: EngineConfig,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    max_tokens: int,
    kv_cache_gb: float = 0.0,
    sleep: bool = False,
    load_weights: bool = True,
) -> Engine:
    """The engine that `config` names, with the weights at `path`.

    `max_tokens`: longest prompt and response together. `kv_cache_gb`: 0 takes what the GPU has
    left, or 0.25 without one. `load_weights`: False lets vLLM start with random weights, for a
    caller that calls `sync` before it samples. UserError if vLLM is not installed, or does not do
    here what `config` asks of it."""
    dtype, tp = getattr(torch, config.dtype), config.tp or 1
    batch = config.sampler_batch * tp
    name = resolve_engine(config.engine, device)
    if config.batch_invariant:
        check_batch_invariance(name, device)
    if config.vllm and name != "vllm":
        raise UserError(f"--vllm goes with --engine vllm, and the engine here is {name}")
    if config.speculate != "none":
        check_drafts(name, device)
    # vLLM takes seconds to import and may be missing, so each engine is imported by its own runs.
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
        load_weights=load_weights,
        batch_invariant=config.batch_invariant,
        options=parse_vllm_options(config.vllm),
        speculate=config.speculate,
    )
