"""Helpers of the tests of the fused head: random cases, one call with its backward pass, and the
comparison with float64.

Tolerances. In fp32 the error of a log-prob is a few ulps of its logits (|logit| < 50, ulp 4e-6), so
5e-5 bounds it with room. The ratio has that error as a relative error, and so have the loss and
every gradient: norms agree to 1e-5. In bf16 and fp16 the budget is the error that plain autograd
makes in the same dtype, plus 10 %. Triton's interpreter is the one exception: it truncates where
the GPU rounds to nearest, which doubles the error of what the kernel stores in 16 bits.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec

import pytest
import torch

from drgrpo.kernels import linear_drgrpo as head
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss, linear_drgrpo_loss_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
both = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
ignore_numpy_warnings = pytest.mark.filterwarnings(  # numpy computes in the interpreter
    "ignore:.*encountered in.*:RuntimeWarning"
)


@contextmanager
def uninitialized_memory_is_nan():
    """torch.empty returns NaN in this mode, so an element that nobody writes shows."""
    if DEVICE == "cuda":  # there the mode also refuses cuBLAS without a workspace setting
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def use_blocks(monkeypatch, block_v, num_warps):
    """With a block of 64, vocabularies of a few hundred take several blocks and a tail."""
    monkeypatch.setattr(head, "BLOCK_V", block_v)
    monkeypatch.setattr(head, "NUM_WARPS", num_warps)
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

    def map(self, function):
        tensors = (getattr(self, field.name) for field in fields(self))
        return Case(*(None if x is None else function(x) for x in tensors))

    def double(self):
        return self.map(lambda x: x.double() if x.is_floating_point() else x)

    def tokens(self, index):
        """The case of these tokens only."""
        chosen = self.map(lambda x: x[index] if len(x) == len(self.hidden) else x)
        return replace(chosen, weight=self.weight)

    def grad_inputs(self, hidden=True, weight=True):
        """The positional arguments, of which these require a gradient."""
        return (
            self.hidden.detach().requires_grad_(hidden),
            self.weight.detach().requires_grad_(weight),
            self.target,
            self.advantage,
        )


def make(T, D, V, dtype=torch.float32, seed=0, spread=2.0, offset=0.0, on_policy=False):
    """Logits of standard deviation `spread` around `offset`, targets sampled from them. One
    advantage in five is 0."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=rng)
    weight = torch.randn(V, D, generator=rng) * spread / math.sqrt(D)
    if offset:
        hidden = torch.cat([hidden, torch.full((T, 1), offset)], 1)
        weight = torch.cat([weight, torch.ones(V, 1)], 1)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    p = (hidden.double() @ weight.double().T).softmax(-1)
    target = torch.empty(0, dtype=torch.int64)
    if T:
        target = torch.multinomial(p, 1, generator=rng)[:, 0]
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
    hidden, weight, target, advantage = case.grad_inputs()
    names = ("old_logprob", "sampler_logprob", "ref_logprob")
    options = {name: getattr(case, name) for name in names} | options
    loss, stats = function(hidden, weight, target, advantage, **options)
    (loss * upstream).backward()
    return loss.detach(), stats, hidden.grad, weight.grad


def naive(hidden, weight, target, advantage, old_logprob=None, **_):
    """What one writes first: low-precision logits, upcast, autograd. The error budget of the
    low-precision tests."""
    logprob = (hidden @ weight.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
    ratio = (logprob - (logprob.detach() if old_logprob is None else old_logprob)).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    return loss, {"logprob": logprob.detach()}


def distance(x, y, floor=0.0):
    """Error of x in the Frobenius norm, relative to the norm of y or to `floor` if that is more."""
    return (
        (x.double() - y.double()).norm() / y.double().norm().clamp(min=max(floor, 1e-30))
    ).item()


def rms(x, y):
    return (x.double() - y).square().mean().sqrt()


def assert_same_bits(one, two):
    """Two results of `run`."""
    for x, y in zip(one[:1] + one[2:], two[:1] + two[2:], strict=True):
        assert torch.equal(x, y)
    assert one[1].keys() == two[1].keys()
    for name, stat in one[1].items():
        assert torch.equal(stat, two[1][name]), name


def gradient_bounds(case, temperature=1.0, scale=1.0, kl_coef=0.0, **_):
    """Norms that the gradients of hidden and weight have when no token is certain, cut or equal to
    the reference. Gradients that are far smaller are differences of nearly equal numbers."""
    size = (case.advantage.abs() + kl_coef).norm() * abs(scale) / temperature
    return [(size * factor.norm(dim=1).max()).item() for factor in (case.weight, case.hidden)]


def assert_close_to_float64(case, backend, gradient=1e-5, floor=0.0, **options):
    """`gradient` bounds the relative error of the gradients. Where a gradient is smaller than
    `floor` of `gradient_bounds`, its error is relative to that."""
    loss, stats, dhidden, dweight = run(linear_drgrpo_loss, case, backend=backend, **options)
    loss64, stats64, dhidden64, dweight64 = run(linear_drgrpo_loss_ref, case.double(), **options)
    assert set(stats) == set(stats64)
    assert (stats["logprob"] - stats64["logprob"]).abs().max() <= 5e-5
    assert (stats["entropy"] - stats64["entropy"]).abs().max() <= 1e-4
    assert (stats["log_ratio"] - stats64["log_ratio"]).abs().max() <= 5e-5
    assert distance(stats["tis_weight"], stats64["tis_weight"]) <= 1e-5
    assert torch.equal(stats["clipped"], stats64["clipped"])
    # k3 cancels near 0: exp(d) - 1 - d is known to an ulp of 1.
    for name in {"token_loss", "kl"} & set(stats):
        assert torch.allclose(stats[name].double(), stats64[name], rtol=1e-4, atol=1e-5)
    scale, kl_coef = abs(options.get("scale", 1.0)), options.get("kl_coef", 0.0)
    size = 1e-5 * stats64["token_loss"].abs().sum() + 1e-7 * kl_coef * len(case.target)
    assert abs(loss - loss64) <= scale * size + 1e-12
    floors = [floor * bound for bound in gradient_bounds(case.double(), **options)]
    assert distance(dhidden, dhidden64, floors[0]) <= gradient
    assert distance(dweight, dweight64, floors[1]) <= gradient
    assert loss.dtype == torch.float32
    for name, stat in stats.items():
        assert stat.dtype == (torch.int8 if name == "clipped" else torch.float32)
        assert not stat.requires_grad


def rows(backend, logits, target, advantage=None, grad_dtype=None, old=None, **objective):
    """The row pass alone, on-policy unless `old` is given: (stats by name, dlogits). Padding and
    outputs start as NaN. No rounding of a GEMM comes before the given logits."""
    T, V = logits.shape
    stride = V if backend == "torch" else -(-V // 16) * 16
    z = torch.full((T, stride), math.nan, dtype=logits.dtype, device=DEVICE)
    z[:, :V] = logits
    stat = torch.full((5, T), math.nan, device=DEVICE)
    clipped = torch.full((T,), 99, dtype=torch.int8, device=DEVICE)
    advantage = torch.ones(T, device=DEVICE) if advantage is None else advantage.to(DEVICE)
    per_token = head._PerToken(advantage, old)
    numbers = head._Objective(**({"clip_low": 0.2, "clip_high": 0.2} | objective))
    row_pass = head._rows_triton if backend == "triton" else head._rows_torch
    grad_dtype = grad_dtype or logits.dtype
    scale = torch.ones(1, device=DEVICE)
    dz = row_pass(z, V, target.to(DEVICE), per_token, scale, numbers, stat, clipped, grad_dtype)
    return dict(zip(head.STATS, stat, strict=False), clipped=clipped), dz


def expect(logits, target):
    """(logp, entropy, e - p) in float64."""
    logp = logits.double().log_softmax(-1)
    onehot = torch.nn.functional.one_hot(target, logits.shape[1]).to(logits.device)
    target_logp = logp.gather(1, target[:, None].to(logits.device))[:, 0]
    return target_logp, torch.special.entr(logp.exp()).sum(-1), onehot - logp.exp()
