"""The installed vLLM in a child process that takes itself for a machine with an H100.

vLLM's own platform class for CUDA decides, with only the queries of the device stubbed. Nothing
is loaded or sampled: `LLM(...)` stops where it has its config."""

import inspect
import os
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch

from drgrpo.engine_vllm import prepare_environment, sampling_arguments
from drgrpo.types import Request, Sampling

GIB = 2**30
GPU_GIB = 79.15  # what an A100 or H100 of 80 GB reports
EXTENSIONS = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C")
"""Compiled modules that vLLM's CPU build lacks. Nothing in them is called."""


def pretend(dtype: torch.dtype, batch_invariant: bool) -> None:
    """Make this process a GPU's. Call it before vLLM is imported."""
    # Hidden rather than missing GPUs: vLLM's search for active Triton drivers is then lenient.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    prepare_environment(True, dtype, batch_invariant)
    for extension in EXTENSIONS:
        sys.modules[extension] = ModuleType(extension)
    from vllm import platforms

    platforms.vllm_version_matches_substr = lambda text: False  # "cpu" of the CPU build
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H100(NonNvmlCudaPlatform):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100 80GB HBM3")
        get_device_total_memory = classmethod(lambda cls, device_id=0: int(GPU_GIB * GIB))
        is_fully_connected = classmethod(lambda cls, device_ids: True)
        device_count = classmethod(lambda cls: 8)

    platforms._current_platform = H100()
    from vllm import _custom_ops

    for name in list(vars(_custom_ops)):
        if name.startswith("cutlass") and "support" in name:  # quantized layers ask at import
            setattr(_custom_ops, name, lambda capability: False)
    from vllm.device_allocator import cumem
    from vllm.v1.engine.llm_engine import LLMEngine

    cumem.cumem_available = True  # the CPU build lacks its C extension
    LLMEngine.from_engine_args = stop_at_the_config


class Config(Exception):
    """vLLM's complete config."""


def stop_at_the_config(engine_args, usage_context):
    raise Config(engine_args.create_engine_config(usage_context))


def make_config(arguments: dict):
    """The config that `vllm.LLM(**arguments)` makes."""
    from vllm import LLM

    try:
        LLM(**arguments)
    except Config as made:
        return made.args[0]
    raise AssertionError("LLM() made no config")


# ---- what the tests ask the child for: each takes and returns what can be pickled


def read(arguments: dict) -> dict:
    """What the config holds and vLLM will read."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.v1.executor import Executor

    config = make_config(arguments)
    model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
    return {
        "model": model.model,
        "load_format": config.load_config.load_format,
        "loader": type(get_model_loader(config.load_config)).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "head_dtype": str(model.head_dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "logprobs_mode": model.logprobs_mode,
        "generation_config": model.generation_config,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "enable_sleep_mode": model.enable_sleep_mode,
        "enforce_eager": model.enforce_eager,
        "seed": model.seed,
        "use_tqdm_on_load": config.load_config.use_tqdm_on_load,
        "kv_cache_memory_bytes": cache.kv_cache_memory_bytes,
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "executor": Executor.get_class(config).__name__,
        "worker": config.parallel_config.worker_cls,
        "v2_runner": config.use_v2_model_runner,
        "async_scheduling": scheduler.async_scheduling,
        "prefix_caching": cache.enable_prefix_caching,
        "device": str(config.device_config.device),
        "drafts": drafts_by_batch(config),
    }


def drafts_by_batch(config) -> list[int]:
    """Drafted tokens by the number of sequences in a step, as vLLM's scheduler looks them up."""
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    drafts = config.speculative_config
    if drafts is None:
        return []
    return build_dynamic_sd_schedule_lookup(
        drafts.num_speculative_tokens_per_batch_size,
        config.scheduler_config.max_num_seqs,
        config.num_speculative_tokens,
    )


def refusal(arguments: dict) -> str:
    """How vLLM refuses the arguments of `LLM`; empty if it takes them."""
    try:
        make_config(arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def request_refusals(request: Request, sampling: Sampling) -> dict[str, str]:
    """How vLLM refuses the arguments of `SamplingParams` where one has another name, by its name.
    The arguments as they are must pass."""
    from vllm import SamplingParams

    arguments, answers = sampling_arguments(request, sampling), {}
    SamplingParams(**arguments)
    for name in arguments:
        try:
            SamplingParams(**rename(arguments, name))
        except TypeError as error:
            answers[name] = str(error)
    return answers


def draws(seed: int, positions: list[int]) -> list[int]:
    """What vLLM's V2 runner draws at these positions from one distribution, in one batch. Triton's
    interpreter runs vLLM's kernel."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    count = len(positions)
    logits = torch.randn(260, generator=torch.Generator().manual_seed(0)).repeat(count, 1)
    request, temperature = torch.arange(count, dtype=torch.int32), torch.ones(count)
    where = torch.full((count,), seed), torch.tensor(positions)
    flags = {"apply_temperature": False, "is_drafting": False}
    return gumbel_sample(logits, request, temperature, *where, **flags).tolist()


def source_of_sampler() -> str:
    """The function of vLLM's V2 runner that says where in its sequence a token is."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    return inspect.getsource(Sampler.__call__)


def rename(arguments: dict, name: str) -> dict:
    """The arguments, one under another name."""
    return {f"{key}_" if key == name else key: value for key, value in arguments.items()}


def start_with(arguments: dict, used_gib: float) -> str:
    """vLLM's check of free memory at its start, beside `used_gib`; empty if it passes."""
    from vllm.v1.worker.utils import MemorySnapshot, request_memory

    cache = make_config(arguments).cache_config
    total, used = int(GPU_GIB * GIB), int(used_gib * GIB)
    snapshot = MemorySnapshot(
        free_memory=total - used, total_memory=total, device="cuda:0", auto_measure=False
    )
    try:
        request_memory(snapshot, cache)
    except ValueError as error:
        return str(error)
    return ""


def placement(arguments: dict, variables: dict[str, str]) -> tuple:
    """vLLM's (init method, rank, local rank) where torchrun has set `variables`."""
    from vllm.v1.executor import Executor

    config = make_config(arguments)
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    executor = SimpleNamespace(vllm_config=config)
    return Executor.get_class(config)._distributed_args(executor)


def batch_invariance() -> bool:
    """Whether vLLM reads that it is to be batch-invariant; UserError if it is not."""
    from vllm import envs

    from drgrpo.engine_vllm import check_batch_invariance

    check_batch_invariance()
    return envs.VLLM_BATCH_INVARIANT


def second_engine() -> list[str]:
    """What vLLM's allocator says to a second engine's weights: beside an engine that is awake,
    beside one that sleeps, and beside nothing."""
    from vllm.device_allocator import AllocationData, cumem
    from vllm.v1.worker.gpu_worker import Worker

    @contextmanager
    def use_memory_pool(tag):
        yield

    cumem.unmap_and_release = lambda handle: None
    allocator = cumem.CuMemAllocator.get_instance()
    allocator.use_memory_pool = use_memory_pool
    model_config = SimpleNamespace(enable_cumem_allocator=True)
    worker = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model_config))

    def load() -> str:
        try:
            with Worker._maybe_get_memory_pool_context(worker, "weights"):
                return ""
        except AssertionError as error:
            return str(error)

    handle = (0, 14 * GIB, 0xF000, 0)
    allocator.pointer_to_data[0xF000] = AllocationData(handle, "weights")
    answers = [load()]
    allocator.sleep(offload_tags=())  # level 2
    answers.append(load())
    allocator.pointer_to_data.clear()
    return [*answers, load()]


# ---- drafts on a GPU: vLLM's own kernels in Triton's interpreter


def drafted(tokens: list[list[int]], length: int, shortest: int, longest: int) -> list[list[int]]:
    """The draft of every sequence, of `length` tokens."""
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    count, room = len(tokens), max(map(len, tokens)) + length
    ids = torch.tensor([row + [0] * (room - len(row)) for row in tokens], dtype=torch.int32)
    state = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=ids),
        total_len=SimpleNamespace(gpu=torch.tensor([len(row) for row in tokens])),
    )
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens=length, prompt_lookup_min=shortest, prompt_lookup_max=longest
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=count),
        model_config=SimpleNamespace(max_model_len=room),
    )
    speculator = NgramGPUSpeculator(config, torch.device("cpu"), state)
    batch = SimpleNamespace(num_reqs=count, idx_mapping=torch.arange(count))
    last = torch.tensor([row[-1] for row in tokens])
    unused = (
        *("attn_metadata", "slot_mappings", "last_hidden_states", "aux_hidden_states"),
        *("num_rejected", "next_prefill_tokens", "temperature", "seeds"),
    )
    ones = torch.ones(count, dtype=torch.int32)
    return speculator.propose(
        batch, num_sampled=ones, last_sampled=last, **dict.fromkeys(unused)
    ).tolist()


def verified(logits_KV, draft: list[int], seeds) -> list[tuple[list[int], list[float]]]:
    """Tokens that vLLM's verification samples with each seed, and their log-probs. `logits_KV` has
    a row for each drafted token and one for the token after them."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    rows, count = len(logits_KV), len(seeds)
    index = torch.arange(count, dtype=torch.int32)
    place = torch.arange(rows, dtype=torch.int32).repeat(count)
    logits = logits_KV.repeat(count, 1)
    ends = torch.arange(0, rows * count + 1, rows, dtype=torch.int32)
    sampled, counts = rejection_sample(
        *(logits, None, torch.tensor([0, *draft]).repeat(count), ends, 100 + place.long(), index),
        *(index.repeat_interleave(rows), place, torch.ones(count), seeds, len(draft)),
    )
    sampler = SimpleNamespace(logprobs_mode="processed_logprobs")
    this = SimpleNamespace(sampler=sampler, enable_adaptive_verification=False)
    arguments = (sampled, counts, logits, ends, ends.numpy(), 0)
    logprobs = RejectionSampler._get_logprobs_tensors(this, *arguments).logprobs[:, 0]
    return [
        (sampled[i, :n].tolist(), logprobs[rows * i : rows * i + n].tolist())
        for i, n in enumerate(counts.tolist())
    ]


CONSTANTS = {
    "num_query_heads": 4,
    "num_queries_per_kv": 2,
    "BLOCK_SIZE": 16,
    "TILE_SIZE": 16,
    "HEAD_SIZE": 64,
    "HEAD_SIZE_PADDED": 64,
    "SLIDING_WINDOW": 0,
    "USE_CAUSAL": True,
    "stride_k_cache_3": 1,
    "stride_v_cache_3": 1,
    "BLOCK_Q": 8,
    "BLOCK_M": 16,
    "CHUNK_LOOKBACK": -1,
    "CHUNK_SIZE": -1,
}
TYPES = {
    **dict.fromkeys(("output_ptr", "query_ptr", "key_cache_ptr", "value_cache_ptr"), "*fp32"),
    **dict.fromkeys(("block_tables_ptr", "seq_lens_ptr", "query_start_len_ptr"), "*i32"),
    "scale": "fp32",
}


def attention_backend(dtype: torch.dtype) -> str:
    """The attention that vLLM chooses for the 7B model."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    config = AttentionSelectorConfig(
        head_size=128, dtype=dtype, kv_cache_dtype="auto", block_size=None
    )
    name = current_platform.get_attn_backend_cls(None, attn_selector_config=config, num_heads=28)
    return name.rpartition(".")[2]


def dot_products(dtype: torch.dtype | None) -> list[str]:
    """The products of vLLM's attention in float32, as Triton compiles it for an H100 under the
    environment of a `dtype` run, or of none."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from vllm.v1.attention.ops.triton_unified_attention import kernel_unified_attention as kernel

    os.environ.pop("TRITON_F32_DEFAULT", None)
    if dtype:
        prepare_environment(True, dtype)
    signature, constants = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in TYPES:
            signature[name] = TYPES[name]
        elif parameter.annotation in ("i32", "i64"):
            signature[name] = parameter.annotation
        else:
            signature[name] = "constexpr"
            default = False if parameter.is_constexpr else None
            constants[(i,)] = CONSTANTS.get(name, default)
    source = ASTSource(kernel, signature, constexprs=constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    return [line for line in code.splitlines() if "tt.dot " in line]
