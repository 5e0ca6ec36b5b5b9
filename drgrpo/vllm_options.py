"""`--vllm`: further arguments of vLLM's `LLM(...)`, as a JSON object.

    --vllm '{"enforce_eager": true}'
    --vllm '{"kv_cache_dtype": "fp8"}' --tis-cap 2

This file imports neither vLLM nor torch, so that a mistake is answered at once. vLLM checks the
values itself.
"""

from typing import Any

from drgrpo.types import UserError, parse_json

SET_BY_A_FLAG = {
    "model": "--model",
    "tokenizer": "--model",
    "dtype": "--dtype",
    "seed": "--seed",
    "max_model_len": "--max-prompt-tokens and --max-new-tokens",
    "max_num_seqs": "--sampler-batch",
    "tensor_parallel_size": "--tp",
    "kv_cache_memory_bytes": "--kv-cache-gb",
    "gpu_memory_utilization": "--kv-cache-gb",
    "enable_sleep_mode": "--sleep",
    "speculative_config": "--speculate",
}
"""Arguments that a flag of the trainer decides."""

REFUSED = {
    "logprobs_mode": "the ratio needs log-probs after temperature",
    "generation_config": "the model's own top-p and top-k would change what is sampled",
    "override_generation_config": "top-p, top-k and penalties would change what is sampled",
    "logits_processors": "they would change what is sampled",
    "hf_overrides": "trainer and sampler would be different models",
    "load_format": "the weights come from the trainer",
    "distributed_executor_backend": "torchrun's processes are the workers",
    "pipeline_parallel_size": "every process holds an engine, or a part of one by --tp",
    "data_parallel_size": "every process holds an engine, or a part of one by --tp",
    "max_num_batched_tokens": "the memory ledger counts the activations of 8192 tokens",
    "enable_lora": "an adapter is merged into the weights that are sent",
    "worker_cls": "the weight sync needs vLLM's own worker",
    "skip_tokenizer_init": "stop strings need the tokenizer",
}
"""Arguments that would break the sampler's exactness or the trainer's way of using it."""

ROUNDING = ("kv_cache_dtype", "quantization")
"""Arguments by which the sampler computes in fewer bits than the trainer."""


def parse_vllm_options(text: str) -> dict[str, Any]:
    """The arguments. UserError unless `text` is a JSON object of arguments that may be given."""
    shown = " ".join(text[:200].split())
    try:
        options = parse_json(text or "{}")
    except ValueError as error:
        raise UserError(
            f"--vllm {shown} is not JSON ({error}); write --vllm '{{\"enforce_eager\": true}}'"
        ) from error
    if not isinstance(options, dict):
        raise UserError(f"--vllm {shown} must be a JSON object, as '{{\"enforce_eager\": true}}'")
    for name in options:
        if name in SET_BY_A_FLAG:
            raise UserError(f"--vllm: {name} is set by {SET_BY_A_FLAG[name]}; use that")
        if name in REFUSED:
            raise UserError(f"--vllm: {name} cannot be given, because {REFUSED[name]}")
    return options


def check_rounding(text: str, tis_cap: float) -> None:
    """UserError if the sampler computes in fewer bits than the trainer and `tis_cap` is 0."""
    options = parse_vllm_options(text)
    rounding = [name for name in ROUNDING if options.get(name) not in (None, "auto")]
    if rounding and not tis_cap:
        name = rounding[0]
        raise UserError(
            f"--vllm {name} {options[name]} makes the sampler's distribution another one than the "
            "trainer's, and the gradient is biased without a correction; add --tis-cap 2, or leave "
            f"{name} out"
        )
