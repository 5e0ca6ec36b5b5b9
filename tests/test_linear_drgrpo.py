"""The fused LM head against float64: every output, every gradient, both backends, and the cases
that break such kernels.

    pytest tests/test_linear_drgrpo.py            without a GPU the Triton kernel runs in Triton's interpreter
    pytest tests/test_linear_drgrpo.py -m gpu     real vocabularies, memory, host syncs

Tolerances. In fp32 the error of a log-prob is a few ulps of its logits (|logit| < 50: ulp 4e-6), so
5e-5 bounds it with room; the error of a ratio, and so of the loss and of every gradient, is that
error relative, so norms agree to 1e-5. In bf16 and fp16 the budget is the error that plain autograd
makes in the same dtype, plus 10 %: nothing may be worse than the obvious program. The one
exception: Triton's interpreter truncates where the GPU rounds to nearest, which doubles the error
of what the kernel stores in 16 bits.
"""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from drgrpo.kernels import linear_drgrpo as head
from drgrpo.kernels.linear_drgrpo import (
    LinearDrGRPO,
    linear_drgrpo_loss,
    linear_drgrpo_loss_ref,
    linear_logprob,
    linear_logprob_ref,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
BACKENDS = [
    "torch",
    pytest.param(
        "triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
    ),
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in.*:RuntimeWarning"
)  # numpy, under the interpreter
both = pytest.mark.parametrize("backend", BACKENDS)


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")(test))


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """torch.empty returns NaN in this mode, so an element that nobody writes shows."""
    if DEVICE == "cuda":  # there the mode also refuses cuBLAS without a workspace setting
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Vocabularies of a few hundred then take several blocks and a tail."""
    monkeypatch.setattr(head, "BLOCK_V", 64)
    monkeypatch.setattr(head, "NUM_WARPS", 2)
    monkeypatch.setattr(head, "TUNED", {})


@dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    advantage: torch.Tensor
    old_logprob: torch.Tensor | None = None
    sampler_logprob: torch.Tensor | None = None
    ref_logprob: torch.Tensor | None = None

    def map(self, f):
        return Case(
            *(
                f(getattr(self, x.name)) if getattr(self, x.name) is not None else None
                for x in fields(self)
            )
        )

    def double(self):
        return self.map(lambda x: x.double() if x.is_floating_point() else x)


def make(T, D, V, dtype=torch.float32, seed=0, spread=2.0, offset=0.0, on_policy=False):
    """Logits of standard deviation `spread` around `offset`, targets sampled from them; one
    advantage in five is 0."""
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(T, D, generator=rng),
        torch.randn(V, D, generator=rng) * spread / math.sqrt(D),
    )
    if offset:
        hidden, weight = (
            torch.cat([hidden, torch.full((T, 1), offset)], 1),
            torch.cat([weight, torch.ones(V, 1)], 1),
        )
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    p = (hidden.double() @ weight.double().T).softmax(-1)
    target = (
        torch.multinomial(p, 1, generator=rng)[:, 0] if T else torch.empty(0, dtype=torch.int64)
    )
    advantage = torch.randn(T, generator=rng) * (torch.rand(T, generator=rng) > 0.2)
    case = Case(hidden, weight, target, advantage)
    if not on_policy:
        logprob = p.gather(1, target[:, None])[:, 0].log().float()
        case.old_logprob = logprob + 0.25 * torch.randn(T, generator=rng)
        case.sampler_logprob = case.old_logprob + 0.3 * torch.randn(T, generator=rng)
        case.ref_logprob = logprob + 0.3 * torch.randn(T, generator=rng)
    return case.map(lambda x: x.to(DEVICE))


def run(function, case, upstream=1.0, **options):
    """(loss, stats, dhidden, dweight) of one call and its backward."""
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    given = dict(
        old_logprob=case.old_logprob,
        sampler_logprob=case.sampler_logprob,
        ref_logprob=case.ref_logprob,
    )
    loss, stats = function(hidden, weight, case.target, case.advantage, **(given | options))
    (loss * upstream).backward()
    return loss.detach(), stats, hidden.grad, weight.grad


def distance(x, y):
    """Relative error of x in the Frobenius norm."""
    return ((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30)).item()


def assert_close_to_float64(case, backend, gradient=1e-5, **options):
    loss, stats, dhidden, dweight = run(linear_drgrpo_loss, case, backend=backend, **options)
    loss64, stats64, dhidden64, dweight64 = run(linear_drgrpo_loss_ref, case.double(), **options)
    assert set(stats) == set(stats64)
    assert (stats["logprob"] - stats64["logprob"]).abs().max() <= 5e-5
    assert (stats["entropy"] - stats64["entropy"]).abs().max() <= 1e-4
    assert (stats["log_ratio"] - stats64["log_ratio"]).abs().max() <= 5e-5
    assert distance(stats["tis_weight"], stats64["tis_weight"]) <= 1e-5
    assert torch.equal(stats["clipped"], stats64["clipped"])
    for name in {"token_loss", "kl"} & set(
        stats
    ):  # k3 near 0 cancels: exp(d) - 1 - d is known to an ulp of 1
        assert torch.allclose(stats[name].double(), stats64[name], rtol=1e-4, atol=1e-5)
    scale = abs(options.get("scale", 1.0))
    assert abs(loss - loss64) <= 1e-5 * scale * stats64["token_loss"].abs().sum() + 1e-12
    assert distance(dhidden, dhidden64) <= gradient
    assert distance(dweight, dweight64) <= gradient
    assert all(
        x.dtype == torch.float32 and not x.requires_grad
        for name, x in stats.items()
        if name != "clipped"
    )
    assert stats["clipped"].dtype == torch.int8 and loss.dtype == torch.float32


# ---- the references themselves


def test_reference_is_the_paper_formula():
    """Equation of the loss, written out per response: constant normalizer, no division by length or
    standard deviation."""
    lengths, budget, V, D = [3, 1, 5], 8, 11, 4
    case = make(sum(lengths), D, V, seed=3).double()
    case.advantage = torch.tensor(
        [0.7, -0.3, -0.4], dtype=torch.float64, device=DEVICE
    ).repeat_interleave(torch.tensor(lengths, device=DEVICE))
    total, start = 0.0, 0
    for length in lengths:
        inner = 0.0
        for t in range(start, start + length):
            logits = case.hidden[t] @ case.weight.T
            rho = (logits[case.target[t]] - logits.logsumexp(0) - case.old_logprob[t]).exp().item()
            a = case.advantage[t].item()
            inner += min(rho * a, min(max(rho, 0.8), 1.2) * a)
        total += inner / budget
        start += length
    loss, _ = linear_drgrpo_loss_ref(
        case.hidden,
        case.weight,
        case.target,
        case.advantage,
        old_logprob=case.old_logprob,
        scale=1 / (3 * budget),
    )
    assert loss.item() == pytest.approx(-total / 3, rel=1e-12)


def test_reference_gradient_is_the_finite_difference():
    case = make(4, 3, 7, seed=5).double()
    case.hidden.requires_grad_(), case.weight.requires_grad_()
    options = dict(
        old_logprob=case.old_logprob,
        sampler_logprob=case.sampler_logprob,
        tis_cap=1.1,
        temperature=0.8,
        ref_logprob=case.ref_logprob,
        kl_coef=0.2,
        scale=0.3,
    )
    assert torch.autograd.gradcheck(
        lambda h, w: linear_drgrpo_loss_ref(h, w, case.target, case.advantage, **options)[0],
        (case.hidden, case.weight),
    )


# ---- agreement with float64

OPTIONS = {
    "on_policy": dict(old_logprob=None),
    "off_policy": dict(),
    "narrow_clip": dict(clip_low=0.05, clip_high=0.1),
    "no_clip": dict(clip_low=math.inf, clip_high=math.inf),
    "tis": dict(tis_cap=1.05),
    "tis_on_policy": dict(old_logprob=None, tis_cap=1.3),
    "temperature": dict(temperature=0.6, old_logprob=None),
    "scale": dict(scale=-0.37 / 3000),
    "k3": dict(kl_coef=0.3),
    "k1": dict(kl_coef=0.3, kl="k1"),
    "all": dict(
        tis_cap=1.1, temperature=1.3, scale=1 / 3000, kl_coef=0.1, clip_low=0.2, clip_high=0.28
    ),
}


@both
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_against_float64(backend, options, small_blocks):
    assert_close_to_float64(make(9, 8, 150, seed=1), backend, chunk_tokens=4, **options)


@both
@pytest.mark.parametrize("offset", [0.0, -200.0])
@pytest.mark.parametrize("V", [1, 2, 17, 63, 64, 65, 128, 193, 1000])
def test_vocabulary_sizes(backend, V, offset, small_blocks):
    """All logits far below 0: a column that does not exist, or a maximum that starts at 0, would
    take all the mass. At -200 an fp32 logit has an ulp of 1.5e-5, hence the wider bound on the
    gradient."""
    assert_close_to_float64(
        make(3, 4, V, offset=offset), backend, gradient=1e-5 if offset == 0 else 1e-4
    )


@both
@pytest.mark.parametrize("V", [8191, 8193, 50257, 151_936])
def test_vocabulary_sizes_at_the_real_block(backend, V):
    """The gradient's wider bound is the GEMM's: for two rows it adds V products one after
    another."""
    assert_close_to_float64(make(2, 4, V), backend, gradient=1e-4)


@both
@pytest.mark.parametrize("T", [0, 1, 3, 4, 5, 11])
def test_token_counts_around_the_chunk(backend, T, small_blocks):
    case = make(T, 8, 100)
    loss, stats, dhidden, dweight = run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=4)
    if T:
        assert_close_to_float64(case, backend, chunk_tokens=4)
    else:
        assert loss == 0 and dhidden.shape == (0, 8) and (dweight == 0).all()
        assert all(x.shape == (0,) for x in stats.values())
        assert linear_logprob(case.hidden, case.weight, case.target, backend=backend)[0].shape == (
            0,
        )


def naive(hidden, weight, target, advantage, old_logprob=None, **_):
    """What one writes first: low-precision logits, upcast, autograd. The error budget of the
    low-precision tests."""
    logprob = (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
    ratio = (logprob - (logprob.detach() if old_logprob is None else old_logprob)).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    return loss, {"logprob": logprob.detach()}


@both
@pytest.mark.parametrize("logits", ["hidden's", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_autograd(backend, dtype, logits, small_blocks):
    case = make(48, 32, 300, dtype, seed=2, on_policy=True)
    exact, plain = run(linear_drgrpo_loss_ref, case.double()), run(naive, case)
    loss_dtype = dtype if logits == "hidden's" else torch.float32
    ours = run(linear_drgrpo_loss, case, backend=backend, logits_dtype=loss_dtype, chunk_tokens=16)
    truncates = 2.0 if INTERPRETED and backend == "triton" else 1.0
    for mine, theirs, truth in zip(ours[2:], plain[2:], exact[2:], strict=True):
        assert mine.dtype == dtype
        assert distance(mine, truth) <= 1.1 * truncates * distance(theirs, truth)
    rms = [
        (x[1]["logprob"].double() - exact[1]["logprob"]).square().mean().sqrt()
        for x in (ours, plain)
    ]
    assert rms[0] <= (5e-5 if logits == "fp32" else 1.05 * rms[1])


@both
def test_fp16_gradients_survive_a_tiny_scale(backend, small_blocks):
    """scale = 1e-9 times a loss scaler of 2^28, as in mixed-precision training: in fp16 alone 1e-9
    is 0."""
    case = make(12, 16, 90, torch.float16, seed=4)
    *_, dhidden, dweight = run(
        linear_drgrpo_loss, case, backend=backend, scale=1e-9, upstream=2.0**28
    )
    *_, dhidden64, dweight64 = run(
        linear_drgrpo_loss_ref, case.double(), scale=1e-9, upstream=2.0**28
    )
    assert (
        distance(dhidden, dhidden64) <= 2e-3 and distance(dweight, dweight64) <= 2e-3
    )  # ulp of fp16: 5e-4 to 1e-3


@both
def test_linear_logprob(backend, small_blocks):
    case = make(7, 8, 130, spread=4.0)
    case.hidden.requires_grad_()
    got = linear_logprob(
        case.hidden, case.weight, case.target, temperature=0.7, chunk_tokens=3, backend=backend
    )
    want = linear_logprob_ref(
        case.hidden.double(), case.weight.double(), case.target, temperature=0.7
    )
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.float32 and not x.requires_grad and (x - y).abs().max() <= 5e-5


# ---- rows of given logits: closed forms on exactly the numbers that the row pass reads


def rows(backend, logits, target, advantage=None, grad_dtype=None, **objective):
    """The row pass alone, on-policy unless `old` is given: (stat, clipped, dlogits). Padding and
    outputs start as NaN."""
    T, V = logits.shape
    stride = V if backend == "torch" else -(-V // 16) * 16
    z = torch.full((T, stride), math.nan, dtype=logits.dtype, device=DEVICE)
    z[:, :V] = logits
    stat = torch.full((5, T), math.nan, device=DEVICE)
    clipped = torch.full((T,), 99, dtype=torch.int8, device=DEVICE)
    advantage = torch.ones(T, device=DEVICE) if advantage is None else advantage.to(DEVICE)
    tokens = [advantage, objective.pop("old", None), None, None]
    o = head._Objective(**({"clip_low": 0.2, "clip_high": 0.2} | objective))
    function = head._rows_triton if backend == "triton" else head._rows_torch
    dz = function(z, V, target.to(DEVICE), tokens, o, stat, clipped, grad_dtype or logits.dtype)
    return stat, clipped, dz


def expect(logits, target):
    """(logp, entropy, e - p) in float64."""
    logp = logits.double().log_softmax(-1)
    onehot = torch.nn.functional.one_hot(target, logits.shape[1]).to(logits.device)
    return (
        logp.gather(1, target[:, None].to(logits.device))[:, 0],
        torch.special.entr(logp.exp()).sum(-1),
        onehot - logp.exp(),
    )


HARD = {
    "huge": lambda z: z * 1e4,
    "offset_1e6": lambda z: z.round() + 1e6,  # whole numbers, or the offset rounds them
    "offset_-1e6": lambda z: z.round() - 1e6,
    "uniform": lambda z: torch.zeros_like(z),
    "one_hot": lambda z: torch.where(
        torch.arange(z.shape[1], device=z.device) == 5, 300.0, -300.0
    ).expand_as(z),
    "one_inf": lambda z: z.index_fill(1, torch.tensor([7], device=z.device), -math.inf),
    "all_but_one_inf": lambda z: torch.where(
        torch.arange(z.shape[1], device=z.device) == 5, z, -math.inf
    ),
    "first_block_inf": lambda z: torch.where(
        torch.arange(z.shape[1], device=z.device) < 128, -math.inf, z
    ),
    "very_negative": lambda z: z - 1e5,
}


@both
@pytest.mark.parametrize("name", HARD)
def test_hard_rows(backend, name, small_blocks):
    """A logit of 1e4 has a half-ulp of 5e-4 on its own, but the rows are given, so only sums and
    differences are inexact: 6e-8 of the largest difference in a row."""
    rng = torch.Generator().manual_seed(0)
    logits = HARD[name](torch.randn(4, 200, generator=rng)).to(DEVICE).float()
    target = torch.tensor([5, 140, 150, 199])
    logp, entropy, slope = expect(logits, target)
    stat, _, dz = rows(backend, logits, target)
    finite = (
        logp > -math.inf
    )  # a target of logit -inf: logp = -inf, and on-policy that token cannot have been sampled
    assert torch.equal(stat[0] == -math.inf, ~finite)
    assert ((stat[0] - logp)[finite].abs() <= 5e-6 + 2e-7 * logp[finite].abs()).all()
    assert (stat[1] - entropy).abs().max() <= 1e-5
    assert (dz + slope)[finite].abs().max() <= 2e-6


@both
def test_row_of_only_infinities_is_nan(backend, small_blocks):
    logits = torch.zeros(3, 100, device=DEVICE)
    logits[1] = -math.inf
    stat, _, dz = rows(backend, logits, torch.tensor([0, 1, 2]))
    assert stat[:2, 1].isnan().all() and dz[1].isnan().all()
    assert stat[:, [0, 2]].isfinite().all() and dz[[0, 2]].isfinite().all()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_rounded_logits(backend, dtype, small_blocks):
    """Given 16-bit logits, the arithmetic is fp32: 5e-6, not 2e-2; dlogits are exact but for the
    rounding of the store."""
    logits = (4 * torch.randn(6, 333, generator=torch.Generator().manual_seed(1))).to(DEVICE, dtype)
    target = torch.arange(6) * 60
    logp, entropy, slope = expect(logits, target)
    stat, _, dz = rows(backend, logits, target)
    assert ((stat[0] - logp).abs() <= 5e-6 * logp.abs().clamp(min=1)).all()
    assert (stat[1] - entropy).abs().max() <= 1e-5
    eps = torch.finfo(
        dtype
    ).eps  # twice the error of rounding to nearest: the interpreter truncates
    tiny = torch.finfo(dtype).smallest_normal * eps
    assert ((dz.double() + slope).abs() <= (eps + 1e-5) * slope.abs() + tiny).all()


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("V", [40, 64, 200, 333])
def test_16_bit_gradient_in_the_row_of_fp32_logits(V, small_blocks):
    """dZ takes the upper half of the row that it is computed from: no logit may be overwritten
    before it is read."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    target = torch.tensor([0, V // 2, V - 1])
    slope = expect(logits, target)[2]
    dz = rows("triton", logits, target, grad_dtype=torch.bfloat16)[2]
    assert dz.dtype == torch.bfloat16 and dz.shape == logits.shape
    assert ((dz.double() + slope).abs() <= 2.0**-7 * slope.abs() + 1e-30).all()


@both
@pytest.mark.parametrize("a", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("log_ratio", [0.0, 1e-7, -1e-7, 0.19, -0.25, 80.0, -80.0, 100.0, -100.0])
def test_extreme_ratios(backend, log_ratio, a, small_blocks):
    """Uniform rows: logp = -ln 4 and p = 1/4, so the gradient is g (3/4, -1/4, ...). exp(100)
    overflows fp32: without an advantage the loss is 0 all the same, and where the bound cuts it off
    it is the bound."""
    old = torch.full((1,), -math.log(4) - log_ratio, device=DEVICE)
    stat, clipped, dz = rows(
        backend,
        torch.zeros(1, 4, device=DEVICE),
        torch.tensor([2]),
        torch.full((1,), a),
        old=old,
        clip_high=0.28,
    )
    actual = stat[2].item()  # after the rounding of old
    assert actual == pytest.approx(log_ratio, abs=1e-5)
    rho = math.exp(actual) if actual < 88.7 else math.inf
    cut = rho > 1.28 if a > 0 else (rho < 0.8 and a < 0)
    loss = 0.0 if a == 0 else -a * min(max(rho, 0.8), 1.28) if cut else -a * rho
    g = 0.0 if cut or a == 0 else -a * rho
    assert clipped.item() == (0 if not cut else 1 if a > 0 else -1)
    assert stat[4].item() == pytest.approx(loss, rel=1e-5)
    if math.isinf(g):
        assert not dz.isfinite().any()
    else:
        assert dz[0].tolist() == pytest.approx(
            [-g / 4, -g / 4, g * 3 / 4, -g / 4], rel=1e-5, abs=1e-30
        )


@both
@pytest.mark.parametrize("a", [1.0, -1.0])
def test_exactly_on_the_bound_the_gradient_passes(backend, a, small_blocks):
    """As in torch, where clamp and minimum tie. Ratio 1 between bounds 1 and 1 is exact in every
    arithmetic."""
    logits, target = torch.randn(2, 30, device=DEVICE), torch.tensor([3, 4])
    old = rows(backend, logits, target)[0][0].clone()
    stat, clipped, dz = rows(
        backend, logits, target, torch.full((2,), a), old=old, clip_low=0.0, clip_high=0.0
    )
    assert (stat[2] == 0).all() and (clipped == 0).all()
    assert (dz + a * expect(logits, target)[2]).abs().max() <= 1e-6


# ---- what must surface, and what must not


@both
def test_nan_stays_in_its_row(backend, small_blocks):
    case = make(5, 8, 100, seed=7)
    case.advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 1.0], device=DEVICE)
    _, clean, clean_dhidden, _ = run(linear_drgrpo_loss, case, backend=backend)
    case.hidden = case.hidden.clone()
    case.hidden[2, 3] = math.nan
    loss, stats, dhidden, dweight = run(linear_drgrpo_loss, case, backend=backend)
    other = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert loss.isnan() and dweight.isnan().all() and dhidden[2].isnan().all()
    for name in ("logprob", "entropy", "log_ratio", "token_loss"):
        assert stats[name][2].isnan() and torch.equal(stats[name][other], clean[name][other])
    assert torch.equal(dhidden[other], clean_dhidden[other])


@both
@pytest.mark.parametrize("what", ["advantage", "old_logprob", "sampler_logprob", "ref_logprob"])
def test_nan_in_a_per_token_input_surfaces(backend, what, small_blocks):
    case = make(3, 8, 70, seed=8)
    case.advantage = torch.ones(3, device=DEVICE)
    getattr(case, what)[1] = math.nan
    loss, stats, dhidden, _ = run(
        linear_drgrpo_loss, case, backend=backend, tis_cap=2.0, kl_coef=0.1
    )
    assert loss.isnan() and stats["token_loss"].isnan().tolist() == [False, True, False]
    assert dhidden.isnan().any(1).tolist() == [False, True, False]


@both
def test_watching_the_kl_costs_no_gradient(backend, small_blocks):
    """kl_coef = 0 with a reference so far away that k3 overflows: the statistic says so, the loss
    does not notice."""
    case = make(3, 8, 70, seed=8)
    case.ref_logprob = torch.full((3,), 200.0, device=DEVICE)
    got, want = (
        run(linear_drgrpo_loss, case, backend=backend),
        run(linear_drgrpo_loss, case, backend=backend, ref_logprob=None),
    )
    assert got[1]["kl"].isinf().all() and "kl" not in want[1]
    assert (
        torch.equal(got[0], want[0])
        and torch.equal(got[2], want[2])
        and torch.equal(got[3], want[3])
    )


@both
def test_infinite_advantage_surfaces(backend, small_blocks):
    case = make(3, 8, 70, seed=8)
    case.advantage[1] = math.inf
    loss, _, dhidden, _ = run(linear_drgrpo_loss, case, backend=backend)
    assert not loss.isfinite() and dhidden.isfinite().all(1).tolist() == [True, False, True]


@both
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_targets(backend, dtype, small_blocks):
    """First and last id, ignored, out of range on both sides; ids that start in the middle of an
    aligned word. A row of 96 logits has no padding: the id 96 would find the next row's first
    logit."""
    V = 96
    case = make(6, 8, V, seed=9, on_policy=True)
    case.advantage = torch.ones(6, device=DEVICE)
    case.target = torch.tensor([7, 0, V - 1, -100, V, -1, 3], dtype=dtype, device=DEVICE)[1:]
    _, stats, dhidden, dweight = run(linear_drgrpo_loss, case, backend=backend)
    assert stats["logprob"].isnan().tolist() == [False, False, False, True, True, False]
    assert (
        dhidden.isnan().all(1).tolist() == [False, False, False, True, True, False]
        and dweight.isnan().all()
    )
    for name, x in stats.items():
        assert x[2] == (1 if name == "tis_weight" else 0)
    assert (dhidden[2] == 0).all()
    logprob, entropy = linear_logprob(case.hidden, case.weight, case.target, backend=backend)
    assert torch.equal(logprob.isnan(), stats["logprob"].isnan()) and entropy[2] == 0
    keep = torch.tensor([0, 1, 5], device=DEVICE)
    assert_close_to_float64(
        replace(case, **{x: getattr(case, x)[keep] for x in ("hidden", "target", "advantage")}),
        backend,
    )


@both
@pytest.mark.parametrize("how", ["ignored", "no_advantage"])
def test_nothing_to_learn_is_exactly_zero(backend, how, small_blocks):
    case = make(6, 8, 100, seed=10)
    case.hidden[0] = math.nan  # not even a broken row reaches the gradient
    if how == "ignored":
        case.target.fill_(-100)
    else:
        case.advantage.zero_()
    loss, stats, dhidden, _ = run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=4)
    assert loss == 0 and (dhidden == 0).all() and (stats["clipped"] == 0).all()
    # 0 * NaN of the hidden state is NaN in the GEMM of dW, as it should be: only dropping the token
    # avoids it.
    case.hidden[0] = 0.0
    assert (run(linear_drgrpo_loss, case, backend=backend)[3] == 0).all()


@both
def test_dropping_tokens_without_advantage_changes_nothing(backend, small_blocks):
    case = make(20, 8, 100, seed=11)
    keep = case.advantage != 0
    assert 0 < keep.sum() < 20
    full = run(linear_drgrpo_loss, case, backend=backend)
    some = Case(
        case.hidden[keep], case.weight, *(getattr(case, f.name)[keep] for f in fields(case)[2:])
    )
    part = run(linear_drgrpo_loss, some, backend=backend)
    assert full[0] == pytest.approx(part[0].item(), rel=1e-6)
    assert distance(full[2][keep], part[2]) <= 1e-6 and distance(full[3], part[3]) <= 1e-6


# ---- one pass and another


@both
@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_a_separate_pass_gives_ratio_one_exactly(backend, logits_dtype, small_blocks):
    case = make(10, 16, 130, torch.bfloat16, seed=12, on_policy=True)
    how = dict(chunk_tokens=4, backend=backend, logits_dtype=logits_dtype)
    old, entropy = linear_logprob(case.hidden, case.weight, case.target, **how)
    _, stats, dhidden, dweight = run(linear_drgrpo_loss, case, old_logprob=old, **how)
    assert (stats["log_ratio"] == 0).all() and torch.equal(stats["entropy"], entropy)
    same = run(linear_drgrpo_loss, case, **(how | dict(logits_dtype=logits_dtype or torch.float32)))
    assert torch.equal(same[1]["logprob"], old)
    assert torch.equal(same[2], dhidden) and torch.equal(
        same[3], dweight
    )  # on-policy is old = own log-prob


@both
def test_sampler_log_probs_that_are_not_used_change_nothing(backend, small_blocks):
    """Without a cap they weigh nothing, and must not buy fp32 logits either."""
    case = make(10, 16, 130, torch.bfloat16, seed=12, on_policy=True)
    plain, given = (
        run(linear_drgrpo_loss, case, backend=backend, sampler_logprob=sampler, chunk_tokens=4)
        for sampler in (None, torch.full((10,), -3.0, device=DEVICE))
    )
    assert torch.equal(plain[1]["logprob"], given[1]["logprob"]) and torch.equal(plain[3], given[3])
    fp32 = run(
        linear_drgrpo_loss, case, backend=backend, logits_dtype=torch.float32, chunk_tokens=4
    )
    assert not torch.equal(plain[1]["logprob"], fp32[1]["logprob"]), (
        "this case cannot tell bf16 logits from fp32 ones"
    )


@both
def test_repeating_gives_the_same_bits(backend, small_blocks):
    case = make(10, 16, 130, seed=13)
    one, two = (
        run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=4, tis_cap=1.2)
        for _ in range(2)
    )
    assert (
        torch.equal(one[0], two[0]) and torch.equal(one[2], two[2]) and torch.equal(one[3], two[3])
    )
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])


@both
def test_chunks_change_nothing_but_rounding(backend, small_blocks):
    case = make(13, 16, 130, seed=14)
    whole = run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=13)
    for chunk in (1, 5, 12, 100):
        parts = run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=chunk)
        assert (parts[1]["logprob"] - whole[1]["logprob"]).abs().max() <= 1e-5
        assert distance(parts[2], whole[2]) <= 2e-6 and distance(parts[3], whole[3]) <= 2e-6


@both
def test_micro_batches_add_up(backend, small_blocks):
    case = make(12, 16, 130, seed=15)
    whole = run(linear_drgrpo_loss, case, backend=backend, scale=0.1)
    cut = [slice(0, 5), slice(5, 12)]
    parts = [
        run(
            linear_drgrpo_loss,
            Case(
                case.hidden[c], case.weight, *(getattr(case, f.name)[c] for f in fields(case)[2:])
            ),
            backend=backend,
            scale=0.1,
        )
        for c in cut
    ]
    assert whole[0] == pytest.approx(sum(p[0].item() for p in parts), rel=1e-5)
    assert distance(torch.cat([p[2] for p in parts]), whole[2]) <= 2e-6
    assert distance(parts[0][3] + parts[1][3], whole[3]) <= 2e-6


@both
def test_layouts(backend, small_blocks):
    """Hidden states as a view of a wider tensor, a weight stored transposed, a view [B, L, D]
    flattened."""
    case = make(12, 16, 130, seed=16)
    want = run(linear_drgrpo_loss, case, backend=backend)
    wide = torch.randn(12, 40, device=DEVICE)
    wide[:, 8:24] = case.hidden
    for strange in (
        replace(case, hidden=wide[:, 8:24]),
        replace(case, weight=case.weight.t().contiguous().t()),
        replace(
            case,
            hidden=case.hidden.view(3, 4, 16)
            .transpose(0, 1)
            .contiguous()
            .transpose(0, 1)
            .flatten(0, 1),
        ),
        replace(
            case,
            old_logprob=case.old_logprob.repeat_interleave(2)[::2],
            target=case.target.repeat_interleave(2)[::2],
        ),
    ):
        got = run(linear_drgrpo_loss, strange, backend=backend)
        assert distance(got[2], want[2]) <= 2e-6 and distance(got[3], want[3]) <= 2e-6


def test_inputs_are_not_changed():
    case = make(6, 8, 50, seed=17)
    before = case.map(torch.clone)
    run(linear_drgrpo_loss, case, tis_cap=1.1, kl_coef=0.1)
    linear_logprob(case.hidden, case.weight, case.target)
    assert all(torch.equal(getattr(case, f.name), getattr(before, f.name)) for f in fields(case))


# ---- gradients: who gets one, how often, with what factor


class Tape(TorchDispatchMode):
    """The largest tensor made, and every GEMM."""

    def __init__(self):
        super().__init__()
        self.largest, self.gemms = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.gemms += "mm" in func.__name__
        self.largest = max(
            [
                self.largest,
                *(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if x is not None),
            ]
        )
        return out


@pytest.fixture
def tape(monkeypatch):
    tape, original = Tape(), head._head

    def recorded(*args):
        with tape:
            original(*args)

    monkeypatch.setattr(head, "_head", recorded)
    return tape


@pytest.mark.parametrize(
    ("hidden", "weight", "gemms"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)],
)
def test_gemms_that_are_not_needed_are_not_done(tape, hidden, weight, gemms):
    case = make(8, 8, 50, on_policy=True)
    case.hidden.requires_grad_(hidden), case.weight.requires_grad_(weight)
    loss, _ = linear_drgrpo_loss(
        case.hidden, case.weight, case.target, case.advantage, backend="torch", chunk_tokens=4
    )
    assert tape.gemms == 2 * gemms and loss.requires_grad == (hidden or weight)
    if hidden or weight:
        loss.backward()
        assert (case.hidden.grad is not None) == hidden and (case.weight.grad is not None) == weight


def test_without_grad_mode_there_is_one_gemm(tape):
    case = make(8, 8, 50)
    case.hidden.requires_grad_(), case.weight.requires_grad_()
    with torch.no_grad():
        loss, _ = linear_drgrpo_loss(
            case.hidden, case.weight, case.target, case.advantage, backend="torch"
        )
    assert tape.gemms == 1 and not loss.requires_grad


def test_no_tensor_is_as_large_as_the_logits(tape):
    T, V, chunk = 64, 500, 8
    case = make(T, 4, V)
    run(linear_drgrpo_loss, case, backend="torch", chunk_tokens=chunk)
    assert chunk * V <= tape.largest < T * V / 4


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_factor(backend, dtype, small_blocks):
    """-0.3 is no bf16 number, and must not become one: the product is rounded, not its factors."""
    case = make(6, 8, 90, dtype, seed=18)
    one, two = (
        run(linear_drgrpo_loss, case, backend=backend),
        run(linear_drgrpo_loss, case, backend=backend, upstream=-0.3),
    )
    assert torch.equal(two[2], (one[2].float() * torch.tensor(-0.3)).to(dtype))
    assert distance(two[3], -0.3 * one[3].double()) <= 2 * torch.finfo(dtype).eps


def test_second_backward_is_refused():
    case = make(4, 8, 50)
    case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss, _ = linear_drgrpo_loss(case.hidden, case.weight, case.target, case.advantage)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Call linear_drgrpo_loss again"):
        loss.backward()


def test_no_gradient_of_the_gradient():
    case = make(4, 8, 50)
    case.hidden.requires_grad_()
    loss, _ = linear_drgrpo_loss(case.hidden, case.weight, case.target, case.advantage)
    (gradient,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.sum().backward()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_main_grad_accumulates_in_fp32(backend, dtype, small_blocks):
    case = make(9, 8, 90, dtype, seed=19)
    start = torch.randn(case.weight.shape, device=DEVICE)
    main_grad, main_grad_ref = start.clone(), start.double()
    got = run(
        linear_drgrpo_loss, case, backend=backend, chunk_tokens=4, main_grad=main_grad, scale=0.3
    )
    run(linear_drgrpo_loss_ref, case.double(), main_grad=main_grad_ref, scale=0.3)
    plain = run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=4, scale=0.3)
    assert got[3] is None and torch.equal(got[2], plain[2])
    assert distance(main_grad - start, main_grad_ref - start.double()) <= (
        1e-5 if dtype == torch.float32 else 2e-3
    )


def test_main_grad_refuses_an_upstream_factor_with_nan():
    """dW was added for a factor of 1. A host check would cost a sync, so the wrong result is made
    visible instead."""
    case = make(4, 8, 50)
    main_grad = torch.zeros_like(case.weight)
    *_, dhidden, _ = run(linear_drgrpo_loss, case, main_grad=main_grad, upstream=0.5)
    assert dhidden.isnan().all() and main_grad.isnan().any()


def test_tied_weights():
    """One parameter as embedding and head: both gradients arrive."""
    V, D, ids = 40, 8, torch.tensor([1, 5, 9], device=DEVICE)

    def gradient(function, dtype):
        weight = (
            torch.randn(V, D, generator=torch.Generator().manual_seed(0))
            .to(DEVICE, dtype)
            .requires_grad_()
        )
        advantage = torch.tensor([1.0, -1.0, 0.5], device=DEVICE, dtype=dtype)
        function(torch.nn.functional.embedding(ids, weight), weight, ids + 1, advantage)[
            0
        ].backward()
        return weight.grad

    assert (
        distance(
            gradient(linear_drgrpo_loss, torch.float32),
            gradient(linear_drgrpo_loss_ref, torch.float64),
        )
        <= 1e-5
    )


@both
def test_autocast(backend, small_blocks):
    """fp32 master weights under autocast: computed in bf16, gradients in fp32."""
    case = make(8, 16, 100, seed=20, on_policy=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        _, stats, dhidden, dweight = run(
            linear_drgrpo_loss, case, backend=backend, logits_dtype=torch.float32
        )
        logprob, _ = linear_logprob(case.hidden, case.weight, case.target, backend=backend)
    want = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    _, stats16, dhidden16, dweight16 = run(
        linear_drgrpo_loss, want, backend=backend, logits_dtype=torch.float32
    )
    assert dhidden.dtype == dweight.dtype == torch.float32
    assert torch.equal(stats["logprob"], stats16["logprob"]) and torch.equal(
        logprob, stats["logprob"]
    )
    assert torch.equal(dhidden, dhidden16.float()) and torch.equal(dweight, dweight16.float())


# ---- around the operator


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_compile_sees_one_node(with_main_grad):
    graphs = []

    def backend(graph, inputs):
        graphs.append(
            [
                str(node.target)
                for m in graph.modules()
                if hasattr(m, "graph")
                for node in m.graph.nodes
            ]
        )
        return graph

    def step(hidden, weight, main_grad):
        options = dict(tis_cap=1.2, scale=0.5, main_grad=main_grad) | given
        loss, stats = linear_drgrpo_loss(hidden * 2, weight, case.target, case.advantage, **options)
        return loss * 3 if main_grad is None else loss, stats["entropy"].mean()

    case = make(6, 8, 50, seed=21)
    given = dict(old_logprob=case.old_logprob, sampler_logprob=case.sampler_logprob)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        hidden, weight = (
            case.hidden.detach().requires_grad_(),
            case.weight.detach().requires_grad_(),
        )
        main_grad = torch.zeros_like(weight) if with_main_grad else None
        loss, entropy = function(hidden, weight, main_grad)
        loss.backward()
        results.append(
            (loss.detach(), entropy, hidden.grad, main_grad if with_main_grad else weight.grad)
        )
    assert len(graphs) == 1 and sum("drgrpo" in name for name in graphs[0]) == 1
    assert not any("mm" in name for name in graphs[0])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_operators_pass_torch_own_checks():
    case = make(5, 8, 30, seed=22)
    args = (case.target, case.advantage, case.old_logprob, None, None)
    rest = (1.0, True, True, 0.2, 0.2, 0.0, 1.0, 1.0, 0.0, "k3", 2, torch.float32, "torch")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        head._linear_drgrpo_op, (case.hidden, case.weight, *args, None, *rest), test_utils=checks
    )
    main_grad = torch.zeros_like(case.weight)
    torch.library.opcheck(
        head._linear_drgrpo_op,
        (case.hidden, case.weight, *args, main_grad, *rest),
        test_utils=checks,
    )
    args = (case.hidden, case.weight, case.target, 1.0, 2, torch.float32, "torch")
    torch.library.opcheck(head._linear_logprob_op, args, test_utils=checks)


def test_module_is_the_function():
    case = make(5, 8, 30, seed=23)
    lm_head = torch.nn.Linear(8, 30, bias=False, device=DEVICE)
    lm_head.weight = torch.nn.Parameter(case.weight)
    module = LinearDrGRPO(lm_head)
    loss, stats = module(case.hidden, case.target, case.advantage, old_logprob=case.old_logprob)
    want, _ = linear_drgrpo_loss(
        case.hidden, case.weight, case.target, case.advantage, old_logprob=case.old_logprob
    )
    assert torch.equal(loss, want) and loss.requires_grad
    assert torch.equal(module(case.hidden, case.target)[0], stats["logprob"])
    with pytest.raises(ValueError, match="bias"):
        LinearDrGRPO(torch.nn.Linear(8, 30))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_fsdp_unshards_for_the_module_and_a_sharded_weight_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        case = make(5, 8, 30, seed=24).map(torch.Tensor.cpu)
        module = LinearDrGRPO(torch.nn.Linear(8, 30, bias=False))
        with torch.no_grad():
            module.lm_head.weight.copy_(case.weight)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"full_tensor\(\)"):
            linear_drgrpo_loss(case.hidden, module.lm_head.weight, case.target, case.advantage)
        loss, _ = module(case.hidden, case.target, case.advantage, old_logprob=case.old_logprob)
        loss.backward()
        want = run(linear_drgrpo_loss, case)
        assert torch.equal(loss.detach(), want[0]) and torch.equal(
            module.lm_head.weight.grad.full_tensor(), want[3]
        )
    finally:
        torch.distributed.destroy_process_group()


WRONG = {
    "hidden_3d": (dict(hidden=torch.zeros(1, 4, 8)), ValueError, r"\[1, 4, 8\].*flatten"),
    "width": (dict(hidden=torch.zeros(4, 9)), ValueError, r"\[4, 9\]"),
    "float64": (dict(hidden=torch.zeros(4, 8).double()), ValueError, "float64"),
    "mixed": (dict(hidden=torch.zeros(4, 8).bfloat16()), ValueError, "autocast"),
    "target_shape": (
        dict(target=torch.zeros(5, dtype=torch.int64)),
        ValueError,
        r"target is torch.int64 \[5\]",
    ),
    "target_dtype": (dict(target=torch.zeros(4)), ValueError, "int32 or int64"),
    "advantage_dtype": (
        dict(advantage=torch.zeros(4).double()),
        ValueError,
        "advantage is torch.float64",
    ),
    "old_shape": (
        dict(old_logprob=torch.zeros(3)),
        ValueError,
        r"old_logprob is torch.float32 \[3\]",
    ),
    "device": (dict(advantage=torch.zeros(4, device="meta")), ValueError, "advantage is on meta"),
    "temperature": (dict(temperature=0.0), ValueError, r"temperature \(0.0\)"),
    "clip": (dict(clip_low=-0.1), ValueError, r"clip_low \(-0.1\)"),
    "tis_without_sampler": (dict(tis_cap=2.0), ValueError, "needs sampler_logprob"),
    "tis_cap": (dict(tis_cap=0.0, sampler_logprob=torch.zeros(4)), ValueError, r"tis_cap \(0.0\)"),
    "kl_without_ref": (dict(kl_coef=0.1), ValueError, "needs ref_logprob"),
    "kl": (dict(kl="k2", ref_logprob=torch.zeros(4)), ValueError, "k2"),
    "chunk": (dict(chunk_tokens=0), ValueError, r"chunk_tokens \(0\)"),
    "logits_dtype": (dict(logits_dtype=torch.float16), ValueError, "float16"),
    "backend": (dict(backend="cuda"), ValueError, "'cuda'"),
    "main_grad_frozen": (
        dict(main_grad=torch.zeros(20, 8)),
        ValueError,
        "does not require a gradient",
    ),
    "main_grad_dtype": (
        dict(weight=torch.zeros(20, 8, requires_grad=True), main_grad=torch.zeros(20, 8).half()),
        ValueError,
        "float16",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_value(name):
    change, kind, message = WRONG[name]
    args = dict(
        hidden=torch.zeros(4, 8),
        weight=torch.zeros(20, 8),
        target=torch.zeros(4, dtype=torch.int64),
    )
    with pytest.raises(kind, match=message):
        linear_drgrpo_loss(**(args | dict(advantage=torch.zeros(4)) | change))


def test_without_triton_the_torch_backend_works():
    """A machine for which there is no Triton wheel."""
    code = """
import sys, torch
sys.modules["triton"] = None
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss
a = (torch.ones(3, 4), torch.ones(9, 4), torch.zeros(3, dtype=torch.int64), torch.ones(3))
assert linear_drgrpo_loss(*a)[0] == -3
try: linear_drgrpo_loss(*a, backend="triton")
except RuntimeError as error: print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0 and "pip install triton" in done.stdout, done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
def test_compiled_triton_refuses_cpu_tensors(monkeypatch):
    import triton

    monkeypatch.setattr(head, "_drgrpo_row_kernel", triton.JITFunction(head._drgrpo_row_kernel.fn))
    case = make(3, 4, 9).map(torch.Tensor.cpu)
    with pytest.raises(RuntimeError, match=r"the tensors are on cpu.*TRITON_INTERPRET=1"):
        linear_logprob(case.hidden, case.weight, case.target, backend="triton")
    assert (
        linear_logprob(case.hidden, case.weight, case.target)[0].isfinite().all()
    )  # auto: torch on the CPU


@pytest.mark.parametrize("V", [1, 7, 260, 32_000, 151_936, 152_064, 10**7])
@pytest.mark.parametrize("T", [0, 1, 127, 4096, 16_384, 65_537])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_cover_the_tokens_within_the_budget(T, V, device):
    chunk = head._chunk(T, V, torch.device(device))
    assert chunk % 128 == 0 and (chunk == 128 or chunk * V <= head.CHUNK_LOGITS[device])
    count = -(-T // chunk)
    assert count * chunk - T < 128 * max(count, 1) + 128  # balanced: the last chunk is not a sliver
    if device == "cuda" and V > 150_000 and T >= 4096 and V < 10**6:
        assert chunk == 4096 or T % 4096


def test_random_shapes_and_options():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        T=st.integers(1, 9),
        D=st.integers(1, 9),
        V=st.integers(1, 150),
        chunk=st.integers(1, 10),
        seed=st.integers(0, 10**6),
        spread=st.floats(0.0, 4.0),
        temperature=st.floats(0.3, 3.0),
        clip_low=st.floats(0, 1),
        clip_high=st.floats(0, 2),
        tis_cap=st.none() | st.floats(0.5, 3),
        on_policy=st.booleans(),
        scale=st.floats(-10, 10),
        kl=st.sampled_from(["k1", "k3"]),
        kl_coef=st.sampled_from([0.0, 0.1]),
        backend=st.sampled_from(["torch", "triton"]),
        block=st.sampled_from([16, 64, 256]),
    )
    def check(T, D, V, chunk, seed, spread, on_policy, backend, block, scale, **options):
        hypothesis.assume(scale == 0 or abs(scale) > 1e-3)
        case = make(T, D, V, seed=seed, spread=spread)
        if on_policy:
            case.old_logprob = None
        if backend == "triton" and find_spec("triton") is None:
            backend = "torch"
        _, stats = linear_drgrpo_loss_ref(
            *(
                x.double() if x.is_floating_point() else x
                for x in (case.hidden, case.weight, case.target, case.advantage)
            ),
            old_logprob=case.old_logprob,
            temperature=options["temperature"],
        )
        ratio = stats["log_ratio"].exp()
        for bound in (
            1 - options["clip_low"],
            1 + options["clip_high"],
        ):  # a ratio on the bound may fall on either side
            hypothesis.assume(on_policy or ((ratio - bound).abs() > 1e-4).all())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "BLOCK_V", block)
            patch.setattr(head, "NUM_WARPS", 1)
            patch.setattr(head, "TUNED", {})
            assert_close_to_float64(
                case, backend, gradient=1e-4, chunk_tokens=chunk, scale=scale, **options
            )

    check()


# ---- what only a GPU can show


def large(T, D, V, seed=0, dtype=torch.bfloat16):
    """Realistic entropies, made on the device."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    hidden = torch.randn(T, D, generator=rng, device=DEVICE).to(dtype)
    weight = (torch.randn(V, D, generator=rng, device=DEVICE) * 3 / math.sqrt(D)).to(dtype)
    target = torch.randint(V, (T,), generator=rng, device=DEVICE)
    return Case(hidden, weight, target, torch.randn(T, generator=rng, device=DEVICE))


@gpu
@pytest.mark.parametrize("V", [128_256, 151_936, 152_064, 50_257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_real_vocabularies(V, dtype):
    """In fp32 the GEMM of dX adds V products, hence the wider bound on the gradient."""
    case = large(256, 128, V, dtype=dtype)
    exact, plain = run(linear_drgrpo_loss_ref, case.double()), run(naive, case)
    for logits_dtype in {dtype, torch.float32}:
        loss, stats, *gradients = run(
            linear_drgrpo_loss, case, chunk_tokens=100, logits_dtype=logits_dtype
        )
        rms = [
            (x["logprob"] - exact[1]["logprob"]).square().mean().sqrt() for x in (stats, plain[1])
        ]
        assert rms[0] <= (5e-5 if logits_dtype == torch.float32 else 1.05 * rms[1])
        assert loss == pytest.approx(exact[0].item(), rel=1e-5, abs=1e-3)
        for mine, theirs, truth in zip(gradients, plain[2:], exact[2:], strict=True):
            assert distance(mine, truth) <= (
                1e-4 if dtype == torch.float32 else min(1.1 * distance(theirs, truth), 1e-2)
            )


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_off_policy_terms_against_float64(dtype):
    """Ratio, both bounds, sampler weight and KL, compiled; ratios near a bound may fall on either
    side of it in bf16."""
    case = large(300, 64, 32_000, dtype=dtype)
    logprob, _ = linear_logprob_ref(case.hidden.double(), case.weight.double(), case.target)
    noise = torch.randn(2, 300, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    case.old_logprob = (
        logprob.float() + torch.where(noise[0].abs() > 0.7, 0.5, 0.05) * noise[0].sign()
    )
    case.sampler_logprob, case.ref_logprob = (
        case.old_logprob + 0.3 * noise[1],
        logprob.float() + 0.3 * noise[0],
    )
    options = dict(tis_cap=1.1, kl_coef=0.1, scale=1 / 3000)
    if dtype == torch.float32:
        return assert_close_to_float64(case, "triton", gradient=1e-4, chunk_tokens=128, **options)
    got, exact = (
        run(linear_drgrpo_loss, case, **options),
        run(linear_drgrpo_loss_ref, case.double(), **options),
    )
    assert (got[1]["logprob"] - exact[1]["logprob"]).abs().max() <= 5e-5, (
        "compared log-probs come from fp32 logits"
    )
    assert torch.equal(got[1]["clipped"], exact[1]["clipped"]) and got[1]["clipped"].any()
    assert distance(got[2], exact[2]) <= 1e-2 and distance(got[3], exact[3]) <= 1e-2


@gpu
@pytest.mark.parametrize(
    "what", ["hidden", "advantage", "old_logprob", "sampler_logprob", "ref_logprob"]
)
def test_gpu_nan_surfaces(what):
    """The hardware's minimum and maximum drop a NaN; the interpreter's keep it, so only a card can
    tell."""
    case = large(64, 32, 20_000, dtype=torch.float32)
    case.advantage = case.advantage.abs() + 0.1
    case.old_logprob = linear_logprob(case.hidden, case.weight, case.target)[0]
    case.sampler_logprob, case.ref_logprob = case.old_logprob.clone(), case.old_logprob.clone()
    getattr(case, what)[5] = math.nan
    loss, stats, dhidden, _ = run(linear_drgrpo_loss, case, tis_cap=2.0, kl_coef=0.1)
    broken = torch.arange(64, device=DEVICE) == 5
    assert (
        loss.isnan()
        and torch.equal(stats["token_loss"].isnan(), broken)
        and torch.equal(dhidden.isnan().any(1), broken)
    )


@gpu
def test_gpu_chunk_of_more_than_2_31_logits():
    T, D, V = 16_384, 32, 152_064
    case = large(T, D, V)
    assert T * V > 2**31
    _, stats, dhidden, _ = run(linear_drgrpo_loss, case, chunk_tokens=T)
    last = slice(T - 64, T)
    tail = Case(case.hidden[last], case.weight, case.target[last], case.advantage[last])
    _, tail_stats, tail_dhidden, _ = run(linear_drgrpo_loss, tail)
    assert (
        stats["logprob"][last] - tail_stats["logprob"]
    ).abs().max() <= 0.1  # an ulp of a bf16 logit, if cuBLAS differs
    assert distance(dhidden[last], tail_dhidden) <= 1e-2


@gpu
def test_gpu_more_tokens_than_a_second_grid_dimension_holds():
    case = large(70_000, 16, 320)
    _, stats, dhidden, _ = run(linear_drgrpo_loss, case, chunk_tokens=70_000)
    exact = run(linear_drgrpo_loss_ref, case.double())
    assert (stats["logprob"] - exact[1]["logprob"]).abs().max() <= 0.1 and distance(
        dhidden, exact[2]
    ) <= 1e-2


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_no_host_sync(dtype):
    case = large(512, 64, 32_000, dtype=dtype)
    old = linear_logprob(case.hidden, case.weight, case.target)[0]
    options = dict(
        old_logprob=old,
        sampler_logprob=old,
        tis_cap=2.0,
        ref_logprob=old,
        kl_coef=0.1,
        chunk_tokens=256,
    )
    run(linear_drgrpo_loss, case, **options)  # compiles
    case.hidden.requires_grad_(), case.weight.requires_grad_()
    main_grad = torch.zeros(32_000, 64, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprob(case.hidden, case.weight, case.target)
        for more in ({}, dict(main_grad=main_grad)):
            linear_drgrpo_loss(
                case.hidden, case.weight, case.target, case.advantage, **options, **more
            )[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize(("D", "V"), [(1536, 151_936), (3584, 152_064)])
def test_gpu_memory_is_the_formula(D, V):
    T, C = 8192, 4096
    case = large(T, D, V)
    run(linear_drgrpo_loss, large(128, D, V))  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(linear_drgrpo_loss, case, chunk_tokens=C)
    peak = torch.cuda.max_memory_allocated() - before
    forward, backward = 2 * C * V + 4 * V * D + 2 * T * D, 4 * V * D + 2 * V * D + 2 * T * D
    assert peak <= max(forward, backward) + 64e6


@gpu
def test_gpu_same_bits_twice():
    case = large(2048, 256, 151_936)
    one, two = (run(linear_drgrpo_loss, case, chunk_tokens=1024) for _ in range(2))
    assert (
        torch.equal(one[0], two[0]) and torch.equal(one[2], two[2]) and torch.equal(one[3], two[3])
    )
