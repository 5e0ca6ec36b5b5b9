"""vLLM inside the trainer's process: one engine per process under torchrun, and weights that are
handed over by reference.

The comment beside a setting says what goes wrong without it. Most of these mistakes are silent.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drgrpo.types import Completion, OnFinish, Request, Sampling, UserError, no_callback


class VLLMEngine:
    """Samples through `vllm.LLM`. The process group must exist before it does: without one, vLLM
    makes a group of size one the default."""

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
    ) -> None:
        on_gpu = device.type == "cuda"
        prepare_environment(on_gpu)
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"--engine vllm needs vLLM ({error}): install it with `make env-test`, or use "
                "--engine torch"
            ) from error
        # LLM() seeds the global random generators anew.
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            self.llm = LLM(
                model=path,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_tokens,
                max_num_seqs=batch,
                logprobs_mode="processed_logprobs",  # after temperature; the default is before it
                generation_config="vllm",  # else the model's own top_p and top_k are applied too
                tensor_parallel_size=tp,
                enable_sleep_mode=sleep,
                enforce_eager=not on_gpu,
                seed=0,  # every request brings its own
                use_tqdm_on_load=False,
                # torchrun's processes, by RANK and LOCAL_RANK of the environment. Consecutive
                # ranks share an engine.
                distributed_executor_backend="external_launcher" if on_gpu or tp > 1 else None,
                **({} if on_gpu else {"block_size": 32}),  # the CPU build's unit
                **cache_size(kv_cache_gb, on_gpu),
            )
        # On a CPU, vLLM's log-prob helper would spend 10 s in a C++ compiler. Dynamo is off during
        # vLLM's steps alone, so that the trainer's torch.compile still works.
        self.uncompiled = (
            nullcontext if on_gpu else partial(torch._dynamo.config.patch, disable=True)
        )
        self.can_sleep, self.asleep = sleep, False
        self.names: list[str] | None = None  # of the first sync

    def generate(
        self, requests: list[Request], sampling: Sampling, on_finish: OnFinish = no_callback
    ) -> list[Completion]:
        """One completion per request, in order.

        `on_finish(i, completion)` is called as request i finishes."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        for i, request in enumerate(requests):
            params = SamplingParams(
                n=1,
                seed=request.seed,
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                stop=list(sampling.stop) or None,
                include_stop_str_in_output=True,
                detokenize=bool(sampling.stop),
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(i), {"prompt_token_ids": request.prompt_ids}, params)
        completions: dict[int, Completion] = {}
        while engine.has_unfinished_requests():
            with self.uncompiled():
                outputs = engine.step()
            for output in outputs:
                i = int(output.request_id)
                completions[i] = to_completion(output.outputs[0])
                on_finish(i, completions[i])
        return [completions[i] for i in range(len(requests))]

    def sync(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the trainer's weights, and wake the engine if it sleeps.

        vLLM's own reload knows its packed layouts and keeps CUDA graphs valid. An exception in
        here leaves the engine unusable, so it ends the run. RuntimeError if a weight is missing
        or if the prefix cache was not reset."""
        if self.asleep:
            torch.cuda.empty_cache()  # else PyTorch keeps the memory that vLLM maps again
            self.llm.wake_up(tags=["weights"])
        names: list[str] = []
        self.llm.collective_rpc(reload_weights, args=(record_names(named_weights, names),))
        # vLLM does not notice a weight that is left out. The names are compared with those of the
        # first sync, and the parity gate guards the rest.
        if self.names is not None and names != self.names:
            changed = sorted(set(names) ^ set(self.names))
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
        """End the engine and the default process group. Nothing collective may follow."""
        self.llm.llm_engine.engine_core.shutdown()


def prepare_environment(on_gpu: bool) -> None:
    """Set what vLLM reads when it is imported. A variable that the user has set is kept."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: tensors go by reference
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if not on_gpu:
        # else all engines of a machine bind to the same cores
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def cache_size(kv_cache_gb: float, on_gpu: bool) -> dict[str, float]:
    """The size of the KV cache in bytes, so that vLLM profiles nothing.

    0 GB on a GPU means the rest of its memory: only eval.py, which has the GPU to itself, asks for
    that."""
    if on_gpu and not kv_cache_gb:
        return {"gpu_memory_utilization": 0.9}
    return {"kv_cache_memory_bytes": int((kv_cache_gb or 0.25) * 2**30)}


def record_names(
    named_weights: Iterable[tuple[str, Tensor]], names: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights. Their names are appended to `names`."""
    for name, tensor in named_weights:
        names.append(name)
        yield name, tensor


def reload_weights(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    """What vLLM's worker runs in `sync`."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):  # vLLM before 0.32 does not do it itself
        worker.model_runner.reload_weights(weights_iterator=weights)


def to_completion(output: Any) -> Completion:
    """A `Completion` from vLLM's `CompletionOutput`."""
    pairs = zip(output.logprobs, output.token_ids, strict=True)
    logprobs = [entry[token].logprob for entry, token in pairs]
    return Completion(list(output.token_ids), logprobs, finished=output.finish_reason == "stop")
