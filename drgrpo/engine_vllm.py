"""vLLM inside the trainer's process: one engine per process under torchrun, weights handed over by
reference.

What each setting is for, and what goes wrong without it, stands beside it: most of these fail
silently.
"""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial

import torch
import torch._dynamo
from torch import Tensor

from drgrpo.types import Completion, OnFinish, Request, Sampling, UserError, no_callback


class VLLMEngine:
    """Samples through `vllm.LLM`. Build it after the process group: vLLM would make a group of size
    one its default."""

    name = "vllm"

    def __init__(
        self,
        path: str,
        tokenizer,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        max_tokens: int,
        kv_cache_gb: float,
        tp: int,
        sleep: bool,
    ):
        on_gpu = device.type == "cuda"
        prepare_environment(on_gpu)
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"--engine vllm needs vLLM ({error}): `make env` installs it, or use --engine torch"
            ) from error
        with torch.random.fork_rng(
            devices=[device] if on_gpu else []
        ):  # LLM() reseeds the global generators
            self.llm = LLM(
                model=path,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_tokens,
                max_num_seqs=batch,
                logprobs_mode="processed_logprobs",  # after the temperature; the default is before it
                generation_config="vllm",  # else the model's own top_p and top_k are applied without a word
                tensor_parallel_size=tp,
                enable_sleep_mode=sleep,
                enforce_eager=not on_gpu,
                seed=0,  # every request brings its own
                use_tqdm_on_load=False,
                # torchrun's processes, RANK and LOCAL_RANK from the environment; consecutive ranks
                # share an engine
                distributed_executor_backend="external_launcher" if on_gpu or tp > 1 else None,
                **({} if on_gpu else {"block_size": 32}),  # the CPU build's unit
                **cache_size(kv_cache_gb, on_gpu),
            )
        # on a CPU its log-prob helper would spend 10 s in a C++ compiler; the trainer's own
        # torch.compile is left alone
        self.uncompiled = (
            nullcontext if on_gpu else partial(torch._dynamo.config.patch, disable=True)
        )
        self.can_sleep, self.asleep, self.names = sleep, False, None

    def generate(
        self, requests: list[Request], sampling: Sampling, on_finish: OnFinish = no_callback
    ) -> list[Completion]:
        """One completion per request, in order; `on_finish(i, completion)` is called as request i
        finishes."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, completions = self.llm.llm_engine, {}
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
        while engine.has_unfinished_requests():
            with self.uncompiled():
                outputs = engine.step()
            for output in outputs:
                i = int(output.request_id)
                completions[i] = completion(output.outputs[0])
                on_finish(i, completions[i])
        return [completions[i] for i in range(len(requests))]

    def sync(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the trainer's weights through vLLM's own reload, which knows its packed layouts and
        keeps CUDA graphs valid.

        An exception in here leaves the engine unusable, so it ends the run. A weight that is left
        out would not be noticed by vLLM: the names are compared with those of the first sync, and
        the parity gate guards the rest."""
        names = []
        if self.asleep:
            torch.cuda.empty_cache()  # what training left in PyTorch's cache is vLLM's room
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc(reload_weights, args=(recorded(named_weights, names),))
        if self.names is not None and names != self.names:
            raise RuntimeError(
                f"weight sync sent other names than at first: {sorted(set(names) ^ set(self.names))}"
            )
        self.names = names
        if self.asleep:
            self.llm.wake_up(
                tags=["kv_cache"]
            )  # after the weights: the other way round samples garbage
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache: it would go on with keys and values of the old policy"
            )

    def sleep(self) -> None:
        """Give weights and cache back to the trainer; `sync` brings new weights, so the old ones
        are dropped (level 2)."""
        if self.can_sleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """Ends the engine, and with it the default process group: nothing collective may follow."""
        self.llm.llm_engine.engine_core.shutdown()


def prepare_environment(on_gpu: bool) -> None:
    """vLLM reads these when it is imported. What the user has set stays."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: tensors go by reference
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if not on_gpu:
        settings["VLLM_CPU_OMP_THREADS_BIND"] = (
            "nobind"  # else all engines of a machine bind to the same cores
        )
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def cache_size(kv_cache_gb: float, on_gpu: bool) -> dict:
    """Named where it can be, so that nothing is profiled; 0 is the rest of the GPU, which only
    eval.py has to itself."""
    if on_gpu and not kv_cache_gb:
        return {"gpu_memory_utilization": 0.9}
    return {"kv_cache_memory_bytes": int((kv_cache_gb or 0.25) * 2**30)}


def recorded(named_weights: Iterable[tuple[str, Tensor]], names: list[str]):
    """The same weights, their names noted in passing."""
    for name, tensor in named_weights:
        names.append(name)
        yield name, tensor


def reload_weights(worker, weights) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):  # vLLM before 0.32 does not do it itself
        worker.model_runner.reload_weights(weights_iterator=weights)


def completion(output) -> Completion:
    logprobs = [
        entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)
    ]
    return Completion(list(output.token_ids), logprobs, finished=output.finish_reason == "stop")
