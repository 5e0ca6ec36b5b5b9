"""LM head + Dr. GRPO loss in one pass, gradients included; the [T, V] logits never exist.

    z_t   = W x_t / temperature                    logits of token t                        [V]
    logp  = z[target] - logsumexp(z)               entropy H = logsumexp(z) - sum_j p_j z_j
    rho   = exp(logp - old)                        old = detached logp when strictly on-policy
    w     = min(exp(old - sampler), tis_cap)       truncated importance weight, a constant
    KL    = exp(ref - logp) - 1 - (ref - logp)     distance from a reference model
    loss  = scale * sum_t [ -w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef KL ]

w is 1 without `tis_cap`. Backward, with p = softmax(z) and e the one-hot target:

    g     = scale * ( -w A rho [rho A <= clip(rho) A] + kl_coef dKL/dlogp )   d loss / d logp
    dz    = g / temperature * (e - p)
    dx    = dz W            dW = sum_t dz_t x_t^T

The loss is one number, so its gradient is known up to the incoming scalar as soon as the logits
are. The forward pass computes the gradient, chunk by chunk. The backward pass only multiplies by
the scalar, on the device. Each chunk of C tokens takes four steps:

    1. Z = X W^T           cuBLAS
    2. one Triton program a row: two sums give logp, entropy, ratio, clip, loss and g; a second
       sweep overwrites Z with dZ
    3. dX = dZ W           cuBLAS
    4. dW += dZ^T X        cuBLAS, accumulated in fp32

Cost, for T = 16384, D = 3584, V = 152064 in bf16:

    FLOPs   6 T V D = 54 TFLOP, three GEMMs. Recomputing logits in the backward pass needs four.
    bytes   6 T V = 15 GB: the row pass reads a logit twice and writes it once. The second read can
            hit the cache.
    memory  logits 2 C V = 2.5 GB at C = 8192, dW 4 V D = 2.2 GB, dX 2 T D = 0.1 GB. The naive path
            keeps 6 T V = 15 GB.

Precision. `logits_dtype` chooses the type of Z. The default is fp32 where log-probs are compared
with those of another pass, because a bf16 logit of 25 is off by up to 0.06 nats. It is the inputs'
type otherwise. fp32 logits take 2 C V bytes more. "shifted" logits have the inputs' 16-bit type.
One more column of the GEMM subtracts the target's logit inside the fp32 accumulator. Softmax does
not see a shift, but rounding does: what is rounded is near 0 where the probability is. That takes
2 V D bytes for a copy of W. Errors of log-probs at V = 151936 are 3.5e-2 nats (rms) with bf16
logits, 1.4e-3 with shifted ones and 1e-6 with fp32 ones (logits up to 26, on a CPU).

dZ has the inputs' type in all cases; a 16-bit dZ lies in the upper half of its fp32 row. In fp16
`scale` and the incoming scalar wait for the backward pass, so that neither can make dZ vanish or
overflow. A token with |w rho A| / temperature above 6.5e4 makes dZ infinite all the same, and no
loss scale cures that: a ratio of e^11 with a negative advantage, which has no upper clip, or an
advantage of that size.

Shapes: T tokens, D model width, V vocabulary, C tokens of a chunk.

There are no atomics and no host syncs on CUDA, and results have the same bits every time. NaN
surfaces. Left out on purpose: a bias (the Qwen and Llama heads have none), label smoothing, ratios
of whole sequences (they need every log-prob of the sequence before the first gradient),
tensor-parallel vocabularies.

The online softmax of difficult rows descends from Milakov & Gimelshein (arXiv 1805.02867). Liger
popularized gradients in the forward pass of a fused head
(https://github.com/linkedin/Liger-Kernel).

    pytest tests/test_linear_drgrpo*.py
    python -m bench.static_report
    python -m bench.bench_linear_drgrpo
"""

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # no Triton wheel for this platform: backend="torch" does everything
    triton, tl, constexpr = None, None, float

IGNORE = -100
"""Target of a position that is not trained on: its outputs are 0 and it has no gradient."""

STATS = ("logprob", "entropy", "log_ratio", "tis_weight", "token_loss", "kl")
"""Per-token fp32 statistics, in the order of the rows of `stat`. "kl" needs a reference."""

CHUNK_LOGITS = {"cuda": 8192 * 152_064, "cpu": 512 * 1024}
"""Most logits of a chunk. On a GPU they take 2.5 GB in bf16, and more chunks would read and write
dW more often. On a CPU they stay in the cache."""

LogitsDtype = torch.dtype | Literal["shifted"] | None
"""Type of the logits; "shifted" is the inputs' 16-bit type, rounded about the target's logit."""

LOWEST = -1e30
"""Replaces -inf where a difference or a product follows: inf - inf and 0 * inf are NaN."""


# ---- what the functions mean: plain torch, differentiable


def token_objective(
    logprob: Tensor,
    ignored: Tensor,
    advantage: Tensor,
    old_logprob: Tensor | None = None,
    sampler_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    *,
    clip_low: float,
    clip_high: float,
    tis_cap: float | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss: (loss of each token before `scale`, statistics of each token).

    Every tensor has the shape [T]. `ignored` is boolean; the others are floating point. Log-probs
    are in nats. The token loss is differentiable in `logprob` and constant in everything else.

    This function is the only Python copy of the loss. `linear_drgrpo_loss_ref` differentiates it,
    and the torch backend takes d loss / d logprob from it by autograd. To change the loss, edit
    this function and run with backend="torch" on any device. Port the change to
    `_drgrpo_row_kernel` when speed pays for it.

    Sources: Liu et al., arXiv 2503.20783, for the clipped term; Schulman's k3 for the KL,
    http://joschu.net/blog/kl-approx.html."""
    old = logprob.detach() if old_logprob is None else old_logprob
    log_ratio = torch.where(ignored, 0.0, logprob - old)

    # A cut token has no gradient. It must leave the graph before exp(), whose result may be
    # infinite: autograd would compute 0 * inf = NaN.
    active = (advantage != 0) & ~ignored
    ratio = log_ratio.detach().exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    cut = active & (ratio * advantage > bounded)
    surrogate = torch.where(active & ~cut, log_ratio, 0.0).exp() * advantage

    tis_weight = torch.ones_like(ratio)
    if tis_cap is not None:
        assert sampler_logprob is not None, "tis_cap needs sampler_logprob"
        tis_weight = (old - sampler_logprob).exp().clamp(max=tis_cap)
    tis_weight = torch.where(ignored, 0.0, tis_weight)
    token_loss = torch.where(active, -tis_weight * torch.where(cut, bounded, surrogate), 0.0)
    stats = {
        "log_ratio": log_ratio,
        "tis_weight": tis_weight,
        "clipped": torch.where(cut, advantage.sign(), 0.0).to(torch.int8),
    }
    if ref_logprob is not None:
        delta = torch.where(ignored, 0.0, ref_logprob - logprob)
        stats["kl"] = delta.expm1() - delta
        if kl_coef != 0:  # 0 watches the KL, which may overflow and must not reach the loss
            token_loss = token_loss + kl_coef * stats["kl"]
    return token_loss, stats | {"token_loss": token_loss}


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: LogitsDtype = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What `linear_logprob` means, differentiable. Computes in fp32, and in fp64 on fp64 inputs.
    Ignores `chunk_tokens`, `logits_dtype` and `backend`, which change no meaning."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logp_TV = torch.log_softmax(hidden.to(dtype) @ weight.to(dtype).T / temperature, dim=-1)
    target, V = target.long(), weight.shape[0]
    invalid, ignored = (target < 0) | (target >= V), target == IGNORE
    logprob_T = logp_TV.gather(1, target.clamp(0, V - 1)[:, None])[:, 0]
    logprob_T = logprob_T.masked_fill(invalid, math.nan).masked_fill(ignored, 0.0)
    entropy_T = torch.special.entr(logp_TV.exp()).sum(-1).masked_fill(ignored, 0.0)
    return logprob_T, entropy_T


def linear_drgrpo_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    *,
    old_logprob: Tensor | None = None,
    sampler_logprob: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    tis_cap: float | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: LogitsDtype = None,
    backend: str = "auto",
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `linear_drgrpo_loss` means, with autograd's gradients; see `linear_logprob_ref`."""
    logprob, entropy = linear_logprob_ref(hidden, weight, target, temperature=temperature)
    inputs = (logprob, target == IGNORE, advantage, old_logprob, sampler_logprob, ref_logprob)
    token_loss, stats = token_objective(
        *inputs, clip_low=clip_low, clip_high=clip_high, tis_cap=tis_cap, kl_coef=kl_coef
    )
    stats = {"logprob": logprob, "entropy": entropy} | stats
    return scale * token_loss.sum(), {name: stat.detach() for name, stat in stats.items()}


# ---- sizes: what depends on the device and changes no result


class Sizes(NamedTuple):
    """Sizes of a row program and of a chunk."""

    block_v: int  # logits that a row program takes at a time
    num_warps: int
    chunk_logits: int  # most logits of a chunk
    processors: int = 0  # SMs of the card; 0 on a CPU


# One program per SM. Two loads of 16 bytes per thread are on their way at a time, which keeps the
# memory busy. Few rows are in flight then, and the logits of each row are still in the L2 cache for
# the second sweep. Predicted by bench/static_report.py, not measured.
BLOCK_V, NUM_WARPS = 16_384, 32

TUNED: dict[tuple[int, int], Sizes] = {}
"""Compute capability -> sizes that beat the ones above on such a card. `make gpu` prints the card's
entry. No card has been measured: every architecture runs on the predicted sizes."""


def sizes_of(
    capability: tuple[int, int] = (8, 0), processors: int = 108, memory: int = 80 * 2**30
) -> Sizes:
    """Sizes for a CUDA card, an A100 unless told otherwise. fp32 logits of a chunk take at most a
    sixteenth of its memory, which is in bytes."""
    default = Sizes(BLOCK_V, NUM_WARPS, min(CHUNK_LOGITS["cuda"], memory // 64))
    return TUNED.get(capability, default)._replace(processors=processors)


def sizes_on(device: torch.device, memory: int | None = None) -> Sizes:
    """Sizes for this device. `memory` is that of another card, in bytes. CUDA may be absent, as in
    a dry run on fake tensors: an A100 is assumed."""
    if device.type != "cuda":
        return Sizes(BLOCK_V, NUM_WARPS, CHUNK_LOGITS["cpu"])
    if not torch.cuda.is_available():
        return sizes_of(memory=memory or 80 * 2**30)
    card = torch.cuda.get_device_properties(device)
    capability, memory = (card.major, card.minor), memory or card.total_memory
    return sizes_of(capability, card.multi_processor_count, memory)


def default_chunk_tokens(T: int, D: int, V: int, sizes: Sizes) -> int:
    """Tokens of a chunk: a multiple of 128, with at most `chunk_logits` logits unless 128 tokens
    have more. A CPU gets chunks of nearly equal size. A GPU gets the fastest ones by `_gemm_cost`,
    and the last chunk has the rest."""
    largest = max(sizes.chunk_logits // V // 128 * 128, 128)
    chunks = max(math.ceil(T / largest), 1)
    if chunks == 1 or sizes.processors == 0:
        return max(math.ceil(T / (128 * chunks)) * 128, 128)
    processors, sizes_C = sizes.processors, range(128, largest + 1, 128)
    return min(sizes_C, key=lambda C: _gemm_cost(T, C, D, V, processors))


def _gemm_cost(T: int, C: int, D: int, V: int, processors: int) -> float:
    """FLOPs of an SM in the time that Z, dX and the accumulation of dW take in chunks of C tokens.
    An SM computes one tile of 128 x 256 results at a time. A wave, one tile on each SM, takes as
    long if it is not full. It is assumed that a GEMM hides 65 % of the 8 bytes of an accumulation,
    and that a card does 150 FLOPs in the time of a byte."""
    accumulation = 8 * 0.35 * 150 * V * D / processors

    def waves(rows: int, columns: int) -> int:
        return math.ceil(math.ceil(rows / 128) * math.ceil(columns / 256) / processors)

    def cost(rows: int) -> float:
        tiles = waves(rows, V) * D + waves(rows, D) * V
        return 2 * 128 * 256 * tiles + accumulation

    full, rest = divmod(T, C)
    return full * cost(C) + (cost(rest) if rest else 0.0)


def resolve_backend(name: str, device: torch.device) -> str:
    """The backend that runs: "triton" or "torch". "auto" is Triton on CUDA and torch elsewhere.
    Raises ValueError for an unknown name, RuntimeError where Triton cannot run."""
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"backend ({name!r}) must be 'auto', 'triton' or 'torch'")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return "torch"
    if triton is None:
        raise RuntimeError(
            "backend='triton' needs Triton, which is not installed: pip install triton, "
            "or backend='torch'"
        )
    if device.type != "cuda" and isinstance(_drgrpo_row_kernel, triton.JITFunction):
        raise RuntimeError(
            f"backend='triton' compiles for CUDA, the tensors are on {device}: use "
            "backend='torch', or set TRITON_INTERPRET=1 before triton is imported to run the "
            "kernel in its interpreter"
        )
    return "triton"


# ---- the row pass, in Triton. Only constexpr parameters are annotated: Triton specializes the
# compiled code on any other annotation.


def _jit(**options: Any) -> Callable:
    """`triton.jit(**options)` where Triton exists."""
    return triton.jit(**options) if triton else lambda function: None


_LOGPROB, _ENTROPY, _LOG_RATIO, _TIS_WEIGHT, _TOKEN_LOSS, _KL = map(constexpr, range(len(STATS)))
_IGNORE = constexpr(IGNORE)
_LOWEST = constexpr(LOWEST)
_LN_2 = constexpr(math.log(2))
_LARGEST_SUM = constexpr(2.0**24)


@_jit()
def _add(z, reference, k, l_i, t_i):
    """Adds a block to the sums of each lane. l: sum of 2^((z-reference)k). t: the same sum weighted
    by z-reference, for the entropy."""
    d = z - reference
    e = tl.exp2(d * k)
    return l_i + e, t_i + d * e


@_jit()
def _online_softmax(z_ptr, V, width, k, BLOCK_V: constexpr):
    """(m, l, t): the sums of `_add` relative to the row's largest logit m. Each lane keeps its
    largest logit so far. A new maximum rescales the old sums, any other logit rescales the new
    term. Both factors are 2^(-|z-m|k), so one exp2 is enough. A NaN stays in l and t. In a row of
    -inf alone m is NaN, as in torch."""
    m_i = tl.full([BLOCK_V], _LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_V], tl.float32)
    t_i = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + offs, mask=offs < width).to(tl.float32)
        z = tl.where((offs >= V) | (z < _LOWEST), _LOWEST, z)
        d = z - m_i
        e = tl.exp2(tl.abs(d) * -k)
        rises = d > 0
        t_i = tl.where(rises, (t_i - d * l_i) * e, t_i + d * e)
        l_i = tl.where(rises, l_i * e + 1.0, l_i + e)
        m_i = tl.where(rises, z, m_i)
    m = tl.max(m_i, 0)
    m = tl.where(m > _LOWEST, m, float("nan"))
    rescale = tl.exp2((m_i - m) * k)
    return m, tl.sum(l_i * rescale, 0), tl.sum((t_i + (m_i - m) * l_i) * rescale, 0)


@_jit()
def _overwrite(z_ptr, dz_ptr, offs, mask, softmax, g, SHARED_ROW: constexpr):
    """Replaces a block of logits by -g p. In a shared row the store comes after every warp's load.
    It lies above everything that is still to be read."""
    reference, k, log2_l = softmax
    z = tl.load(z_ptr + offs, mask=mask, eviction_policy="evict_first").to(tl.float32)
    if SHARED_ROW:
        tl.debug_barrier()
    p = tl.exp2((z - reference) * k - log2_l)
    tl.store(dz_ptr + offs, (p * -g).to(dz_ptr.dtype.element_ty), mask=mask)


# Addresses of per-token tensors and the number of tokens change from call to call. Triton would
# compile again for each alignment.
@_jit(
    do_not_specialize=["stride_stat"],
    do_not_specialize_on_alignment=[
        f"{x}_ptr" for x in ("target", "advantage", "old", "sampler", "ref", "stat", "clipped")
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
    scale_ptr,  # [1] fp32
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
    LOSS: constexpr,  # else log-prob and entropy only
    GRAD: constexpr,
    HAS_OLD: constexpr,
    HAS_SAMPLER: constexpr,
    HAS_REF: constexpr,
    SHARED_ROW: constexpr,  # dz and z are different elements of the same memory
    BLOCK_V: constexpr,
):
    # This program owns one token: its row of logits and everything known about the token.
    row = tl.program_id(0).to(tl.int64)  # C * V passes 2^31
    z_ptr += row * stride_z
    lanes = tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + row)
    ignored = target == _IGNORE
    full = tl.where(ignored, 0, V) // BLOCK_V * BLOCK_V  # of an ignored row one block is read
    tail = full + lanes  # [BLOCK_V]
    valid = (target >= 0) & (target < V)
    z_target = tl.load(z_ptr + target, mask=valid, other=float("nan")).to(tl.float32)

    # First sweep, ascending. Every power of two is relative to the target's logit, which lies near
    # the largest where the token was sampled. That takes no maximum and no rescaling.
    reference = z_target
    l_i = tl.zeros([BLOCK_V], tl.float32)
    t_i = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, full, BLOCK_V):
        z = tl.load(z_ptr + start + lanes, eviction_policy="evict_last").to(tl.float32)
        l_i, t_i = _add(z, reference, k, l_i, t_i)
    z = tl.load(z_ptr + tail, mask=tail < stride_z, eviction_policy="evict_last").to(tl.float32)
    l_i, t_i = _add(tl.where(tail < V, z, _LOWEST), reference, k, l_i, t_i)
    l = tl.sum(l_i, 0)
    t = tl.sum(t_i, 0)
    # The sums say whether the reference was good: 1 / l is the target's probability. One below
    # 2^-24 costs the entropy digits. That, an infinite logit or a NaN takes another sweep, with a
    # maximum and three numbers a lane, hence fewer lanes.
    good = (l < _LARGEST_SUM) & (t == t)
    if (good | ignored) == 0:
        reference, l, t = _online_softmax(z_ptr, V, stride_z, k, BLOCK_V // 2)
    log2_l = tl.log2(l)
    logprob = ((z_target - reference) * k - log2_l) * _LN_2
    entropy = (log2_l - t * k / l) * _LN_2
    tl.store(stat_ptr + _LOGPROB * stride_stat + row, tl.where(ignored, 0.0, logprob))
    tl.store(stat_ptr + _ENTROPY * stride_stat + row, tl.where(ignored, 0.0, entropy))

    if LOSS:
        # `token_objective`, with its gradient by hand.
        advantage = tl.where(ignored, 0.0, tl.load(advantage_ptr + row))
        old = logprob
        if HAS_OLD:
            old = tl.load(old_ptr + row)
        log_ratio = tl.where(ignored, 0.0, logprob - old)
        ratio = tl.exp(log_ratio)
        # where() in place of min, max and clamp: those drop a NaN.
        bounded = tl.where(ratio > ratio_high, ratio_high, ratio)
        bounded = tl.where(ratio < ratio_low, ratio_low, bounded)
        surrogate = ratio * advantage
        cut = surrogate > bounded * advantage
        tis_weight = 1.0
        if HAS_SAMPLER:
            tis_weight = tl.exp(old - tl.load(sampler_ptr + row))
            tis_weight = tl.where(tis_weight > tis_cap, tis_cap, tis_weight)
        tis_weight = tl.where(ignored, 0.0, tis_weight)
        active = advantage != 0  # else 0, also where the ratio overflows
        loss = tl.where(active, -tis_weight * tl.where(cut, bounded * advantage, surrogate), 0.0)
        g = tl.where(active & (cut == 0), -tis_weight * surrogate, 0.0)  # d loss / d logprob
        if HAS_REF:
            delta = tl.load(ref_ptr + row) - logprob
            penalty = tl.where(ignored, 0.0, -delta + (tl.exp(delta) - 1.0))
            slope = 1.0 - tl.exp(delta)
            # kl_coef = 0 watches the KL, which may overflow and must not reach the loss.
            penalized = (kl_coef != 0) & (ignored == 0)
            loss += tl.where(penalized, kl_coef * penalty, 0.0)
            g += tl.where(penalized, kl_coef * slope, 0.0)
            tl.store(stat_ptr + _KL * stride_stat + row, penalty)
        tl.store(stat_ptr + _LOG_RATIO * stride_stat + row, log_ratio)
        tl.store(stat_ptr + _TIS_WEIGHT * stride_stat + row, tis_weight)
        tl.store(stat_ptr + _TOKEN_LOSS * stride_stat + row, loss)
        tl.store(clipped_ptr + row, tl.where(cut, tl.where(advantage > 0, 1, -1), 0).to(tl.int8))

        if GRAD:
            # Second sweep, descending: the logits read last are the likeliest to be in the cache.
            g *= tl.load(scale_ptr) * (k * _LN_2)  # scale / temperature
            dz_ptr += row * stride_dz
            dtype = dz_ptr.dtype.element_ty
            if g == 0:  # an ignored, clipped or zero-advantage token: nothing to read
                for start in range(0, V, BLOCK_V):
                    offs = start + lanes  # [BLOCK_V]
                    tl.store(dz_ptr + offs, tl.zeros([BLOCK_V], dtype), mask=offs < stride_z)
            else:
                full = V // BLOCK_V * BLOCK_V
                tail = full + lanes
                softmax = (reference, k, log2_l)
                _overwrite(z_ptr, dz_ptr, tail, tail < stride_z, softmax, g, SHARED_ROW)
                for i in range(BLOCK_V, full + 1, BLOCK_V):
                    _overwrite(z_ptr, dz_ptr, full - i + lanes, None, softmax, g, SHARED_ROW)
                # The target's own element comes after every warp's stores.
                tl.debug_barrier()
                p_target = tl.exp2((z_target - reference) * k - log2_l)
                dz_target = ((1.0 - p_target) * g).to(dtype)
                tl.store(dz_ptr + target, dz_target, mask=valid)


# ---- one chunk after another


class _PerToken(NamedTuple):
    """The loss's inputs of each token, fp32 [T] or, in a chunk, [C]."""

    advantage: Tensor
    old_logprob: Tensor | None = None
    sampler_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "_PerToken":
        advantage, *others = self
        return _PerToken(function(advantage), *(None if x is None else function(x) for x in others))


class _Objective(NamedTuple):
    """The numbers of the loss."""

    clip_low: float = 0.0
    clip_high: float = 0.0
    tis_cap: float = math.inf
    temperature: float = 1.0
    kl_coef: float = 0.0


class _Execution(NamedTuple):
    """How the head runs."""

    chunk_tokens: int | None  # None: `default_chunk_tokens`
    logits_dtype: torch.dtype
    shifted: bool
    need_dhidden: bool = False
    need_dweight: bool = False
    backend: str = "triton"


class _Outputs(NamedTuple):
    """A gradient that is not needed has no elements."""

    stat: Tensor  # fp32; [2, T] without a loss, else [5, T], or [6, T] with a reference
    clipped: Tensor  # [T] int8
    dhidden: Tensor  # [T, D]
    dweight: Tensor  # [V, D] fp32


def _empty_outputs(
    hidden: Tensor, weight: Tensor, per_token: _PerToken | None, execution: _Execution
) -> _Outputs:
    T, f32 = hidden.shape[0], torch.float32  # len() would compile one graph per token count
    rows = 2 if per_token is None else len(STATS) - (per_token.ref_logprob is None)
    return _Outputs(
        stat=hidden.new_empty(rows, T, dtype=f32),
        clipped=hidden.new_empty(T, dtype=torch.int8),
        dhidden=hidden.new_empty(hidden.shape if execution.need_dhidden else 0),
        dweight=weight.new_empty(weight.shape if execution.need_dweight else 0, dtype=f32),
    )


@torch.compiler.disable
def _chunked_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    per_token: _PerToken | None,
    scale: Tensor | None,
    objective: _Objective,
    execution: _Execution,
) -> _Outputs:
    """Statistics and gradients of all tokens; log-prob and entropy only without `per_token`.

    Dynamo cannot trace the autograd call of the torch backend inside an autograd function, so the
    torch backend breaks a compiled graph. The Triton backend is a custom operator and one node."""
    (T, D), V = hidden.shape, len(weight)
    chunk_tokens, logits_dtype, shifted, need_dhidden, need_dweight, backend = execution
    outputs = _empty_outputs(hidden, weight, per_token, execution)
    if hidden.is_meta:  # shapes, without numbers
        return outputs
    stat, clipped, dhidden, dweight = outputs
    chunk_tokens = chunk_tokens or default_chunk_tokens(T, D, V, sizes_on(hidden.device))
    target = target.contiguous()
    if per_token is not None:
        per_token = per_token.map(Tensor.contiguous)
    # Triton's 128-bit loads need aligned rows, whatever V is.
    row_stride = V if backend == "torch" else (V + 15) // 16 * 16
    buffer_CV = hidden.new_empty(min(chunk_tokens, T), row_stride, dtype=logits_dtype)
    grad_dtype = hidden.dtype if need_dhidden or need_dweight else None
    row_pass = _rows_triton if backend == "triton" else _rows_torch
    head_weight = _with_columns(weight, weight.new_ones(V)) if shifted else weight
    for start in range(0, T, chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, T))
        logits_CV = buffer_CV[: chunk.stop - start]
        hidden_C = hidden[chunk]
        if shifted:
            hidden_C = _with_columns(hidden_C, -_target_logit(hidden_C, weight, target[chunk]))
        _matmul(hidden_C, head_weight.t(), out=logits_CV[:, :V])
        per_token_C = None if per_token is None else per_token.map(itemgetter(chunk))
        inputs = (logits_CV, V, target[chunk], per_token_C, scale, objective)
        dlogits_CV = row_pass(*inputs, stat[:, chunk], clipped[chunk], grad_dtype)
        if dlogits_CV is None:  # no gradient is needed
            continue
        if need_dhidden:
            _matmul(dlogits_CV, weight, out=dhidden[chunk])
        if need_dweight:
            _matmul(dlogits_CV.t(), hidden[chunk], out=dweight, accumulate=start > 0)
    if T == 0:
        dweight.zero_()
    return outputs


def _target_logit(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """[C], in hidden's type. Close is enough, as it only moves the point about which logits are
    rounded."""
    row = torch.where((target >= 0) & (target < weight.shape[0]), target, 0).long()
    return (hidden * weight[row]).sum(1, dtype=torch.float32).to(hidden.dtype)


def _with_columns(x: Tensor, column: Tensor) -> Tensor:
    """x [N, D] with one column more, and 7 of zeros: GEMMs want rows of whole 16 bytes."""
    return torch.cat([x, column[:, None], x.new_zeros(len(x), 7)], dim=1)


def _rows_triton(
    z: Tensor,  # [C, stride >= V] logits before temperature; overwritten
    V: int,
    target: Tensor,
    per_token: _PerToken | None,
    scale: Tensor | None,  # [1] fp32
    objective: _Objective,
    stat: Tensor,
    clipped: Tensor,
    grad_dtype: torch.dtype | None,
) -> Tensor:
    """The row pass over one chunk. Fills `stat` and `clipped`. Returns dZ [C, V] in `grad_dtype`,
    which means nothing where that is None."""
    dz = z if grad_dtype in (None, z.dtype) else z.view(grad_dtype)[:, z.shape[1] :]
    advantage, old, sampler, ref = per_token or (None,) * 4
    tensors = (z, dz, target, advantage, old, sampler, ref, scale, stat, clipped)
    sizes = sizes_on(z.device)
    with torch.cuda.device_of(z):
        _drgrpo_row_kernel[(len(z),)](
            *tensors,
            V,
            z.stride(0),
            dz.stride(0),
            stat.stride(0),
            k=math.log2(math.e) / objective.temperature,
            ratio_low=1.0 - objective.clip_low,
            ratio_high=1.0 + objective.clip_high,
            tis_cap=objective.tis_cap,
            kl_coef=objective.kl_coef,
            LOSS=advantage is not None,
            GRAD=grad_dtype is not None,
            HAS_OLD=old is not None,
            HAS_SAMPLER=sampler is not None,
            HAS_REF=ref is not None,
            SHARED_ROW=dz.dtype != z.dtype,
            BLOCK_V=sizes.block_v,
            num_warps=sizes.num_warps,
        )
    return dz[:, :V]


def _rows_torch(
    z: Tensor,
    V: int,
    target: Tensor,
    per_token: _PerToken | None,
    scale: Tensor | None,  # [1] fp32
    objective: _Objective,
    stat: Tensor,
    clipped: Tensor,
    grad_dtype: torch.dtype | None,
) -> Tensor | None:
    """`_rows_triton` in torch operations, in place wherever the logits are fp32."""
    logits = z.float()  # [C, V]
    if objective.temperature != 1.0:
        logits.div_(objective.temperature)
    ignored, valid = target == IGNORE, (target >= 0) & (target < V)
    index = torch.where(valid, target, 0).long()[:, None]
    logits.sub_(logits.amax(1, keepdim=True))
    target_logit = logits.gather(1, index)[:, 0]
    p = logits.softmax(1)
    log_l = -p.amax(1).log()  # the largest p is 1 / l
    logprob = torch.where(valid, target_logit - log_l, math.nan).masked_fill_(ignored, 0.0)
    logits.clamp_(min=LOWEST)
    entropy = (log_l - logits.mul_(p).sum(1)).masked_fill_(ignored, 0.0)
    stats = {"logprob": logprob, "entropy": entropy}
    dz = None
    if per_token is not None:
        assert scale is not None, "a loss has a scale"
        g, token_stats = _slope(logprob, ignored, per_token, objective, grad_dtype is not None)
        clipped.copy_(token_stats["clipped"])
        stats |= token_stats
        if g is not None:
            g = g * scale / objective.temperature
            dz = p.mul_(-g[:, None]).scatter_add_(1, index, g[:, None]).to(grad_dtype)
            dz.index_fill_(0, (g == 0).nonzero()[:, 0], 0.0)  # 0 * NaN is NaN
    for i, name in enumerate(STATS[: len(stat)]):
        stat[i] = stats[name]
    return dz


def _slope(
    logprob: Tensor, ignored: Tensor, per_token: _PerToken, objective: _Objective, need_slope: bool
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(d token_loss / d logprob, statistics) of `token_objective`, [C] each. The graph holds
    vectors of C elements and no logits."""
    low, high, tis_cap, _, kl_coef = objective
    cap = None if per_token.sampler_logprob is None else tis_cap
    with torch.set_grad_enabled(need_slope):
        logprob = logprob.detach().requires_grad_(need_slope)
        inputs = (logprob, ignored, *per_token)
        token_loss, stats = token_objective(
            *inputs, clip_low=low, clip_high=high, tis_cap=cap, kl_coef=kl_coef
        )
        total = token_loss.sum()
    slope = torch.autograd.grad(total, logprob)[0] if need_slope else None
    return slope, {name: stat.detach() for name, stat in stats.items()}


def _matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a b, accumulated in fp32 and rounded once to out's dtype, without a copy of out.
    A call with out= takes no part in autocast, which has cast the inputs before."""
    beta = float(accumulate)
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:  # the CPU build has no GEMM with another output type
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


# ---- operators: torch.compile and fake tensors see one node where Triton runs


@torch.library.custom_op("drgrpo::linear_logprob", mutates_args=())
def _triton_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    chunk_tokens: int | None,
    logits_dtype: torch.dtype,
    shifted: bool,
) -> Tensor:
    """[2, T]: log-prob, entropy."""
    objective = _Objective(temperature=temperature)
    execution = _Execution(chunk_tokens, logits_dtype, shifted)
    return _chunked_head(hidden, weight, target, None, None, objective, execution).stat


@_triton_logprob_op.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(2, hidden.shape[0], dtype=torch.float32)


@torch.library.custom_op("drgrpo::linear_drgrpo", mutates_args=())
def _triton_loss_op(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    old: Tensor | None,
    sampler: Tensor | None,
    ref: Tensor | None,
    scale: Tensor,
    objective: list[float],
    chunk_tokens: int | None,
    logits_dtype: torch.dtype,
    shifted: bool,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `_Outputs`. `objective` holds those of `_Objective`."""
    per_token = _PerToken(advantage, old, sampler, ref)
    execution = _Execution(chunk_tokens, logits_dtype, shifted, need_dhidden, need_dweight)
    inputs = (hidden, weight, target, per_token, scale)
    return tuple(_chunked_head(*inputs, _Objective(*objective), execution))


@_triton_loss_op.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *per_token, _scale, _objective = args[:6]
    execution = _Execution(*args[6:])
    return tuple(_empty_outputs(hidden, weight, _PerToken(*per_token), execution))


class _LinearDrGRPO(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        per_token: _PerToken,
        scale: Tensor,
        objective: _Objective,
        execution: _Execution,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Gradients of 1e-7 vanish in fp16, so `scale` multiplies them in the backward pass there.
        now, later = scale, torch.ones_like(scale)
        if hidden.dtype == torch.float16:
            now, later = later, now
        inputs = (hidden, weight, target)
        if execution.backend == "triton":
            outputs = _triton_loss_op(*inputs, *per_token, now, list(objective), *execution[:-1])
        else:
            outputs = _chunked_head(*inputs, per_token, now, objective, execution)
        stat, clipped, dhidden, dweight = outputs
        ctx.mark_non_differentiable(stat, clipped)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype, ctx.scale = weight.dtype, later
        ctx.backward_ran = False
        return scale[0] * stat[STATS.index("token_loss")].sum(), stat, clipped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.backward_ran:
            raise RuntimeError(
                "linear_drgrpo_loss: second backward through one loss. Its gradients are made in "
                "the forward pass and given out once. Call linear_drgrpo_loss again."
            )
        ctx.backward_ran = True
        saved_dhidden, saved_dweight = ctx.saved_tensors
        # [1] and not a scalar: torch rounds a scalar to the gradients' dtype first, in which 2^16
        # can be infinite.
        upstream = dloss * ctx.scale
        dhidden = dweight = None
        if ctx.needs_input_grad[0]:
            dhidden = torch.mul(saved_dhidden, upstream, out=saved_dhidden)
        if ctx.needs_input_grad[1]:
            # One pass scales and rounds, without a second fp32 [V, D].
            same = ctx.weight_dtype == saved_dweight.dtype
            out = saved_dweight if same else torch.empty_like(saved_dweight, dtype=ctx.weight_dtype)
            dweight = torch.mul(saved_dweight, upstream, out=out)
        return dhidden, dweight, None, None, None, None, None


# ---- the two functions


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: LogitsDtype = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(log-prob of `target`, entropy) of each token in nats, fp32 [T], without gradient.

    The cost is one GEMM and one read of the logits. The arguments are those of
    `linear_drgrpo_loss`, but `logits_dtype` defaults to fp32: the log-probs are compared with those
    of another pass."""
    hidden, weight = _autocast(hidden.detach(), weight.detach())
    _check_tensors(hidden, weight, target, None)
    _check_execution(hidden, temperature, chunk_tokens, logits_dtype)
    logits = _logits(logits_dtype or torch.float32, hidden.dtype)
    if resolve_backend(backend, hidden.device) == "triton":
        stat = _triton_logprob_op(hidden, weight, target, temperature, chunk_tokens, *logits)
    else:
        objective = _Objective(temperature=temperature)
        execution = _Execution(chunk_tokens, *logits, backend="torch")
        stat = _chunked_head(hidden, weight, target, None, None, objective, execution).stat
    return stat[0], stat[1]


def linear_drgrpo_loss(
    hidden: Tensor,  # [T, D] fp16, bf16 or fp32
    weight: Tensor,  # [V, D] same dtype
    target: Tensor,  # [T] int32 or int64; -100: ignored; any other id outside [0, V): NaN
    advantage: Tensor,  # [T] fp32
    *,
    old_logprob: Tensor | None = None,  # [T] fp32; None: strictly on-policy, ratio 1 with gradient
    sampler_logprob: Tensor | None = None,  # [T] fp32, what the sampler reported; used with tis_cap
    clip_low: float = 0.2,  # the ratio's bounds are 1 - clip_low and 1 + clip_high
    clip_high: float = 0.2,
    tis_cap: float | None = None,  # weight tokens by min(exp(old - sampler), tis_cap)
    temperature: float = 1.0,  # the sampler's: the logits are divided by it
    scale: float = 1.0,  # factor of the sum over tokens, 1 / (B * C) for Dr. GRPO
    chunk_tokens: int | None = None,  # tokens whose logits exist at a time; None chooses
    logits_dtype: LogitsDtype = None,  # None: fp32 where log-probs are compared, else hidden's
    backend: str = "auto",  # "triton", "torch", or "auto": triton on CUDA
    ref_logprob: Tensor | None = None,  # [T] fp32, a reference model's, for a KL penalty
    kl_coef: float = 0.0,  # 0 with ref_logprob: the KL is a statistic only
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, stats): a scalar in fp32, and statistics of each token, [T], detached.

    stats: `logprob`, `entropy`, `log_ratio`, `tis_weight`, `token_loss` (before `scale`) and, with
    `ref_logprob`, `kl`, in fp32. `clipped` is int8: -1 where the lower bound cut the gradient off,
    +1 where the upper bound did, else 0. Log-probs and entropies are in nats.

    The gradients of `hidden` and `weight` are made in this call. `backward` gives them out once.
    GRPO, DAPO and RLOO are this call with another advantage, because min() commutes with a positive
    weight. `token_objective` states the loss.

    Raises ValueError for arguments that do not fit together, TypeError for a DTensor, RuntimeError
    where the backend cannot run. Source: Liu et al., arXiv 2503.20783."""
    hidden, weight = _autocast(hidden, weight)
    per_token = _PerToken(advantage, old_logprob, sampler_logprob, ref_logprob)
    _check_tensors(hidden, weight, target, per_token)
    _check_execution(hidden, temperature, chunk_tokens, logits_dtype)
    _check_objective(clip_low, clip_high, tis_cap, sampler_logprob, kl_coef, ref_logprob)
    if tis_cap is None:
        per_token, tis_cap = per_token._replace(sampler_logprob=None), math.inf
    if logits_dtype is None:
        compared = any(x is not None for x in per_token[1:])
        logits_dtype = torch.float32 if compared else hidden.dtype
    # As a tensor, another scale does not compile another graph.
    scale_1 = hidden.new_ones(1, dtype=torch.float32) * scale
    objective = _Objective(clip_low, clip_high, tis_cap, temperature, kl_coef)
    grad = torch.is_grad_enabled()
    execution = _Execution(
        chunk_tokens,
        *_logits(logits_dtype, hidden.dtype),
        need_dhidden=grad and hidden.requires_grad,
        need_dweight=grad and weight.requires_grad,
        backend=resolve_backend(backend, hidden.device),
    )
    loss, stat, clipped = _LinearDrGRPO.apply(
        hidden, weight, target, per_token.map(Tensor.detach), scale_1, objective, execution
    )
    return loss, dict(zip(STATS, stat.unbind(), strict=False), clipped=clipped)


def _logits(
    logits_dtype: torch.dtype | Literal["shifted"], dtype: torch.dtype
) -> tuple[torch.dtype, bool]:
    """(type of the logits, whether they are shifted), for inputs of this type."""
    return (dtype, True) if isinstance(logits_dtype, str) else (logits_dtype, False)


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast would do to the inputs of a linear layer."""
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _check_tensors(
    hidden: Tensor, weight: Tensor, target: Tensor, per_token: _PerToken | None
) -> None:
    """Types, shapes and devices."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        if hasattr(x, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor; call the loss in the forward of a module that "
                f"fully_shard() wraps, which unshards it, or pass {name}.full_tensor()"
            )
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)}: must be [T, D], [V, D]; "
            "flatten first"
        )
    floats = (torch.float16, torch.bfloat16, torch.float32)
    if hidden.dtype != weight.dtype or hidden.dtype not in floats:
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: they must be the same of float16, "
            "bfloat16, float32; cast one, or use autocast. In float64 there is the _ref function"
        )
    T, V = hidden.shape[0], weight.shape[0]
    if V == 0:
        raise ValueError("weight has no rows")
    if target.shape != (T,) or target.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"target is {target.dtype} {list(target.shape)}; it must be int32 or int64 [{T}], "
            "as hidden's rows"
        )
    inputs = {} if per_token is None else per_token._asdict()
    for name, x in inputs.items():
        if x is not None and (x.shape != (T,) or x.dtype != torch.float32):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be float32 [{T}]")
    for name, x in {"weight": weight, "target": target, **inputs}.items():
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}; move one")


def _check_execution(
    hidden: Tensor, temperature: float, chunk_tokens: int | None, logits_dtype: LogitsDtype
) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature ({temperature}) must be positive; greedy sampling has no log-probs to "
            "train on"
        )
    if logits_dtype not in (None, torch.float32, hidden.dtype, "shifted"):
        raise ValueError(
            f"logits_dtype ({logits_dtype!r}) must be float32, hidden's {hidden.dtype} or 'shifted'"
        )
    if logits_dtype == "shifted" and hidden.dtype == torch.float32:
        raise ValueError(
            "logits_dtype ('shifted') rounds logits to the 16 bits of the inputs, and hidden is "
            "float32; use None or float32"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens ({chunk_tokens}) must be at least 1; None chooses")


def _check_objective(
    clip_low: float,
    clip_high: float,
    tis_cap: float | None,
    sampler_logprob: Tensor | None,
    kl_coef: float,
    ref_logprob: Tensor | None,
) -> None:
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(
            f"clip_low ({clip_low}) and clip_high ({clip_high}) are distances from 1 and must not "
            "be negative"
        )
    if tis_cap is not None and (sampler_logprob is None or not tis_cap > 0):
        raise ValueError(
            f"tis_cap ({tis_cap}) must be positive and needs sampler_logprob; None turns the "
            "weight off"
        )
    if kl_coef != 0 and ref_logprob is None:
        raise ValueError(f"kl_coef ({kl_coef}) needs ref_logprob")
