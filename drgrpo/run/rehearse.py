"""A recipe at its real size, without a GPU, weights or network: `--rehearse 8xA100-80GB`.

The policy has its real shapes and fake tensors, which take no memory. FSDP2 shards it over a fake
process group. One process's fullest micro-batch runs forward and backward through the trainer's own
code, and PyTorch's memory trackers count what is allocated. What the ledger adds is Adam, vLLM and
CUDA.

Three things run otherwise than on a GPU. The LM head's products and its row pass are left out,
because both write into buffers that exist. Attention is always the varlen kernel's fake in 16 bits.
Autograd adds fake gradients into new memory, so that a tied embedding may count once too often.

Two things are not counted: what an operator allocates and frees inside itself, such as the
workspace of FlashAttention's backward pass, and what torch.compile saves.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, product
from types import MethodType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from drgrpo.kernels import linear_drgrpo as head
from drgrpo.lora import Adapter, add_adapter
from drgrpo.model import Policy, attention_implementation, device_mesh, make_objective, make_policy
from drgrpo.pack import Sequence, pack
from drgrpo.rollout import check_budget
from drgrpo.run.cards import Machine, known_sizes
from drgrpo.run.cli import flag
from drgrpo.run.memory import (
    GIB,
    Ledger,
    Sizes,
    draft_ledger,
    longest_prompt,
    longest_sequence,
    show,
)
from drgrpo.types import Batch, UserError

if TYPE_CHECKING:
    from drgrpo.config import Config

CPU = torch.device("cpu")
TRIES = 2  # rehearsals of a way out
LARGER = (1, 2, 4, 8)  # times as many GPUs

KINDS = {
    "Sharded Param": "master weights",
    "Parameter": "master weights",
    "Unsharded Param": "gathered weights",
    "All Gather": "gathered weights",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Reduce Scatter": "gradients",
    "Gradient": "gradients",
    "Activation": "activations",
    "Temp": "temporaries",
}
"""The trackers' names of memory, and ours."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """One process's part of an optimizer step.

    masters: GiB of master weights. at_head, peak: GiB of everything else, by kind, at the highest
    moment of the forward pass, which is the LM head, and of the whole step. weights: what the
    sampler gets, by name."""

    parameters: int
    sequences: int
    tokens: int
    responses: int
    masters: float
    at_head: Sizes
    peak: Sizes
    weights: dict[str, tuple[torch.Size, torch.dtype]]


def lm_config(model: str) -> PretrainedConfig:
    """The config of a model: of a recipe's without the hub, else of a folder or hub name."""
    if model == "tiny":
        from drgrpo.tiny.warmup import Warmup, build_tiny_model

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            build_tiny_model(Warmup(), folder)  # shows a progress bar
            return AutoConfig.from_pretrained(folder)
    if sizes := known_sizes(model):
        return AutoConfig.for_model(**sizes)
    try:
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        raise UserError(
            f"--model {model} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error


def fullest_batch(config: Config, prompt: int) -> Batch:
    """The largest micro-batch that the config can produce: the longest sequences, and one that
    fills the rest. A longer sequence than the micro-batch runs alone."""

    def sequence(tokens: int) -> Sequence:
        response = min(tokens - 1, config.max_new_tokens)
        ids, logprobs = [1] * response, [-1.0] * response
        return Sequence([1] * (tokens - response), ids, logprobs, advantage=1.0)

    longest = prompt + config.max_new_tokens
    count, rest = divmod(config.tokens_per_microbatch, longest)
    sequences = [sequence(longest)] * max(count, 1)
    if count and rest > 1:
        sequences.append(sequence(rest))
    batch = pack(sequences)
    if config.old_logprob != "none":
        batch.old_logprob_N = batch.sampler_logprob_N
    batch.ref_logprob_N = batch.sampler_logprob_N if config.kl_coef else None
    return batch


@contextmanager
def head_of_a_gpu(gpu_bytes: int | None = None) -> Iterator[list[int]]:
    """The fused head as on a GPU of this memory, on fake tensors: its chunks have a GPU's size, and
    only its own buffers are allocated. Yields the bytes of each chunk's logits as they come."""
    sizes = head.sizes_on(torch.device("cuda"), gpu_bytes)
    logits: list[int] = []

    def rows(z: Tensor, V: int, *rest: Any) -> Tensor:
        logits.append(z.untyped_storage().nbytes())
        return z[:, :V]

    def write_in_place(*args: Any, **options: Any) -> None:
        """A product whose result has its memory."""

    replaced: dict[str, Any] = {
        "sizes_on": lambda device: sizes,
        "_rows_torch": rows,
        "_matmul": write_in_place,
    }
    with mock.patch.multiple(head, **replaced):
        yield logits


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """A process group in which this process is rank 0 and there are no others."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def meta_model(config: Config, lm: PretrainedConfig) -> PreTrainedModel:
    """The model with the attention that it has on a GPU, and with sizes for weights."""
    dtype, attention = getattr(torch, config.dtype), config.attention
    if attention in ("auto", "flash_attn") and dtype != torch.float32:
        attention = "varlen"  # the same sizes, and no package
    implementation = attention_implementation(attention, torch.device("cuda"), dtype)
    # A cast of fake weights would untie an embedding that is the LM head too.
    dtype = dtype if config.lora_rank else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            lm, attn_implementation=implementation, dtype=dtype
        )
    if config.lora_rank:
        add_adapter(model, adapter_of(config))
    return model


def adapter_of(config: Config) -> Adapter:
    return Adapter(config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)


def build_policy(config: Config, model: PreTrainedModel) -> Policy:
    """The policy as `load_policies` of train.py makes it. Under a `FakeTensorMode` its weights
    become fake."""
    with mock.patch("drgrpo.model.device_mesh", real_mesh):
        return make_policy(
            model,
            make_objective(config, torch.device("cuda")),
            dtype=getattr(torch, config.dtype),
            device=CPU,
            kernel="torch",
            checkpointing=config.checkpointing,
            dp_replicate=config.dp_replicate,
            adapter=adapter_of(config),
        )


def real_mesh(device: torch.device, replicate: int) -> DeviceMesh:
    """The mesh of the processes. It holds real ranks, also while other tensors are fake."""
    with unset_fake_temporarily():
        return device_mesh(device, replicate)


def rehearse_training(
    config: Config, lm: PretrainedConfig, processes: int, gpu_bytes: int | None = None
) -> Rehearsal:
    """The last micro-batch of an optimizer step, clipping, and the weights for the sampler, on
    process 0 of `processes`."""
    batch, model = fullest_batch(config, longest_prompt(config, lm)), meta_model(config, lm)
    with fake_processes(processes), FakeTensorMode(allow_non_fake_inputs=True):
        policy = build_policy(config, model)
        tracker = FSDPMemTracker(policy) if isinstance(policy, FSDPModule) else MemTracker()
        # The trackers watch calls of a module, and `loss` is a forward pass by another name.
        policy.forward = MethodType(Policy.loss, policy)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        for parameter in trained:  # gradients of the micro-batches before this one
            parameter.grad = torch.zeros_like(parameter)
        with head_of_a_gpu(gpu_bytes) as logits, tracker:
            loss, _ = policy(batch, scale=1.0)
            at_head = tracker.get_tracker_snapshot("peak")[CPU]
            loss.backward()
            peak = tracker.get_tracker_snapshot("peak")[CPU]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        policy.zero_grad()
        named = policy.named_weights(getattr(torch, config.dtype))
        weights = {name: (tensor.shape, tensor.dtype) for name, tensor in named}
    kinds_at_head = by_kind(at_head, max(logits))
    kinds = by_kind(peak, max(logits) if peak == at_head else 0)
    kinds_at_head.pop("master weights")
    return Rehearsal(
        parameters=policy.lm.num_parameters(),
        sequences=len(batch.cu_seqlens) - 1,
        tokens=len(batch.token_T),
        responses=len(batch.target_N),
        masters=kinds.pop("master weights"),
        at_head=kinds_at_head,
        peak=kinds,
        weights=weights,
    )


def by_kind(snapshot: dict[Any, int], logits: int) -> Sizes:
    """A tracker's snapshot in GiB by our kinds. The tracker counts logits among activations."""
    kinds = dict.fromkeys([*KINDS.values(), "logits"], 0.0)
    for name, size in snapshot.items():
        if name != "Total":
            kinds[KINDS.get(name.value, "activations")] += size / GIB
    kinds["activations"] -= logits / GIB
    kinds["logits"] += logits / GIB
    return kinds


# ---- does it fit, and what would?


def rehearse(config: Config, machine: Machine) -> int:
    """Rehearse a run and print what it needs. Returns the exit status: 0 if it fits, else 2.

    A way out is printed only if its own rehearsal fits."""
    lm = lm_config(config.model)
    check_budget(config.max_new_tokens, lm.max_position_embeddings)
    rehearsal, ledger = rehearsed_ledger(config, lm, machine)
    print(report(config, machine, rehearsal, ledger))
    print(f"{config.recipe} on {machine}: {verdict(ledger)}")
    if ledger.fits:
        return 0
    for flags, changed, other in islice(ways_out(config, lm, rehearsal.parameters, machine), TRIES):
        _, ledger = rehearsed_ledger(changed, lm, other)
        if ledger.fits:
            print(f"{config.recipe} on {other}{flags}: {verdict(ledger)}")
            return 2
    print(f"no flags make it fit, and {LARGER[-1]} times as many GPUs do not either")
    return 2


def rehearsed_ledger(
    config: Config, lm: PretrainedConfig, machine: Machine
) -> tuple[Rehearsal, Ledger]:
    """A rehearsal, and the ledger with what it found in the place of the formula."""
    rehearsal = rehearse_training(config, lm, machine.count, machine.gpu_bytes)
    return rehearsal, ledger_on(config, lm, rehearsal.parameters, machine, rehearsal.peak)


def ledger_on(
    config: Config,
    lm: PretrainedConfig,
    parameters: int,
    machine: Machine,
    training: Sizes | None = None,
) -> Ledger:
    """`draft_ledger` on a machine."""
    prompt, count = longest_prompt(config, lm), machine.count
    return draft_ledger(config, lm, parameters, prompt, count, machine.gpu_bytes, training)


def ways_out(
    config: Config, lm: PretrainedConfig, parameters: int, machine: Machine
) -> Iterator[tuple[str, Config, Machine]]:
    """(flags, changed config, machine) that fit by the ledger's formula, the cheapest first.

    The flags are those that changed, each after a space."""
    for larger, *values in product(LARGER, *(alternatives(config, lm).values())):
        pairs = zip(alternatives(config, lm), values, strict=True)
        changes = {name: value for name, value in pairs if value != getattr(config, name)}
        changed = replace(config, **changes)
        other = replace(machine, count=machine.count * larger)
        tp = changed.tp or 1
        divides = other.count % tp == 0 == lm.num_attention_heads % tp
        if divides and ledger_on(changed, lm, parameters, other).fits:
            flags = [f" --{flag(name)} {value}" for name, value in changes.items()]
            yield "".join(flags), changed, other


def alternatives(config: Config, lm: PretrainedConfig) -> dict[str, list[Any]]:
    """Values of the flags that decide about memory. Those that cost the least come last, and each
    list begins with the config's own."""
    tokens, longest = [config.tokens_per_microbatch], longest_sequence(config, lm)
    while tokens[-1] > longest:
        tokens.append(tokens[-1] // 2)
    lists: dict[str, list[Any]] = {
        "tp": [config.tp, 2, 4, 8],
        "tokens_per_microbatch": tokens,
        "checkpointing": [config.checkpointing, "full"],
        "dp_replicate": [config.dp_replicate, 1],
        "sleep": [config.sleep, "auto"],
        "kv_cache_gb": [config.kv_cache_gb, 0.0],
    }
    return {name: list(dict.fromkeys(values)) for name, values in lists.items()}


def verdict(ledger: Ledger) -> str:
    """One line."""
    training, sampling = ledger.peaks.values()
    fits, habit = "fits" if ledger.fits else "does not fit", "sleeps" if ledger.sleep else "stays"
    return (
        f"{fits}, training {training:.1f} and sampling {sampling:.1f} of {ledger.usable:.1f} GiB, "
        f"vLLM {habit} with a cache of {ledger.kv_cache:.1f} GiB"
    )


def report(config: Config, machine: Machine, rehearsal: Rehearsal, ledger: Ledger) -> str:
    """What a process holds, by phase and kind."""
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in rehearsal.weights.values()]
    shards = machine.count // config.dp_replicate
    phases = {
        "always": ledger.kept,
        "training, LM head": rehearsal.at_head,
        "training, peak": ledger.training,
        "vLLM": ledger.sampler,
        "sampling": ledger.sampling,
    }
    lines = [
        f"rehearsal of {config.recipe}: {config.model}, {rehearsal.parameters / 1e9:.2f} B "
        f"parameters sharded over {shards} processes, checkpointing {config.checkpointing}",
        f"fullest micro-batch: {rehearsal.sequences} sequences, {rehearsal.tokens:,} tokens, "
        f"{rehearsal.responses:,} of them responses",
        f"to the sampler: {len(sizes)} weights, {sum(sizes) / GIB:.2f} GiB in {config.dtype}, the "
        f"largest {max(sizes) / GIB:.2f}",
        f"GiB per process, of {ledger.gpu:.1f} on the card, {ledger.usable:.1f} of them usable:",
    ]
    return "\n".join(lines + [f"  {name:18}{show(phase)}" for name, phase in phases.items()])
