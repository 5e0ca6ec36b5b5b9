"""The policy: a Hugging Face causal LM on packed sequences.

The LM head is fused with the loss. FSDP2 shards the weights over the processes.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from drgrpo.kernels.linear_drgrpo import LogitsDtype, linear_drgrpo_loss, linear_logprob
from drgrpo.lora import (
    NO_ADAPTER,
    Adapter,
    WithoutAdapter,
    add_adapter,
    merged_weights,
    target_layers,
)
from drgrpo.types import Batch, UserError

if TYPE_CHECKING:  # drgrpo.config imports the rehearsal, which needs this file
    from drgrpo.config import Config

# ---- attention inside each packed sequence

ATTENTION = {"flash_attn": "flash_attention_2", "varlen": "drgrpo_varlen", "sdpa": "drgrpo_sdpa"}
"""transformers' name of each backend. The last two are the functions below."""


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention by PyTorch's FlashAttention-2, on CUDA and in 16 bits.

    query [1, H, T, d], key and value [1, K, T, d] -> [1, T, H, d]."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    starts, longest = options["cu_seq_lens_q"], options["max_length_q"]
    settings: dict[str, Any] = {"scale": options.get("scaling"), "window_size": (-1, 0)}
    # Since 2.12, torch asks for this flag where heads share keys and values. 2.11 lacks the flag.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        settings["enable_gqa"] = True
    out_THd = varlen_attn(query, key, value, starts, starts, longest, longest, **settings)
    assert isinstance(out_THd, Tensor)  # no log-sum-exp was asked for
    return out_THd[None], None


def sdpa_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention by SDPA, on any device and in any precision.

    query [1, H, T, d], key and value [1, K, T, d] -> [1, T, H, d]."""
    cu_seqlens, longest = options["cu_seq_lens_q"], options["max_length_q"]
    length_S = cu_seqlens.diff()
    index_S, T = torch.arange(len(length_S), device=query.device), query.shape[2]
    # Without `output_size`, a GPU would wait to learn the sum.
    sequence_T = torch.repeat_interleave(index_S, length_S, output_size=T)
    slot_T = torch.arange(T, device=query.device) - cu_seqlens[sequence_T]

    # The padding stands on the right, where a causal mask hides it.
    def pad(x: Tensor) -> Tensor:  # [1, H, T, d] -> [S, H, L, d]
        padded = x.new_zeros(len(length_S), longest, x.shape[1], x.shape[3])
        return padded.index_put((sequence_T, slot_T), x[0].transpose(0, 1)).transpose(1, 2)

    shared_keys, scale = query.shape[1] != key.shape[1], options.get("scaling")
    out_SHLd = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), is_causal=True, scale=scale, enable_gqa=shared_keys
    )
    return out_SHLd.transpose(1, 2)[sequence_T, slot_T][None], None


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `auto` stands for here, or `name`. UserError if `name` cannot run here."""
    flash_runs = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    installed = is_flash_attn_2_available()  # FlashAttention-4 is a package of the same name
    if name == "auto" and flash_runs:
        return "flash_attn" if installed else "varlen"
    if name in ("auto", "sdpa"):
        return "sdpa"
    if not flash_runs:
        raise UserError(
            f"--attention {name} needs CUDA and 16 bits, not {device.type} and {dtype}; use sdpa"
        )
    if name == "flash_attn" and not installed:
        raise UserError(
            "--attention flash_attn needs the package flash-attn 2.3.3 or newer, and not "
            "flash-attn-4; install it, or use --attention varlen"
        )
    return name


def attention_implementation(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """transformers' name of the backend, which this call registers. UserError as above.

    Without a mask function of the same name transformers builds no mask. The backends separate the
    sequences by `cu_seq_lens_q`."""
    for key, function in (("drgrpo_varlen", varlen_attention), ("drgrpo_sdpa", sdpa_attention)):
        AttentionInterface.register(key, function)
    return ATTENTION[resolve_attention(name, device, dtype)]


# ---- the policy


@dataclass(frozen=True)
class Objective:
    """The arguments of `linear_drgrpo_loss` that are the same for every micro-batch."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    tis_cap: float | None = None
    temperature: float = 1.0
    kl_coef: float = 0.0
    logits_dtype: LogitsDtype = torch.float32
    detached: bool = False
    """CISPO: the clipped ratio is a constant weight, so that clipped tokens keep their gradient"""


def make_objective(config: "Config", device: torch.device) -> Objective:
    """The objective that `config` names, with its logits on this device."""
    dtype, detached = getattr(torch, config.dtype), config.algo == "cispo"
    logits = resolve_logits(config.logits, dtype, device)
    clip = config.clip_low, config.clip_high
    cap = None if config.masks_mismatch else config.tis_cap or None  # a mask is in the advantage
    return Objective(*clip, cap, config.temperature, config.kl_coef, logits, detached)


def resolve_logits(name: str, dtype: torch.dtype, device: torch.device) -> LogitsDtype:
    """`logits_dtype` of the fused head. `auto` is shifted where a GPU computes in 16 bits.

    Plain 16-bit logits would change log-probs by 0.03 nats, more than trainer and sampler differ
    by."""
    if name == "auto":
        name = "shifted" if device.type == "cuda" and dtype.itemsize == 2 else "float32"
    return "shifted" if name == "shifted" else torch.float32


class Policy(nn.Module):
    """A causal LM on packed micro-batches, with the objective that it is trained on.

    It has no `forward`. FSDP2 treats `loss` and `logprob` as forward passes: before either it
    gathers the root's parameters, which are the embedding, the final norm and the LM head."""

    scaler: GradScaler  # of the loss; it does nothing but in float16

    def __init__(
        self,
        lm: PreTrainedModel,
        objective: Objective,
        kernel: str = "auto",
        adapter: Adapter = NO_ADAPTER,
    ) -> None:
        super().__init__()
        self.lm, self.objective, self.kernel, self.adapter = lm, objective, kernel, adapter

    def loss(self, batch: Batch, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, stats) of a micro-batch, as `linear_drgrpo_loss` returns them.

        The loss is `scale` times the sum over tokens of the clipped objective (paper, Fig. 1).
        Without `batch.old_logprob_N` the ratio is 1. Without `batch.ref_logprob_N` there is no KL
        penalty."""
        hidden_ND, weight_VD = self._head_inputs(batch)
        objective, old_N, cap = self.objective, batch.old_logprob_N, self.objective.tis_cap
        behavior_N = batch.sampler_logprob_N if cap else None
        if objective.detached and old_N is not None:  # a ratio of 1, weighed by theirs
            old_N, behavior_N, cap = None, old_N, 1 + objective.clip_high
        loss, stats = linear_drgrpo_loss(
            hidden_ND,
            weight_VD,
            batch.target_N,
            batch.advantage_N,
            old_logprob=old_N,
            sampler_logprob=behavior_N,
            ref_logprob=batch.ref_logprob_N,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            tis_cap=cap,
            kl_coef=0.0 if batch.ref_logprob_N is None else objective.kl_coef,
            temperature=objective.temperature,
            scale=scale,
            logits_dtype=objective.logits_dtype,
            backend=self.kernel,
        )
        if objective.detached and batch.old_logprob_N is not None:
            log_ratio_N = stats["logprob"] - batch.old_logprob_N
            capped_N = (log_ratio_N > math.log1p(objective.clip_high)) & (batch.advantage_N != 0)
            stats |= {"log_ratio": log_ratio_N, "clipped": capped_N}
        return loss, stats

    @torch.no_grad()
    def logprob(self, batch: Batch) -> Tensor:
        """The log-probability of each response token after temperature, fp32 [N], no gradient."""
        hidden_ND, weight_VD = self._head_inputs(batch)
        logprob_N, _ = linear_logprob(
            hidden_ND,
            weight_VD,
            batch.target_N,
            temperature=self.objective.temperature,
            logits_dtype=self.objective.logits_dtype,
            backend=self.kernel,
        )
        return logprob_N

    def _head_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The LM head's two factors: hidden states of response tokens [N, D], weight [V, D]."""
        hidden_TD = self.lm.base_model(
            input_ids=batch.token_T[None],
            position_ids=batch.position_T[None],
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        ).last_hidden_state[0]
        return hidden_TD[batch.row_N], self.lm.get_output_embeddings().weight

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name, unsharded, in `dtype`, one at a time.

        An adapter is merged into the weights that it changes: see drgrpo/lora.py.

        Under FSDP2 this is a collective, so all ranks have to iterate. A tied `lm_head.weight`
        comes under its own name too, because vLLM needs it."""
        return merged_weights(self.lm.state_dict(), self.adapter, dtype)


Reference = Policy | WithoutAdapter | None
"""The initial policy, for a KL penalty. None without one."""


def load_policy(
    path: str,
    objective: Objective,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "auto",
    adapter: Adapter = NO_ADAPTER,
    **options: Any,
) -> Policy:
    """The policy of a Hugging Face folder or hub name. `options` are those of `make_policy`.

    The checkpoint is read in its own type, and each block becomes float32 just before it is
    sharded. So a process holds 2 bytes a parameter on the host, and on the device its shard and
    one unsharded block. UserError if `attention` cannot run here, if the model computes what a
    `Policy` does not, or if `adapter` does not fit it."""
    implementation = attention_implementation(attention, device, dtype)
    check_architecture(path)
    if adapter.rank:
        with torch.device("meta"):  # without weights, which take minutes to read
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        target_layers(empty, adapter)
    lm = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", attn_implementation=implementation
    )
    if adapter.rank:
        add_adapter(lm, adapter)
    return make_policy(lm, objective, dtype=dtype, device=device, adapter=adapter, **options)


PLAIN = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
}
"""Fields of a model's config, each with the value that changes nothing."""


def check_architecture(path: str) -> None:
    """UserError if the model at `path` computes what a `Policy` would leave out in silence.

    The attention functions attend to all earlier tokens. The fused head multiplies hidden states by
    the LM head's weight and does nothing else to the logits."""
    config = AutoConfig.from_pretrained(path).get_text_config()
    found = {name: getattr(config, name, None) for name in PLAIN}
    found = {name: value for name, value in found.items() if value not in (None, PLAIN[name])}
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - {"full_attention"}:
        found["layer_types"] = ", ".join(sorted(layers - {"full_attention"}))
    elif not layers and getattr(config, "sliding_window", None):
        found["sliding_window"] = config.sliding_window
    if found:
        fields = ", ".join(f"{name} {value}" for name, value in found.items())
        raise UserError(
            f"--model {path} has {fields} in its config, and packed training knows full attention "
            "and plain logits only; use another model, for example Qwen2.5, Qwen3 or Llama, or "
            "remove a sliding window that no sequence reaches from the config.json of a copy"
        )


def make_policy(
    lm: PreTrainedModel,
    objective: Objective,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str = "auto",
    checkpointing: str = "none",
    compile: bool = False,
    dp_replicate: int = 1,
    adapter: Adapter = NO_ADAPTER,
) -> Policy:
    """The policy of a causal LM that has one of the `ATTENTION` backends. The LM is used up, and it
    holds `adapter` already.

    Master weights are float32, and `dtype` is the type of the computation and of what an `adapter`
    freezes. FSDP2 shards the policy if there are several processes or if `dtype` is not float32: it
    is also what keeps the master weights apart from the 16-bit ones. `dp_replicate` > 1 is HSDP, so
    many copies, each sharded over world / dp_replicate processes. UserError if `dp_replicate` does
    not divide the world."""
    recompute_activations(lm, checkpointing)
    policy = Policy(lm, objective, kernel, adapter).train()
    policy.scaler = GradScaler(device.type, enabled=dtype == torch.float16)
    blocks = lm.base_model.layers
    if compile:
        for block in blocks:
            block.compile(dynamic=True)
    if dtype == torch.float32 and (not dist.is_initialized() or dist.get_world_size() == 1):
        return set_types(policy, dtype).to(device)
    mesh = device_mesh(device, dp_replicate)
    # Hidden states have the weights' type anyway. Advantages and log-probs must stay float32.
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(set_types(block, dtype), mesh=mesh, mp_policy=precision)
    fully_shard(set_types(policy, dtype), mesh=mesh, mp_policy=precision)
    for method in ("loss", "logprob"):
        register_fsdp_forward_method(policy, method)
    return policy.to(device)  # buffers


M = TypeVar("M", bound=nn.Module)


def set_types(module: M, dtype: torch.dtype) -> M:
    """The same module: trainable weights and buffers in float32, frozen weights in `dtype`.

    FSDP2 shards both in one group, because it asks only for one type of trainable weights."""

    def cast(tensor: Tensor) -> Tensor:
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        wanted = dtype if frozen else torch.float32
        return tensor.to(wanted) if tensor.is_floating_point() else tensor

    return module._apply(cast)  # as `module.float()`, with a type for each tensor


def device_mesh(device: torch.device, replicate: int) -> DeviceMesh:
    """All processes in one dimension, or replicate x shard.

    Consecutive ranks, those of a node, share one copy. UserError if `replicate` does not divide
    the number of processes."""
    world = dist.get_world_size()
    if world % replicate:
        raise UserError(f"--dp-replicate {replicate} does not divide the {world} processes")
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    shape = (replicate, world // replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


# ---- activation checkpointing

EXPENSIVE = {
    "aten.mm.default",
    "aten.addmm.default",
    "aten.bmm.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._flash_attention_forward.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "torch_attn._varlen_attn.default",
    "flash_attn._flash_attn_varlen_forward.default",
}
"""Ops whose outputs are kept. By name, because no version of torch has all of them."""


def recompute_activations(lm: PreTrainedModel, policy: str) -> None:
    """Set what the backward pass recomputes.

    none: nothing; selective: all but matmul and attention outputs; full: whole blocks."""
    if policy == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    options["preserve_rng_state"] = False  # there is no dropout
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_matmuls)
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def keep_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The decision for one op of a block, in the form that PyTorch asks for."""
    return CheckpointPolicy.MUST_SAVE if str(op) in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or hub name. UserError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise UserError(
            f"--model {path} cannot be loaded: {str(error).splitlines()[0]} Check the name and the "
            "network, or download the model and name its folder"
        ) from error


def max_positions(path: str) -> int:
    """The longest sequence, prompt and response together, that the model at `path` supports."""
    return AutoConfig.from_pretrained(path).max_position_embeddings
