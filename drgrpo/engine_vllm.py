"""vLLM inside the trainer's process: one engine per process under torchrun, and weights that are
handed over by reference.

The comment beside a setting says what goes wrong without it. Most of these mistakes are silent.
"""

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drgrpo.types import (
    MAX_BATCHED_TOKENS,
    Completion,
    OnFinish,
    Request,
    Sampling,
    UserError,
    never,
    no_callback,
)

DRAFT_BATCH = 16  # sequences of a step that are drafted for
DRAFT_TOKENS = 4
DRAFT_MATCH = (3, 8)  # tokens that must match, at least and at most


class VLLMEngine:
    """Samples through `vllm.LLM`. The process group must exist before it does: without one, vLLM
    makes a group of size one the default.

    load_weights: False leaves random weights until the first `sync`. batch_invariant: vLLM's mode
    in which a sample does not depend on its batch. options: further arguments of `LLM`. speculate:
    "ngram" drafts the end of a rollout. UserError if this vLLM does not have the mode, if it
    refuses the model in float16 or an option, or if vLLM is not installed."""

    name = "vllm"

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        max_tokens: int,
        kv_cache_gb: float,
        tp: int,
        sleep: bool,
        load_weights: bool = True,
        batch_invariant: bool = False,
        options: dict[str, Any] | None = None,
        speculate: str = "none",
    ) -> None:
        on_gpu = device.type == "cuda"
        prepare_environment(on_gpu, dtype, batch_invariant)
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"--engine vllm needs vLLM ({error}): install it with `make env-test`, or use "
                "--engine torch"
            ) from error
        if batch_invariant:
            check_batch_invariance()
        arguments = llm_arguments(
            path,
            dtype=dtype,
            on_gpu=on_gpu,
            world=dist.get_world_size(),
            batch=batch,
            max_tokens=max_tokens,
            kv_cache_gb=kv_cache_gb,
            tp=tp,
            sleep=sleep,
            load_weights=load_weights,
        )
        arguments |= draft_arguments(speculate) | (options or {})
        # LLM() seeds the global random generators anew.
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            try:
                self.llm = LLM(**arguments)
            except (TypeError, ValueError) as error:
                raise explained(error, path, options) from error
        # At every sync it would warn of the rotary embedding, which has no weights. Another module
        # of vLLM lists the weights that are missing.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel("ERROR")
        if on_gpu and dist.get_rank() == 0:
            warn_of_old_runner(self.llm)
        self.tokenizer = tokenizer
        # On a CPU, vLLM's log-prob helper would spend 10 s in a C++ compiler. Dynamo is off during
        # vLLM's steps alone, so that the trainer's torch.compile still works.
        self.uncompiled = (
            nullcontext if on_gpu else partial(torch._dynamo.config.patch, disable=True)
        )
        self.can_sleep, self.asleep = sleep, False
        self.names: set[str] | None = None  # of the first sync

    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        on_finish: OnFinish = no_callback,
        enough: Callable[[], bool] = never,
    ) -> list[Completion]:
        """One completion per request, in order. It begins with what the request has already drawn.

        `on_finish(i, completion)` is called as request i finishes. `enough()` is asked after every
        step of the engine. An open response goes on as a request whose prompt is all of its text.
        With unchanged weights, vLLM's V2 model runner draws the same tokens as if the response had
        never stopped, because its random numbers are functions of seed and position. The V1 runner
        begins a seed's numbers anew with every request, so that it gets a seed for the rest."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        by_position = runs_v2(self.llm)
        for i, request in enumerate(requests):
            if not by_position:
                request = replace(request, seed=rest_seed(request))
            params = SamplingParams(**sampling_arguments(request, sampling))
            prompt_ids = request.prompt_ids + request.drawn.token_ids
            engine.add_request(str(i), {"prompt_token_ids": prompt_ids}, params)
        completions = [request.drawn for request in requests]
        while engine.has_unfinished_requests() and not enough():
            with self.uncompiled():
                outputs = engine.step()
            for output in outputs:
                i = int(output.request_id)
                rest = to_completion(output.outputs[0])
                completions[i] = joined(requests[i].drawn, rest, sampling.stop, self.tokenizer)
                on_finish(i, completions[i])
        for output in leave_open(engine):
            i = int(output.request_id)
            rest = replace(to_completion(output.outputs[0]), open=True)
            completions[i] = joined(requests[i].drawn, rest, sampling.stop, self.tokenizer)
            if not completions[i].open:
                on_finish(i, completions[i])
        return completions

    def sync(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the trainer's weights, and wake the engine if it sleeps.

        vLLM's own reload knows its packed layouts and keeps CUDA graphs valid. An exception in
        here leaves the engine unusable, so it ends the run. RuntimeError if a weight is missing
        or if the prefix cache was not reset."""
        if self.asleep:
            torch.cuda.empty_cache()  # else PyTorch keeps the memory that vLLM maps again
            self.llm.wake_up(tags=["weights"])
        names: set[str] = set()
        self.llm.collective_rpc(**reload_arguments(record_names(named_weights, names)))
        # vLLM at most warns of a weight that is left out. The names are compared with those of the
        # first sync, and the parity gate guards the rest.
        if self.names is not None and names != self.names:
            changed = sorted(names ^ self.names)
            raise RuntimeError(f"weight sync sent other names than at first: {changed}")
        self.names = names
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])  # after the weights: before them it samples garbage
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache: it would use the old policy's keys and values"
            )

    def sleep(self) -> None:
        """Free weights and cache for the trainer. `sync` brings new weights, so the old ones are
        dropped (level 2)."""
        if self.can_sleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """End the engine and the default process group. Nothing collective may follow.

        It wakes first: vLLM would unmap memory that sleeps a second time, with a CUDA error for
        each block."""
        if self.asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights", "kv_cache"])
            self.asleep = False
        self.llm.llm_engine.engine_core.shutdown()


def prepare_environment(on_gpu: bool, dtype: torch.dtype, batch_invariant: bool = False) -> None:
    """Set what vLLM and Triton read from the environment, before either is imported. A variable
    that the user has set is kept. Only `batch_invariant` overrides one."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: tensors go by reference
        "VLLM_NO_USAGE_STATS": "1",
        # On a GPU its warnings tell of weights that were not loaded and of slow fallbacks. On a
        # CPU they advise on preloading libraries.
        "VLLM_LOGGING_LEVEL": "WARNING" if on_gpu else "ERROR",
    }
    if not on_gpu:
        # else all engines of a machine bind to the same cores
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    elif dtype == torch.float32:
        # else vLLM's float32 attention, which is in Triton, multiplies in TF32: off by up to
        # 2e-2 nats, and the parity gate stops the run
        settings["TRITON_F32_DEFAULT"] = "ieee"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"


def check_batch_invariance() -> None:
    """UserError unless vLLM reads the variable that `prepare_environment` has set."""
    import vllm

    if not getattr(vllm.envs, "VLLM_BATCH_INVARIANT", False):
        raise UserError(
            f"--batch-invariant: vLLM {vllm.__version__} does not have this mode; install vLLM "
            "0.32, or leave the flag out"
        )


def explained(error: Exception, path: str, options: dict[str, Any] | None) -> Exception:
    """A UserError where vLLM's refusal is one of the user's choice, else `error`."""
    if "does not support float16" in str(error):
        return UserError(
            f"--dtype float16: vLLM refuses it for the model {path}, whose activations overflow; "
            "use --dtype bfloat16"
        )
    named = [name for name in options or {} if name in str(error)]
    if named:
        return UserError(f"--vllm: vLLM refuses {', '.join(named)}: {error}")
    return error


def llm_arguments(
    path: str,
    *,
    dtype: torch.dtype,
    on_gpu: bool,
    world: int,
    batch: int,
    max_tokens: int,
    kv_cache_gb: float,
    tp: int,
    sleep: bool,
    load_weights: bool = True,
) -> dict[str, Any]:
    """Every argument of `vllm.LLM`. `world`: processes of the default process group."""
    arguments: dict[str, Any] = {
        "model": path,
        "load_format": "auto" if load_weights else "dummy",  # else a checkpoint is read for nothing
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_tokens,
        "max_num_seqs": batch,
        "logprobs_mode": "processed_logprobs",  # after temperature; the default is before it
        "generation_config": "vllm",  # else the model's own top_p and top_k are applied too
        "tensor_parallel_size": tp,
        "enable_sleep_mode": sleep,
        "enforce_eager": not on_gpu,
        "seed": 0,  # every request brings its own
        "use_tqdm_on_load": False,
        # Without it every process of a node takes GPU 0. vLLM then wants torchrun's RANK and
        # LOCAL_RANK, which a process that was started by hand does not have. Consecutive ranks
        # share an engine.
        "distributed_executor_backend": "external_launcher" if world > 1 else None,
    }
    if dtype.itemsize == 2:
        # else logits are rounded to 16 bits, and samples come from the rounded distribution. The
        # trainer's logits are float32.
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if on_gpu:
        # vLLM's own choice differs between cards, and the memory ledger would not know it
        arguments["max_num_batched_tokens"] = max(MAX_BATCHED_TOKENS, batch)
    else:
        arguments["block_size"] = 32  # the CPU build's unit
    return arguments | cache_arguments(kv_cache_gb, on_gpu)


def cache_arguments(kv_cache_gb: float, on_gpu: bool) -> dict[str, Any]:
    """The size of the KV cache in bytes, so that vLLM does not measure one.

    0 GB on a GPU means the rest of its memory: only eval.py, which has the GPU to itself, asks for
    that."""
    if on_gpu and not kv_cache_gb:
        return {"gpu_memory_utilization": 0.9}
    size: dict[str, Any] = {"kv_cache_memory_bytes": int((kv_cache_gb or 0.25) * 2**30)}
    if on_gpu:
        # Beside a size this share is only what vLLM wants to find free at its start. By default
        # that is nearly all of the GPU, where the trainer's weights already are.
        size["gpu_memory_utilization"] = 0.01
    return size


def draft_arguments(speculate: str) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for `--speculate`.

    A draft is what followed the longest match of the last tokens, earlier in prompt or response.
    While many sequences are sampled the GPU has no time to spare, and none is drafted."""
    if speculate == "none":
        return {}
    return {
        "speculative_config": {
            "method": "ngram_gpu",  # "ngram" searches on the CPU and ends async scheduling
            "num_speculative_tokens": DRAFT_TOKENS,
            "num_speculative_tokens_per_batch_size": [
                (1, DRAFT_BATCH, DRAFT_TOKENS),
                (DRAFT_BATCH + 1, DRAFT_BATCH + 1, 0),  # the last range counts for all above
            ],
            "prompt_lookup_min": DRAFT_MATCH[0],
            "prompt_lookup_max": DRAFT_MATCH[1],
        }
    }


def sampling_arguments(request: Request, sampling: Sampling) -> dict[str, Any]:
    """Every argument of `vllm.SamplingParams` for what one request has left to draw."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    arguments = {
        "n": 1,
        "seed": request.seed,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens - len(request.drawn.token_ids),
        "stop_token_ids": list(sampling.stop_token_ids),
        "stop": list(sampling.stop) or None,
        "include_stop_str_in_output": True,
        "detokenize": bool(sampling.stop),
        "logprobs": 0,  # of the sampled token alone
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    if hasattr(SamplingParams, "flat_logprobs"):
        arguments["flat_logprobs"] = True  # else vLLM makes a dict and an object for every token
    return arguments


def rest_seed(request: Request) -> int:
    """The request's seed, or if something is drawn already, 63 bits from that seed and how much."""
    drawn = len(request.drawn.token_ids)
    return random.Random(f"{request.seed} {drawn}").getrandbits(63) if drawn else request.seed


def runs_v2(llm: Any) -> bool:
    """Whether vLLM uses its V2 model runner. A CPU has the V1 runner."""
    return getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False)


def warn_of_old_runner(llm: Any) -> None:
    """Print a warning if vLLM has fallen back to its V1 model runner."""
    if not runs_v2(llm):
        print(
            "WARNING: vLLM uses its V1 model runner, which draws the random numbers of each "
            "request by itself. A decoding step is estimated to take 20 to 40 % longer. vLLM's "
            "own warning above has the reason, unless VLLM_USE_V2_MODEL_RUNNER=0 is set",
            flush=True,
        )


def record_names(
    named_weights: Iterable[tuple[str, Tensor]], names: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights. Their names are added to `names`."""
    for name, tensor in named_weights:
        names.add(name)
        yield name, tensor


def reload_arguments(weights: Iterator[tuple[str, Tensor]]) -> dict[str, Any]:
    """The arguments of `LLM.collective_rpc` that load weights.

    vLLM's layers ask for its config while they are loaded. The worker of vLLM 0.32 provides it,
    which shows in the names that its method uses. For a worker that does not, `reload_weights`
    provides it, and where both do no harm is done."""
    from vllm.v1.worker.gpu_worker import Worker

    if "set_current_vllm_config" in Worker.reload_weights.__code__.co_names:
        return {"method": "reload_weights", "kwargs": {"weights_iterator": weights}}
    return {"method": reload_weights, "args": (weights,)}


def reload_weights(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """What the worker of an older vLLM runs in `sync`."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        worker.model_runner.reload_weights(weights_iterator=weights)


def to_completion(output: Any) -> Completion:
    """A `Completion` from vLLM's `CompletionOutput`."""
    token_ids, logprobs = list(output.token_ids), output.logprobs
    if hasattr(logprobs, "start_indices"):  # flat: a position's sampled token comes first
        chosen = [logprobs.logprobs[i] for i in logprobs.start_indices]
    else:
        chosen = [entry[token].logprob for entry, token in zip(logprobs, token_ids, strict=True)]
    return Completion(token_ids, chosen, finished=output.finish_reason == "stop")


def leave_open(engine: Any) -> list[Any]:
    """Abort what an `LLMEngine` has not finished. Returns vLLM's `RequestOutput`s of that.

    vLLM's own `abort_request` drops the tokens of a request that reports at its end only."""
    from vllm.v1.engine import FinishReason

    states = list(engine.output_processor.request_states.values())
    outputs = [state.make_request_output([], None, FinishReason.ABORT, None) for state in states]
    engine.abort_request([output.request_id for output in outputs])
    return outputs


def joined(
    drawn: Completion, rest: Completion, stop: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> Completion:
    """A whole response from the part that its request came with and the part that vLLM drew.

    vLLM looks for a stop string in what it has drawn. One that begins in the first part and ends
    in the second ends the response there."""
    token_ids, start = drawn.token_ids + rest.token_ids, len(drawn.token_ids)
    logprobs = drawn.logprobs + rest.logprobs
    tail = max(map(len, stop), default=0) if start else 0  # a token is at least one byte of text
    for end in range(start + 1, min(start + tail, len(token_ids)) + 1):
        text = tokenizer.decode(token_ids[max(0, end - tail - 4) : end])
        if any(s in text for s in stop):
            return Completion(token_ids[:end], logprobs[:end], finished=True)
    return Completion(token_ids, logprobs, rest.finished, rest.open)
