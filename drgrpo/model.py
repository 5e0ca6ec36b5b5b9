"""The policy: a Hugging Face causal LM run on packed sequences, its LM head fused with the loss,
sharded by FSDP2."""

import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)

from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss, linear_logprob
from drgrpo.types import Batch, UserError

ATTENTION = {"flash_attn": "flash_attention_2", "varlen": "drgrpo_varlen", "sdpa": "drgrpo_sdpa"}


def varlen_attention(module, query, key, value, attention_mask, scaling=None, **packing):
    """Causal attention inside each packed sequence by PyTorch's FlashAttention-2. CUDA, 16 bit.
    query [1, H, T, d], key and value [1, K, T, d] -> [1, T, H, d]."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    cu_seqlens, longest = packing["cu_seq_lens_q"], packing["max_length_q"]
    options = {"scale": scaling, "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch >= 2.13 wants to be told
        options["enable_gqa"] = True
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)[
        None
    ], None


def sdpa_attention(module, query, key, value, attention_mask, scaling=None, **packing):
    """The same anywhere and in any precision: pad on the right, where a causal mask hides it, and
    run SDPA. query [1, H, T, d], key and value [1, K, T, d] -> [1, T, H, d]."""
    cu_seqlens, longest = packing["cu_seq_lens_q"], packing["max_length_q"]
    length_S = cu_seqlens.diff()
    sequence_T = torch.repeat_interleave(torch.arange(len(length_S), device=query.device), length_S)
    slot_T = torch.arange(query.shape[2], device=query.device) - cu_seqlens[sequence_T]

    def pad(x):  # [1, H, T, d] -> [S, H, L, d]
        padded = x.new_zeros(len(length_S), longest, x.shape[1], x.shape[3])
        return padded.index_put((sequence_T, slot_T), x[0].transpose(0, 1)).transpose(1, 2)

    out_SHLd = F.scaled_dot_product_attention(
        pad(query),
        pad(key),
        pad(value),
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out_SHLd.transpose(1, 2)[sequence_T, slot_T][None], None


for _name, _function in (("drgrpo_varlen", varlen_attention), ("drgrpo_sdpa", sdpa_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(
        _name, lambda *args, **kwargs: None
    )  # isolation comes from cu_seqlens


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `auto` stands for here, or `name` if it can run here. UserError says what is
    missing."""
    half = dtype in (torch.float16, torch.bfloat16)
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if name == "auto":
        return (
            ("flash_attn" if has_flash else "varlen") if device.type == "cuda" and half else "sdpa"
        )
    if name != "sdpa" and not (device.type == "cuda" and half):
        raise UserError(
            f"--attention {name} needs CUDA and --dtype bfloat16, not {device.type} and {dtype}; use sdpa"
        )
    if name == "flash_attn" and not has_flash:
        raise UserError(
            "--attention flash_attn needs the package flash-attn; install it, or use --attention varlen"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What `Policy` optimizes: the arguments of `linear_drgrpo_loss` that are the same for every
    micro-batch."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    tis_cap: float | None = None
    temperature: float = 1.0
    kl_coef: float = 0.0


class Policy(nn.Module):
    """A causal LM on packed micro-batches. All work goes through `forward`, where FSDP2 gathers the
    root's parameters: embedding, final norm and LM head, tied or not."""

    def __init__(self, lm: nn.Module, kernel: str = "auto"):
        super().__init__()
        self.lm, self.kernel = lm, kernel

    def forward(
        self,
        batch: Batch,
        objective: Objective,
        old_logprob_N: Tensor | None = None,
        ref_logprob_N: Tensor | None = None,
        scale: float | None = None,
    ):
        """With `scale`: (loss, stats), the loss being scale * sum over tokens of the clipped
        objective (paper, Fig. 1); old_logprob_N=None means ratio 1, and ref_logprob_N is a
        reference model's, for a KL penalty. Without `scale`: (logprob_N, entropy_N), no
        gradient."""
        hidden_TD = self.lm.base_model(
            input_ids=batch.token_T[None],
            position_ids=batch.position_T[None],
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
        ).last_hidden_state[0]
        hidden_ND, weight_VD = hidden_TD[batch.row_N], self.lm.get_output_embeddings().weight
        if scale is None:
            return linear_logprob(
                hidden_ND,
                weight_VD,
                batch.target_N,
                temperature=objective.temperature,
                backend=self.kernel,
            )
        return linear_drgrpo_loss(
            hidden_ND,
            weight_VD,
            batch.target_N,
            batch.advantage_N,
            old_logprob=old_logprob_N,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            tis_cap=objective.tis_cap,
            sampler_logprob=batch.sampler_logprob_N if objective.tis_cap else None,
            temperature=objective.temperature,
            scale=scale,
            backend=self.kernel,
            ref_logprob=ref_logprob_N,
            kl_coef=objective.kl_coef if ref_logprob_N is not None else 0.0,
        )

    def named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name, whole, in `dtype`, one at a time: a collective
        under FSDP2, so that all ranks have to iterate. A tied `lm_head.weight` comes under its own
        name too: vLLM needs it."""
        for name, tensor in self.lm.state_dict().items():
            tensor = tensor.detach().to(
                dtype
            )  # cast first: half the bytes to gather, and FSDP2's own rounding
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_policy(
    path: str, *, dtype: torch.dtype, device: torch.device, attention: str = "auto", **how
) -> Policy:
    """The causal LM of a Hugging Face folder or hub name with float32 master weights, ready to
    train: `make_policy`.

    The checkpoint is read in its own type and widened block by block, so that a process holds 2
    bytes a parameter on the host, and on the device its shard and one whole block."""
    implementation = ATTENTION[resolve_attention(attention, device, dtype)]
    lm = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", attn_implementation=implementation
    )
    return make_policy(lm, dtype=dtype, device=device, **how)


def make_policy(
    lm: nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str = "auto",
    checkpointing: str = "none",
    compile: bool = False,
    dp_replicate: int = 1,
) -> Policy:
    """The policy of a causal LM on any device, its attention one of `ATTENTION`; the LM is used up.

    Sharded by FSDP2 over all processes if there are several, and wherever the compute type is not
    float32: FSDP2 is also what keeps the master weights apart from the bfloat16 ones.
    `dp_replicate` > 1 is HSDP: that many copies, each sharded over world / dp_replicate
    processes."""
    recompute_activations(lm, checkpointing)
    policy = Policy(lm, kernel).train()
    blocks = lm.base_model.layers
    if compile:
        for block in blocks:
            block.compile(dynamic=True)
    if dtype == torch.float32 and (not dist.is_initialized() or dist.get_world_size() == 1):
        return policy.float().to(device)
    mesh = device_mesh(device, dp_replicate)
    # inputs stay as they are: hidden states have the weights' type anyway, and advantages and
    # log-probs are float32
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block.float(), mesh=mesh, mp_policy=precision)
    fully_shard(policy.float(), mesh=mesh, mp_policy=precision)
    return policy.to(device)  # buffers


def device_mesh(device: torch.device, replicate: int) -> DeviceMesh:
    """All processes in one dimension, or replicate x shard: consecutive ranks, those of a node,
    share one copy."""
    world = dist.get_world_size()
    if world % replicate:
        raise UserError(f"--dp-replicate {replicate} does not divide the {world} processes")
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (replicate, world // replicate), mesh_dim_names=("replicate", "shard")
    )


def recompute_activations(lm: nn.Module, policy: str) -> None:
    """What the backward pass computes anew: nothing (none), all but matmul and attention outputs
    (selective), or everything inside a block (full)."""
    if policy == "none":
        return
    options = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_matmuls)
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


EXPENSIVE = {
    "aten.mm.default",
    "aten.addmm.default",
    "aten.bmm.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._flash_attention_forward.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "torch_attn._varlen_attn.default",
    "flash_attn._flash_attn_varlen_forward.default",
}
"""By name: not every version of torch, and no machine without flash-attn, has all of them."""


def keep_matmuls(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(op) in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def max_positions(path: str) -> int:
    """Longest sequence, prompt and response together, that the model at `path` was built for."""
    return AutoConfig.from_pretrained(path).max_position_embeddings
