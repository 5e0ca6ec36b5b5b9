"""LM head + Dr. GRPO loss in one pass, gradients included; the [T, V] logits never exist.

    z_t   = W x_t / temperature                    logits of token t                        [V]
    logp  = z[target] - logsumexp(z)               entropy H = logsumexp(z) - sum_j p_j z_j
    rho   = exp(logp - old)                        old = detached logp when strictly on-policy
    w     = min(exp(old - sampler), tis_cap)       truncated importance weight, a constant  (1 without tis_cap)
    loss  = scale * sum_t [ -w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef
    KL(logp, ref) ]

Backward, with p = softmax(z) and e the one-hot target:

    g     = scale * ( -w A rho [rho A <= clip(rho) A] + kl_coef dKL/dlogp )                 d loss / d logp
    dz    = g / temperature * (e - p)
    dx    = dz W            dW = sum_t dz_t x_t^T

The loss is one number, so its gradient is known up to the incoming scalar as soon as the logits
are: it is computed in the forward pass, chunk by chunk, and the backward pass only multiplies by
that scalar, on the device. Per chunk of C tokens:

    1. Z = X W^T           cuBLAS
    2. one Triton program a row: online softmax -> logp, entropy, ratio, clip, loss, g; second sweep
    overwrites Z with dZ
    3. dX = dZ W           cuBLAS
    4. dW += dZ^T X        cuBLAS, accumulated in fp32

Cost, for T = 16384, D = 3584, V = 152064 in bf16:

    FLOPs   6 T V D = 54 TFLOP, three GEMMs; recomputing the logits in the backward pass would make it four.
    bytes   the row pass reads a logit twice and writes it once, 6 T V = 15 GB; the second read can hit the cache.
    memory  logits 2 C V = 1.25 GB at C = 4096, dW 4 V D = 2.2 GB, dX 2 T D = 0.1 GB. The naive path
    keeps 6 T V = 15 GB.

Logits are bf16 where the policy is on its own and fp32 where its log-probs are compared with
others' (`logits_dtype`): a bf16 logit of 25 is off by up to 0.06 nats. That costs 2 C V bytes more;
dZ is 16 bit all the same, in the upper half of its row. Shapes: T tokens, D model width, V
vocabulary, C tokens of a chunk. No atomics, no host sync, the same bits every time; NaN surfaces.
Left out on purpose: a bias (the Qwen and Llama heads have none), label smoothing, ratios of whole
sequences (they need every log-prob of the sequence before the first gradient), tensor-parallel
vocabularies.

The per-lane online softmax descends from Milakov & Gimelshein (arXiv 1805.02867); gradients in the
forward pass of a fused head were popularized by Liger (https://github.com/linkedin/Liger-Kernel).

    pytest tests/test_linear_drgrpo.py      python -m bench.static_report      python -m bench.bench_linear_drgrpo
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # no Triton wheel for this platform: backend="torch" does everything
    triton, tl, constexpr = None, None, int

IGNORE = -100
"""A target with this value is no token: its outputs are 0 and it has no gradient."""

STATS = ("logprob", "entropy", "log_ratio", "tis_weight", "token_loss", "kl")
"""The fp32 rows that the row pass writes, in this order; "kl" only where a reference is given."""

CHUNK_LOGITS = {"cuda": 4096 * 152_064, "cpu": 512 * 1024}
"""Logits of one chunk. GPU: 1.25 GB in bf16, where rereading W and dW per chunk costs a few
percent. CPU: stays in cache."""


def linear_logprob_ref(
    hidden, weight, target, *, temperature=1.0, chunk_tokens=None, logits_dtype=None, backend="auto"
) -> tuple[Tensor, Tensor]:
    """What `linear_logprob` means; differentiable. Arguments that say how and not what are ignored.
    fp64 in, fp64 out."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logp_TV = torch.log_softmax(hidden.to(dtype) @ weight.to(dtype).T / temperature, dim=-1)
    target, V = target.long(), weight.shape[0]
    logprob_T = logp_TV.gather(1, target.clamp(0, V - 1)[:, None])[:, 0]
    logprob_T = logprob_T.masked_fill((target < 0) | (target >= V), math.nan).masked_fill(
        target == IGNORE, 0.0
    )
    entropy_T = torch.special.entr(logp_TV.exp()).sum(-1).masked_fill(target == IGNORE, 0.0)
    return logprob_T, entropy_T


def linear_drgrpo_loss_ref(
    hidden,
    weight,
    target,
    advantage,
    *,
    old_logprob=None,
    sampler_logprob=None,
    clip_low=0.2,
    clip_high=0.2,
    tis_cap=None,
    temperature=1.0,
    scale=1.0,
    chunk_tokens=None,
    logits_dtype=None,
    backend="auto",
    ref_logprob=None,
    kl_coef=0.0,
    kl="k3",
    main_grad=None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `linear_drgrpo_loss` means, with autograd's gradients. fp64 in, fp64 out."""
    if main_grad is not None:
        weight = weight.detach().requires_grad_()
        weight.register_hook(lambda dweight: main_grad.add_(dweight))
    logprob, entropy = linear_logprob_ref(hidden, weight, target, temperature=temperature)
    old = logprob.detach() if old_logprob is None else old_logprob
    active = (advantage != 0) & (
        target != IGNORE
    )  # where A = 0 the loss is 0, also if the ratio overflows
    log_ratio = torch.where(target != IGNORE, logprob - old, 0.0)
    ratio = torch.where(active, log_ratio, 0.0).exp()
    surrogate, bounded = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    tis_weight = (
        torch.ones_like(ratio)
        if tis_cap is None
        else (old - sampler_logprob).exp().clamp(max=tis_cap)
    )
    token_loss = torch.where(active, -tis_weight * torch.minimum(surrogate, bounded), 0.0)
    stats = {
        "logprob": logprob,
        "entropy": entropy,
        "log_ratio": log_ratio,
        "tis_weight": tis_weight,
    }
    if ref_logprob is not None:
        delta = ref_logprob - logprob
        penalty = {"k1": -delta, "k3": delta.exp() - 1 - delta}[kl].masked_fill(
            target == IGNORE, 0.0
        )
        token_loss = token_loss + (kl_coef * penalty if kl_coef else 0.0)
        stats["kl"] = penalty
    stats["token_loss"] = token_loss
    stats["clipped"] = torch.where(active & (surrogate > bounded), advantage.sign(), 0).to(
        torch.int8
    )
    return scale * token_loss.sum(), {name: stat.detach() for name, stat in stats.items()}


def _jit(**options):
    """`triton.jit(**options)` where Triton exists."""
    return triton.jit(**options) if triton else lambda function: None


# Sizes of a row program: wide enough that loads in flight cover the memory latency with one program
# on an SM, whose row then is still in the L2 cache when the second sweep reads it again. Predicted,
# see bench/static_report.py.
BLOCK_V, NUM_WARPS = 8192, 32


class Sizes(NamedTuple):
    """What depends on the card, not on the result."""

    block_v: int  # logits that a row program takes at a time
    num_warps: int
    chunk_logits: int  # of one chunk


TUNED: dict[tuple[int, int], Sizes] = {}
"""Compute capability -> sizes that beat the ones above on such a card (`make gpu` sweeps them and
prints its entry). Empty: every architecture runs on the predicted sizes, none of them measured
yet."""


def sizes_of(capability: tuple[int, int]) -> Sizes:
    """What a CUDA card of this compute capability runs with."""
    return TUNED.get(capability, Sizes(BLOCK_V, NUM_WARPS, CHUNK_LOGITS["cuda"]))


def _sizes(device):
    if device.type == "cuda" and torch.cuda.is_available():
        return sizes_of(torch.cuda.get_device_capability(device))
    return Sizes(BLOCK_V, NUM_WARPS, CHUNK_LOGITS["cuda" if device.type == "cuda" else "cpu"])


_LOWEST = (
    -1e30
)  # starts the running maximum: finite, so that no difference is inf - inf and no product 0 * inf
_LOG2E = 1.4426950408889634


@_jit()
def _online_softmax(z, m_i, l_i, t_i, k):
    """Takes z into each lane's own running m = max z, l = sum 2^((z-m)k), t = sum 2^((z-m)k) (z-m).
    One ex2, no reduction: either the old sums or the new term keep their scale, so 2^(-|z-m|k)
    serves both. A NaN stays in l and t."""
    z = tl.where(z < -1e30, -1e30, z)
    d = z - m_i
    e = tl.exp2(tl.abs(d) * -k)
    rises = d > 0
    t_i = tl.where(rises, (t_i - d * l_i) * e, t_i + d * e)
    l_i = tl.where(rises, l_i * e + 1.0, l_i + e)
    return tl.where(rises, z, m_i), l_i, t_i


@_jit()
def _dlogits(z, hit, m, log2_l, k, g):
    """g (e - p), in fp32 until it is stored."""
    p = tl.exp2((z - m) * k - log2_l)
    return tl.where(hit, p - 1.0, p) * -g


# Per-token addresses and the number of tokens change from call to call and are not worth another
# compilation.
@_jit(
    do_not_specialize=["stride_stat"],
    do_not_specialize_on_alignment=[
        "target_ptr",
        "advantage_ptr",
        "old_ptr",
        "sampler_ptr",
        "ref_ptr",
        "stat_ptr",
        "clipped_ptr",
    ],
)
def _drgrpo_row_kernel(
    z_ptr,  # [C, V] logits before temperature
    dz_ptr,  # [C, V] their gradient: z itself, or the upper half of each fp32 row of z
    target_ptr,  # [C]
    advantage_ptr,  # [C] fp32, like the three that follow
    old_ptr,
    sampler_ptr,
    ref_ptr,
    stat_ptr,  # [len(STATS), T] fp32 out, at the chunk's first token
    clipped_ptr,  # [C] int8 out
    V,
    stride_z,
    stride_dz,
    stride_stat,
    k,  # log2(e) / temperature: exp(x / temperature) = 2^(x k)
    ratio_low,
    ratio_high,
    tis_cap,
    kl_coef,
    grad_scale,  # scale / temperature
    LOSS: constexpr,  # else log-prob and entropy only
    GRAD: constexpr,
    HAS_OLD: constexpr,
    HAS_SAMPLER: constexpr,
    KL: constexpr,  # 0: none, 1: k1, 3: k3
    SHARED_ROW: constexpr,  # dz and z are different elements of the same memory
    BLOCK_V: constexpr,
):
    # This program owns one token: its row of logits and everything known about the token.
    row = tl.program_id(0).to(tl.int64)  # C * V passes 2^31
    z_ptr += row * stride_z
    lanes = tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + row)
    ignored = target == -100
    full = tl.where(ignored, 0, V) // BLOCK_V * BLOCK_V  # of an ignored row one block is read
    tail = full + lanes  # [BLOCK_V]
    in_tail = tail < V
    z_target = tl.load(z_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(
        tl.float32
    )

    # First sweep, ascending. Unrolled, the running values change registers by name: 13 instructions
    # an element, not 16.
    m_i = tl.full([BLOCK_V], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_V], tl.float32)
    t_i = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, full, BLOCK_V, loop_unroll_factor=2):
        z = tl.load(z_ptr + start + lanes, eviction_policy="evict_last").to(tl.float32)
        m_i, l_i, t_i = _online_softmax(z, m_i, l_i, t_i, k)
    z = tl.load(z_ptr + tail, mask=in_tail, other=float("-inf"), eviction_policy="evict_last").to(
        tl.float32
    )
    m_i, l_i, t_i = _online_softmax(z, m_i, l_i, t_i, k)

    m = tl.max(m_i, 0)
    m = tl.where(m > -1e30, m, float("nan"))  # every logit is -inf: NaN, as in torch
    c = tl.exp2((m_i - m) * k)
    l = tl.sum(l_i * c, 0)
    t = tl.sum((t_i + (m_i - m) * l_i) * c, 0)
    log2_l = tl.log2(l)
    logprob = ((z_target - m) * k - log2_l) * 0.6931471805599453
    tl.store(stat_ptr + row, tl.where(ignored, 0.0, logprob))
    tl.store(
        stat_ptr + stride_stat + row,
        tl.where(ignored, 0.0, (log2_l - t * k / l) * 0.6931471805599453),
    )

    if LOSS:
        advantage = tl.where(ignored, 0.0, tl.load(advantage_ptr + row))
        old = logprob
        if HAS_OLD:
            old = tl.load(old_ptr + row)
        log_ratio = tl.where(ignored, 0.0, logprob - old)
        ratio = tl.exp(log_ratio)
        # where() in place of min, max and clamp: those drop a NaN.
        bounded = tl.where(
            ratio < ratio_low, ratio_low, tl.where(ratio > ratio_high, ratio_high, ratio)
        )
        surrogate = ratio * advantage
        cut = surrogate > bounded * advantage
        tis_weight = 1.0
        if HAS_SAMPLER:
            tis_weight = tl.exp(old - tl.load(sampler_ptr + row))
            tis_weight = tl.where(tis_weight > tis_cap, tis_cap, tis_weight)
        active = advantage != 0  # else 0, also where the ratio overflows
        loss = tl.where(active, -tis_weight * tl.where(cut, bounded * advantage, surrogate), 0.0)
        g = tl.where(active & (cut == 0), -tis_weight * surrogate, 0.0)  # d loss / d logprob
        if KL:
            delta = tl.load(ref_ptr + row) - logprob
            penalty = -delta
            slope = 1.0
            if KL == 3:
                penalty += tl.exp(delta) - 1.0
                slope -= tl.exp(delta)
            penalty = tl.where(ignored, 0.0, penalty)
            penalized = (kl_coef != 0) & (
                ignored == 0
            )  # kl_coef = 0 watches the KL, also where it overflows
            loss += tl.where(penalized, kl_coef * penalty, 0.0)
            g += tl.where(penalized, kl_coef * slope, 0.0)
            tl.store(stat_ptr + 5 * stride_stat + row, penalty)
        tl.store(stat_ptr + 2 * stride_stat + row, log_ratio)
        tl.store(stat_ptr + 3 * stride_stat + row, tis_weight)
        tl.store(stat_ptr + 4 * stride_stat + row, loss)
        tl.store(clipped_ptr + row, tl.where(cut, tl.where(advantage > 0, 1, -1), 0).to(tl.int8))

        if GRAD:
            # Second sweep, descending: the logits read last are the likeliest to be in the cache
            # still.
            g *= grad_scale
            dz_ptr += row * stride_dz
            target = target.to(
                tl.int32
            )  # compared with every element; one that does not fit has made g NaN already
            full = V // BLOCK_V * BLOCK_V
            tail = full + lanes
            in_tail = tail < V
            dtype = dz_ptr.dtype.element_ty
            if g == 0:  # an ignored, clipped or zero-advantage token: nothing to read
                zeros = tl.zeros([BLOCK_V], dtype)
                for start in range(0, full, BLOCK_V):
                    tl.store(dz_ptr + start + lanes, zeros)
                tl.store(dz_ptr + tail, zeros, mask=in_tail)
            else:
                z = tl.load(z_ptr + tail, mask=in_tail, other=0.0).to(tl.float32)
                if SHARED_ROW:  # what is written here was read by every warp, and lies above all that is still to be read
                    tl.debug_barrier()
                tl.store(
                    dz_ptr + tail,
                    _dlogits(z, tail == target, m, log2_l, k, g).to(dtype),
                    mask=in_tail,
                )
                for i in range(0, full, BLOCK_V):
                    offs = full - BLOCK_V - i + lanes  # [BLOCK_V]
                    z = tl.load(z_ptr + offs, eviction_policy="evict_first").to(tl.float32)
                    if SHARED_ROW:
                        tl.debug_barrier()
                    tl.store(dz_ptr + offs, _dlogits(z, offs == target, m, log2_l, k, g).to(dtype))


def _rows_triton(z, V, target, tokens, o, stat, clipped, grad_dtype):
    """The row pass over one chunk. Fills the columns of `stat` and `clipped`; returns dZ in
    `grad_dtype`, None without."""
    dz = z if grad_dtype in (None, z.dtype) else z.view(grad_dtype)[:, z.shape[1] :]
    advantage, old, sampler, ref = tokens
    sizes = _sizes(z.device)
    with torch.cuda.device_of(z):
        _drgrpo_row_kernel[(len(z),)](
            z,
            dz,
            target,
            advantage,
            old,
            sampler,
            ref,
            stat,
            clipped,
            V,
            z.stride(0),
            dz.stride(0),
            stat.stride(0),
            _LOG2E / o.temperature,
            1.0 - o.clip_low,
            1.0 + o.clip_high,
            o.tis_cap,
            o.kl_coef,
            o.scale / o.temperature,
            LOSS=advantage is not None,
            GRAD=grad_dtype is not None,
            HAS_OLD=old is not None,
            HAS_SAMPLER=sampler is not None,
            KL=0 if ref is None else int(o.kl[1]),
            SHARED_ROW=dz.dtype != z.dtype,
            BLOCK_V=sizes.block_v,
            num_warps=sizes.num_warps,
        )
    return dz[:, :V]


def _rows_torch(z, V, target, tokens, o, stat, clipped, grad_dtype):
    """`_rows_triton` in torch operations, in place wherever the logits are fp32."""
    u = z.float()
    if o.temperature != 1.0:
        u.div_(o.temperature)
    ignored, valid = target == IGNORE, (target >= 0) & (target < V)
    index = torch.where(valid, target, 0).long()[:, None]
    u.sub_(u.amax(1, keepdim=True))
    u_target = u.gather(1, index)[:, 0]
    p = u.softmax(1)
    log_l = -p.amax(1).log()  # the largest p is 1 / l
    logprob = torch.where(valid, u_target - log_l, math.nan).masked_fill_(ignored, 0.0)
    stat[0] = logprob
    u.clamp_(min=_LOWEST)  # not -inf: its term p u is 0 * u
    stat[1] = (log_l - u.mul_(p).sum(1)).masked_fill_(ignored, 0.0)
    if tokens[0] is None:
        return None
    g = _token_loss(logprob, ignored, tokens, o, stat, clipped)
    if grad_dtype is None:
        return None
    g *= o.scale / o.temperature
    dz = p.mul_(-g[:, None]).scatter_add_(1, index, g[:, None])
    dz.index_fill_(0, (g == 0).nonzero()[:, 0], 0.0)  # 0 * NaN, in a row that has nothing to say
    return dz.to(grad_dtype)


def _token_loss(logprob, ignored, tokens, o, stat, clipped):
    """Fills the rows of `stat` from log_ratio on; returns d loss / d logprob [C]."""
    advantage, old, sampler, ref = tokens
    advantage = advantage.masked_fill(ignored, 0.0)
    old = logprob if old is None else old
    log_ratio = (logprob - old).masked_fill_(ignored, 0.0)
    ratio = log_ratio.exp()
    surrogate, bounded = ratio * advantage, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantage
    cut, active = (
        surrogate > bounded,
        advantage != 0,
    )  # without advantage the loss is 0, also if the ratio overflows
    tis_weight = (
        torch.ones_like(ratio) if sampler is None else (old - sampler).exp_().clamp_(max=o.tis_cap)
    )
    loss = torch.where(active, -tis_weight * torch.where(cut, bounded, surrogate), 0.0)
    g = torch.where(active & ~cut, -tis_weight * surrogate, 0.0)
    if ref is not None:
        delta = ref - logprob
        penalty, slope = (
            (-delta, torch.ones_like(delta))
            if o.kl == "k1"
            else (delta.expm1() - delta, -delta.expm1())
        )
        stat[5] = penalty.masked_fill_(ignored, 0.0)
        if o.kl_coef != 0:
            loss += o.kl_coef * penalty
            g += (o.kl_coef * slope).masked_fill_(ignored, 0.0)
    stat[2], stat[3], stat[4] = log_ratio, tis_weight, loss
    clipped.copy_(torch.where(cut, advantage.sign(), 0.0))
    return g


def _matmul(a, b, out, accumulate=False, alpha=1.0):
    """out (+)= alpha a b, accumulated in fp32 and rounded once to out's dtype; never a copy of out.
    Calls with out= take no part in autocast, which has done its work before they come."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=float(accumulate), alpha=alpha, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=float(accumulate), alpha=alpha, out=out)
    else:  # the CPU build has no GEMM with another output type
        torch.addmm(out, a.float(), b.float(), beta=float(accumulate), alpha=alpha, out=out)


class _Objective(NamedTuple):
    """The numbers of the loss that a row needs."""

    clip_low: float = 0.0
    clip_high: float = 0.0
    tis_cap: float = 0.0
    temperature: float = 1.0
    scale: float = 1.0  # of the gradient; the loss itself is scaled after its sum
    kl_coef: float = 0.0
    kl: str = "k3"


def _head(
    hidden,
    weight,
    target,
    tokens,
    o,
    stat,
    clipped,
    dhidden,
    dweight,
    accumulate,
    alpha,
    chunk,
    dtype,
    backend,
):
    """Fills every tensor after `o`; gradients that are None are not computed."""
    T, V = len(hidden), len(weight)
    target, tokens = target.contiguous(), [x if x is None else x.contiguous() for x in tokens]
    stride = (
        V if backend == "torch" else (V + 15) // 16 * 16
    )  # rows aligned for 128-bit loads, whatever V is
    buffer_CV = hidden.new_empty(min(chunk, T), stride, dtype=dtype)
    grad_dtype = None if dhidden is None and dweight is None else hidden.dtype
    rows = _rows_triton if backend == "triton" else _rows_torch
    for start in range(0, T, chunk):
        part = slice(start, min(start + chunk, T))
        z = buffer_CV[: part.stop - start]
        _matmul(hidden[part], weight.t(), out=z[:, :V])
        tokens_C = [x if x is None else x[part] for x in tokens]
        clipped_C = None if clipped is None else clipped[part]
        dz = rows(z, V, target[part], tokens_C, o, stat[:, part], clipped_C, grad_dtype)
        if dhidden is not None:
            _matmul(dz, weight, out=dhidden[part])
        if dweight is not None:
            _matmul(dz.t(), hidden[part], dweight, accumulate or start > 0, alpha)
    if dweight is not None and T == 0 and not accumulate:
        dweight.zero_()


@torch.library.custom_op("drgrpo::linear_logprob", mutates_args=())
def _linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    chunk: int,
    logits_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """[2, T]: log-prob, entropy."""
    stat = hidden.new_empty(2, len(hidden), dtype=torch.float32)
    none, o = (None,) * 4, _Objective(temperature=temperature)
    _head(
        hidden,
        weight,
        target,
        none,
        o,
        stat,
        None,
        None,
        None,
        False,
        1.0,
        chunk,
        logits_dtype,
        backend,
    )
    return stat


@_linear_logprob_op.register_fake
def _(hidden, *_):
    return hidden.new_empty(2, len(hidden), dtype=torch.float32)


@torch.library.custom_op("drgrpo::linear_drgrpo", mutates_args={"main_grad"})
def _linear_drgrpo_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    old: Tensor | None,
    sampler: Tensor | None,
    ref: Tensor | None,
    main_grad: Tensor | None,
    unit: float,
    need_dhidden: bool,
    need_dweight: bool,
    clip_low: float,
    clip_high: float,
    tis_cap: float,
    temperature: float,
    scale: float,
    kl_coef: float,
    kl: str,
    chunk: int,
    logits_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, stat [STATS, T], clipped [T], dhidden, dweight in fp32). The gradients are those of
    loss / unit; one that is not needed, or that went to main_grad, is an empty tensor."""
    stat, clipped, dhidden, dweight = _outputs(
        hidden, weight, ref, main_grad, need_dhidden, need_dweight
    )
    o = _Objective(clip_low, clip_high, tis_cap, temperature, scale / unit, kl_coef, kl)
    _head(
        hidden,
        weight,
        target,
        (advantage, old, sampler, ref),
        o,
        stat,
        clipped,
        dhidden if need_dhidden else None,
        (dweight if main_grad is None else main_grad) if need_dweight else None,
        main_grad is not None,
        1.0 if main_grad is None else unit,
        chunk,
        logits_dtype,
        backend,
    )
    return scale * stat[4].sum(), stat, clipped, dhidden, dweight


@_linear_drgrpo_op.register_fake
def _(
    hidden,
    weight,
    target,
    advantage,
    old,
    sampler,
    ref,
    main_grad,
    unit,
    need_dhidden,
    need_dweight,
    *_,
):
    outputs = _outputs(hidden, weight, ref, main_grad, need_dhidden, need_dweight)
    return hidden.new_empty((), dtype=torch.float32), *outputs


def _outputs(hidden, weight, ref, main_grad, need_dhidden, need_dweight):
    T, f32 = len(hidden), torch.float32
    stat = hidden.new_empty(len(STATS) - (ref is None), T, dtype=f32)
    clipped = hidden.new_empty(T, dtype=torch.int8)
    dhidden = (
        torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if need_dhidden
        else hidden.new_empty(0)
    )
    own_dweight = need_dweight and main_grad is None
    return stat, clipped, dhidden, weight.new_empty(weight.shape if own_dweight else 0, dtype=f32)


class _LinearDrGRPO(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, target, advantage, old, sampler, ref, main_grad, unit, *options
    ):
        loss, stat, clipped, dhidden, dweight = _linear_drgrpo_op(
            hidden, weight, target, advantage, old, sampler, ref, main_grad, unit, *options
        )
        ctx.mark_non_differentiable(stat, clipped)
        ctx.save_for_backward(dhidden, dweight)
        ctx.main_grad, ctx.dtype, ctx.unit, ctx.spent = main_grad, weight.dtype, unit, False
        return loss, stat, clipped

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, _dstat, _dclipped):
        if ctx.spent:
            raise RuntimeError(
                "linear_drgrpo_loss: second backward through one loss; its gradients are made in the forward pass and given "
                "out once. Call linear_drgrpo_loss again."
            )
        ctx.spent = True
        dhidden, dweight = ctx.saved_tensors
        # [1, 1] and not a scalar: that would be rounded to the gradients' dtype first, in which
        # 2^16 can be infinite.
        upstream, dinput, dparam = (dloss * ctx.unit).reshape(1, 1), None, None
        if (
            ctx.main_grad is not None
        ):  # holds dW for dloss = 1; another dloss must not pass for a gradient
            upstream = torch.where(dloss == 1, upstream, math.nan)
            ctx.main_grad[:1].mul_(torch.where(dloss == 1, 1.0, math.nan))
        elif ctx.needs_input_grad[
            1
        ]:  # scaled and rounded in one pass, without a second fp32 [V, D]
            out = (
                dweight
                if ctx.dtype == dweight.dtype
                else torch.empty_like(dweight, dtype=ctx.dtype)
            )
            dparam = torch.mul(dweight, upstream, out=out)
        if ctx.needs_input_grad[0]:
            dinput = torch.mul(dhidden, upstream, out=dhidden)
        return dinput, dparam, *[None] * (len(ctx.needs_input_grad) - 2)


def linear_logprob(
    hidden: Tensor,  # [T, D] fp16, bf16 or fp32
    weight: Tensor,  # [V, D] same dtype
    target: Tensor,  # [T] int32 or int64; -100: ignored; any other id outside [0, V): NaN
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,  # tokens whose logits exist at a time
    logits_dtype: torch.dtype
    | None = None,  # default fp32: these numbers are compared with other passes'
    backend: str = "auto",  # "triton", "torch", or "auto": triton on CUDA
) -> tuple[Tensor, Tensor]:
    """(log-prob of `target`, entropy), fp32 [T], without gradient: one GEMM and one read of the
    logits."""
    hidden, weight = _autocast(hidden.detach(), weight.detach())
    backend, chunk = _check(
        hidden, weight, target, {}, temperature, chunk_tokens, logits_dtype, backend
    )
    stat = _linear_logprob_op(
        hidden, weight, target, temperature, chunk, logits_dtype or torch.float32, backend
    )
    return stat[0], stat[1]


def linear_drgrpo_loss(
    hidden: Tensor,  # [T, D] fp16, bf16 or fp32
    weight: Tensor,  # [V, D] same dtype
    target: Tensor,  # [T] int32 or int64; -100: ignored; any other id outside [0, V): NaN
    advantage: Tensor,  # [T] fp32
    *,
    old_logprob: Tensor | None = None,  # [T] fp32; None: strictly on-policy, ratio 1 with gradient
    sampler_logprob: Tensor | None = None,  # [T] fp32, what the sampler reported; used with tis_cap
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    tis_cap: float | None = None,  # weight tokens by min(exp(old - sampler), tis_cap)
    temperature: float = 1.0,
    scale: float = 1.0,  # factors known beforehand (1 / (B * C), ranks, micro-batches) cost nothing here
    chunk_tokens: int | None = None,  # tokens whose logits exist at a time
    logits_dtype: torch.dtype
    | None = None,  # default: fp32 where log-probs are compared, else hidden's
    backend: str = "auto",  # "triton", "torch", or "auto": triton on CUDA
    ref_logprob: Tensor | None = None,  # [T] fp32, for a KL penalty
    kl_coef: float = 0.0,
    kl: str = "k3",  # estimator of KL(policy | ref): "k1" = logp - ref, "k3" = exp(ref - logp) - 1 - (ref - logp)
    main_grad: Tensor
    | None = None,  # fp32 [V, D]: dW is added to it in the forward pass; weight.grad stays None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, stats): the scalar fp32 loss, and per token, detached: logprob, entropy, log_ratio,
    clipped (int8: -1 the lower bound cut the gradient off, +1 the upper), tis_weight, token_loss
    (before `scale`), kl with `ref_logprob`.

    GRPO, DAPO and RLOO are this call with another advantage: min() commutes with a positive weight.
    With `main_grad`, call backward on the returned loss itself (factors go into `scale`); otherwise
    the result is NaN.
    """
    hidden, weight = _autocast(hidden, weight)
    tokens = dict(
        advantage=advantage,
        old_logprob=old_logprob,
        sampler_logprob=sampler_logprob,
        ref_logprob=ref_logprob,
    )
    backend, chunk = _check(
        hidden, weight, target, tokens, temperature, chunk_tokens, logits_dtype, backend
    )
    _check_loss(
        weight, sampler_logprob, tis_cap, clip_low, clip_high, ref_logprob, kl_coef, kl, main_grad
    )
    if tis_cap is None:
        tokens["sampler_logprob"] = None
    if logits_dtype is None:
        compared = any(x is not None for name, x in tokens.items() if name != "advantage")
        logits_dtype = torch.float32 if compared else hidden.dtype
    # Gradients of 1e-7 vanish in fp16: there only the mantissa of `scale` goes into them, its power
    # of two waits for backward.
    unit = 2.0 ** math.frexp(scale)[1] if hidden.dtype == torch.float16 else 1.0
    grad = torch.is_grad_enabled()
    loss, stat, clipped = _LinearDrGRPO.apply(
        hidden,
        weight,
        target,
        *(x if x is None else x.detach() for x in tokens.values()),
        main_grad,
        unit,
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        clip_low,
        clip_high,
        tis_cap or 0.0,
        temperature,
        scale,
        kl_coef,
        kl,
        chunk,
        logits_dtype,
        backend,
    )
    return loss, dict(zip(STATS, stat.unbind(), strict=False), clipped=clipped)


class LinearDrGRPO(torch.nn.Module):
    """An LM head that returns the loss in place of logits. A module, so that FSDP2's hooks give its
    forward the whole weight. Keep it out of activation checkpointing, which would compute the
    gradients twice."""

    def __init__(self, lm_head: torch.nn.Linear):
        super().__init__()
        if lm_head.bias is not None:
            raise ValueError(
                "lm_head has a bias, which the fused loss does not know; compute its logits and a loss on them"
            )
        self.lm_head = lm_head

    def forward(self, hidden: Tensor, target: Tensor, advantage: Tensor | None = None, **options):
        """`linear_drgrpo_loss` with an advantage, `linear_logprob` without."""
        if advantage is None:
            return linear_logprob(hidden, self.lm_head.weight, target, **options)
        return linear_drgrpo_loss(hidden, self.lm_head.weight, target, advantage, **options)


def _autocast(hidden, weight):
    """What autocast would do to the inputs of a linear layer."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _check(hidden, weight, target, tokens, temperature, chunk_tokens, logits_dtype, backend):
    """Refuses what cannot work; resolves the backend and the chunk size."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        if hasattr(x, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor ({x.placements}); call the loss through a LinearDrGRPO module that fully_shard() "
                f"wraps, which unshards the weight, or pass {name}.full_tensor()"
            )
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)}: must be [T, D], [V, D]; flatten first"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ):
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: they must be the same of float16, bfloat16, float32; cast one, "
            "or use autocast. In float64 there is the _ref function"
        )
    T, V = len(hidden), len(weight)
    if V == 0:
        raise ValueError("weight has no rows")
    if target.shape != (T,) or target.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"target is {target.dtype} {list(target.shape)}; it must be int32 or int64 [{T}], as hidden's rows"
        )
    for name, x in tokens.items():
        if x is not None and (x.shape != (T,) or x.dtype != torch.float32):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be float32 [{T}]")
    for name, x in {"weight": weight, "target": target, **tokens}.items():
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}; move one")
    if not temperature > 0:
        raise ValueError(
            f"temperature ({temperature}) must be positive; greedy sampling has no log-probs to train on"
        )
    if logits_dtype not in (None, torch.float32, hidden.dtype):
        raise ValueError(
            f"logits_dtype ({logits_dtype}) must be float32 or hidden's {hidden.dtype}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens ({chunk_tokens}) must be at least 1; None chooses")
    return _backend(backend, hidden.device), chunk_tokens or _chunk(T, V, hidden.device)


def _check_loss(weight, sampler, tis_cap, clip_low, clip_high, ref, kl_coef, kl, main_grad):
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(
            f"clip_low ({clip_low}) and clip_high ({clip_high}) are distances from 1 and must not be negative"
        )
    if tis_cap is not None and (sampler is None or not tis_cap > 0):
        raise ValueError(
            f"tis_cap ({tis_cap}) must be positive and needs sampler_logprob; None turns the weight off"
        )
    if kl not in ("k1", "k3"):
        raise ValueError(f"kl ({kl!r}) must be 'k1' or 'k3'")
    if kl_coef != 0 and ref is None:
        raise ValueError(f"kl_coef ({kl_coef}) needs ref_logprob")
    if main_grad is None:
        return
    if not weight.requires_grad:
        raise ValueError("main_grad is given but weight does not require a gradient; drop one")
    if (
        main_grad.shape != weight.shape
        or main_grad.dtype != torch.float32
        or main_grad.device != weight.device
    ):
        raise ValueError(
            f"main_grad is {main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}; it must be float32 "
            f"{list(weight.shape)} on {weight.device}"
        )


def _backend(backend, device):
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend ({backend!r}) must be 'auto', 'triton' or 'torch'")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "torch"
    if backend == "triton" and triton is None:
        raise RuntimeError(
            "backend='triton' needs Triton, which is not installed: pip install triton, or backend='torch'"
        )
    if (
        backend == "triton"
        and device.type != "cuda"
        and isinstance(_drgrpo_row_kernel, triton.JITFunction)
    ):
        raise RuntimeError(
            f"backend='triton' compiles for CUDA, the tensors are on {device}: use backend='torch', or set TRITON_INTERPRET=1 "
            "before triton is imported to run the kernel in its interpreter"
        )
    return backend


def _chunk(T, V, device):
    """Equal chunks, multiples of 128 tokens, of at most `chunk_logits` logits (or 128 tokens,
    however large V is)."""
    most = max(_sizes(device).chunk_logits // V // 128 * 128, 128)
    chunks = max(math.ceil(T / most), 1)
    return max(math.ceil(math.ceil(T / chunks) / 128) * 128, 128)
