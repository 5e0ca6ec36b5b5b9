"""The fused head against float64: every output, every gradient, both backends.

    pytest tests/test_linear_drgrpo*.py

Without a GPU the Triton kernel runs in Triton's interpreter. tests/head_cases.py argues the
tolerances.
"""

import math
from importlib.util import find_spec

import pytest
import torch

from drgrpo.kernels import linear_drgrpo as head
from drgrpo.kernels.linear_drgrpo import (
    linear_drgrpo_loss,
    linear_drgrpo_loss_ref,
    linear_logprob,
    linear_logprob_ref,
)
from head_cases import (
    DEVICE,
    INTERPRETED,
    assert_close_to_float64,
    assert_same_bits,
    both,
    distance,
    expect,
    ignore_numpy_warnings,
    make,
    naive,
    needs_triton,
    rms,
    rows,
    run,
    uninitialized_memory_is_nan,
    use_blocks,
)

pytestmark = ignore_numpy_warnings


@pytest.fixture(autouse=True)
def nan_memory():
    with uninitialized_memory_is_nan():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    use_blocks(monkeypatch, 64, 2)


# ---- the references themselves


def paper_token_sum(case, start, length):
    """The inner sum of the paper's equation, one response, in Python floats."""
    total = 0.0
    for t in range(start, start + length):
        logits = case.hidden[t] @ case.weight.T
        rho = (logits[case.target[t]] - logits.logsumexp(0) - case.old_logprob[t]).exp().item()
        a = case.advantage[t].item()
        total += min(rho * a, min(max(rho, 0.8), 1.2) * a)
    return total


def test_reference_is_the_paper_formula():
    """Equation of the loss, written out per response: constant normalizer, no division by length or
    standard deviation."""
    budget, V, D = 8, 11, 4
    case = make(3 + 1 + 5, D, V, seed=3).double()
    advantage = [0.7] * 3 + [-0.3] * 1 + [-0.4] * 5
    case.advantage = torch.tensor(advantage, dtype=torch.float64, device=DEVICE)
    total = sum(paper_token_sum(case, *response) / budget for response in ((0, 3), (3, 1), (4, 5)))
    loss, *_ = run(linear_drgrpo_loss_ref, case, scale=1 / (3 * budget))
    assert loss.item() == pytest.approx(-total / 3, rel=1e-12)


def test_reference_gradient_is_the_finite_difference():
    case = make(4, 3, 7, seed=5).double()
    options = dict(
        old_logprob=case.old_logprob,
        sampler_logprob=case.sampler_logprob,
        tis_cap=1.1,
        temperature=0.8,
        ref_logprob=case.ref_logprob,
        kl_coef=0.2,
        scale=0.3,
    )

    def loss(hidden, weight):
        return linear_drgrpo_loss_ref(hidden, weight, case.target, case.advantage, **options)[0]

    assert torch.autograd.gradcheck(loss, case.grad_inputs()[:2])


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
    "kl": dict(kl_coef=0.3),
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
    gradient = 1e-5 if offset == 0 else 1e-4
    assert_close_to_float64(make(3, 4, V, offset=offset), backend, gradient)


@both
@pytest.mark.parametrize("V", [16_383, 16_385, 50_257, 151_936])
def test_vocabulary_sizes_at_the_real_block(backend, V):
    """The gradient's wider bound is the GEMM's: for two rows it adds V products one after
    another."""
    assert_close_to_float64(make(2, 4, V), backend, gradient=1e-4)


@both
@pytest.mark.parametrize("T", [1, 3, 4, 5, 11])
def test_token_counts_around_the_chunk(backend, T, small_blocks):
    assert_close_to_float64(make(T, 8, 100), backend, chunk_tokens=4)


@both
def test_no_tokens(backend, small_blocks):
    case = make(0, 8, 100)
    loss, stats, dhidden, dweight = run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=4)
    assert loss == 0
    assert dhidden.shape == (0, 8)
    assert (dweight == 0).all()
    assert all(x.shape == (0,) for x in stats.values())
    logprob, _ = linear_logprob(case.hidden, case.weight, case.target, backend=backend)
    assert logprob.shape == (0,)


@both
@pytest.mark.parametrize("logits", ["hidden's", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_autograd(backend, dtype, logits, small_blocks):
    case = make(48, 32, 300, dtype, seed=2, on_policy=True)
    exact, plain = run(linear_drgrpo_loss_ref, case.double()), run(naive, case)
    loss_dtype = dtype if logits == "hidden's" else torch.float32
    fused = run(linear_drgrpo_loss, case, backend=backend, logits_dtype=loss_dtype, chunk_tokens=16)
    truncates = 2.0 if INTERPRETED and backend == "triton" else 1.0
    for x, theirs, truth in zip(fused[2:], plain[2:], exact[2:], strict=True):
        assert x.dtype == dtype
        assert distance(x, truth) <= 1.1 * truncates * distance(theirs, truth)
    error, budget = (rms(x[1]["logprob"], exact[1]["logprob"]) for x in (fused, plain))
    assert error <= (5e-5 if logits == "fp32" else 1.05 * budget)


@both
def test_fp16_gradients_survive_a_tiny_scale(backend, small_blocks):
    """scale = 1e-9 times a loss scaler of 2^28, as in mixed-precision training: in fp16 alone 1e-9
    is 0. An ulp of fp16 is 5e-4 to 1e-3."""
    case = make(12, 16, 90, torch.float16, seed=4)
    factors = dict(scale=1e-9, upstream=2.0**28)
    *_, dhidden, dweight = run(linear_drgrpo_loss, case, backend=backend, **factors)
    *_, dhidden64, dweight64 = run(linear_drgrpo_loss_ref, case.double(), **factors)
    assert distance(dhidden, dhidden64) <= 2e-3
    assert distance(dweight, dweight64) <= 2e-3


@both
@pytest.mark.parametrize(("log_ratio", "finite"), [(10.0, True), (12.0, False)])
@pytest.mark.parametrize("scale", [1e-12, 1e-6])
def test_fp16_overflows_at_a_large_ratio_whatever_the_scale(
    backend, log_ratio, finite, scale, small_blocks
):
    """|ratio x advantage| above 65504, as the module's docstring has it."""
    case = make(3, 8, 64, torch.float16, on_policy=True)
    _, stats = linear_drgrpo_loss_ref(*case.grad_inputs())
    case.old_logprob, case.advantage = stats["logprob"] - log_ratio, -torch.ones(3, device=DEVICE)
    *_, dhidden, dweight = run(linear_drgrpo_loss, case, backend=backend, scale=scale)
    assert bool(dhidden.isfinite().all() and dweight.isfinite().all()) == finite


# (V, standard deviation of the logits): entropies of 7.5, 4.3 and 2.7 nats, largest logits of 13 to
# 27. They span a small base model and a trained one.
PEAKEDNESS = [(151_936, 3.0), (128_256, 4.5), (151_936, 6.0)]


@both
@pytest.mark.parametrize(("V", "spread"), PEAKEDNESS)
def test_shifted_logits_give_exact_log_probs(backend, V, spread):
    """Measured at 24 tokens: 0.6 to 2.5e-3 nats, against 1.5 to 3.5e-2 of plain bf16 logits."""
    case = make(12, 64, V, torch.bfloat16, spread=spread, on_policy=True)
    inputs = (case.hidden, case.weight, case.target)
    logprob64, entropy64 = linear_logprob_ref(
        case.hidden.double(), *case.double().grad_inputs()[1:3]
    )
    plain, _ = linear_logprob(*inputs, logits_dtype=torch.bfloat16, backend=backend)
    logprob, entropy = linear_logprob(*inputs, logits_dtype="shifted", backend=backend)
    assert rms(logprob, logprob64) <= min(4e-3, rms(plain, logprob64) / 4)
    assert rms(entropy, entropy64) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shifted_logits_give_gradients_as_exact_as_fp32_logits(dtype):
    """The torch backend, which rounds to nearest. In fp16 all three are close to the rounding of
    dZ."""
    case = make(32, 64, 20_000, dtype, spread=6.0, on_policy=True)
    exact = run(linear_drgrpo_loss_ref, case.double())

    def errors(logits_dtype):
        result = run(linear_drgrpo_loss, case, logits_dtype=logits_dtype, backend="torch")
        return [distance(x, truth) for x, truth in zip(result[2:], exact[2:], strict=True)]

    for shifted, fp32, plain in zip(*map(errors, ("shifted", torch.float32, dtype)), strict=True):
        assert shifted <= 1.25 * fp32
        assert shifted <= plain / 3


@both
def test_shifted_logits_of_tokens_without_a_target(backend, small_blocks):
    """Ignored tokens are 0, invalid targets are NaN, and neither reaches another token."""
    case = make(5, 8, 96, torch.bfloat16, on_policy=True)
    how = dict(logits_dtype="shifted", backend=backend)
    clean, _ = linear_logprob(case.hidden, case.weight, case.target, **how)
    case.target[1:4] = torch.tensor([-100, 96, -1])
    logprob, entropy = linear_logprob(case.hidden, case.weight, case.target, **how)
    assert logprob[1] == entropy[1] == 0
    assert logprob.isnan().tolist() == [False, False, True, True, False]
    assert torch.equal(logprob[[0, 4]], clean[[0, 4]])


@both
def test_linear_logprob(backend, small_blocks):
    case = make(7, 8, 130, spread=4.0)
    hidden, weight, target, _ = case.grad_inputs()
    got = linear_logprob(hidden, weight, target, temperature=0.7, chunk_tokens=3, backend=backend)
    want = linear_logprob_ref(hidden.double(), weight.double(), target, temperature=0.7)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.float32
        assert not x.requires_grad
        assert (x - y).abs().max() <= 5e-5


@pytest.mark.parametrize("function", [linear_drgrpo_loss, linear_drgrpo_loss_ref])
def test_editing_the_objective_changes_the_loss_and_its_gradient(function, monkeypatch):
    """REINFORCE in place of the clipped loss: one edit of `token_objective` reaches the reference
    and the torch backend."""

    def reinforce(logprob, ignored, advantage, *_, **__):
        token_loss = -logprob * advantage
        constants = {"log_ratio": logprob * 0, "tis_weight": logprob * 0, "clipped": ignored * 0}
        return token_loss, constants | {"token_loss": token_loss}

    monkeypatch.setattr(head, "token_objective", reinforce)
    case = make(7, 8, 50, on_policy=True)
    hidden, weight, target, advantage = case.double().grad_inputs()
    logprob, _ = linear_logprob_ref(hidden, weight, target)
    want = -(logprob * advantage).sum()
    want.backward()
    loss, _, dhidden, dweight = run(function, case, backend="torch")
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert distance(dhidden, hidden.grad) <= 1e-5
    assert distance(dweight, weight.grad) <= 1e-5


# ---- rows of given logits: closed forms on exactly the numbers that the row pass reads


def columns(z):
    return torch.arange(z.shape[1], device=z.device)


HARD = {
    "huge": lambda z: z * 1e4,
    "offset_1e6": lambda z: z.round() + 1e6,  # whole numbers, or the offset rounds them
    "offset_-1e6": lambda z: z.round() - 1e6,
    "uniform": lambda z: torch.zeros_like(z),
    "one_hot": lambda z: torch.where(columns(z) == 5, 300.0, -300.0).expand_as(z),
    "one_inf": lambda z: z.masked_fill(columns(z) == 7, -math.inf),
    "all_but_one_inf": lambda z: z.masked_fill(columns(z) != 5, -math.inf),
    "first_block_inf": lambda z: z.masked_fill(columns(z) < 128, -math.inf),
    "very_negative": lambda z: z - 1e5,
    "very_negative_without_its_target": lambda z: (z - 1e5).masked_fill(columns(z) == 5, -math.inf),
}


@both
@pytest.mark.parametrize("name", HARD)
def test_hard_rows(backend, name, small_blocks):
    """A logit of 1e4 has a half-ulp of 5e-4 on its own, but the rows are given, so only sums and
    differences are inexact: 6e-8 of the largest difference in a row. A target whose logit is -inf
    has logp = -inf, and on-policy that token cannot have been sampled."""
    rng = torch.Generator().manual_seed(0)
    logits = HARD[name](torch.randn(4, 200, generator=rng)).to(DEVICE).float()
    target = torch.tensor([5, 140, 150, 199])
    logp, entropy, slope = expect(logits, target)
    stats, dz = rows(backend, logits, target)
    finite = logp > -math.inf
    assert torch.equal(stats["logprob"] == -math.inf, ~finite)
    error = (stats["logprob"] - logp)[finite].abs()
    assert (error <= 5e-6 + 2e-7 * logp[finite].abs()).all()
    assert (stats["entropy"] - entropy).abs().max() <= 1e-5
    assert (dz + slope)[finite].abs().max() <= 2e-6


BELOW = [0.0, 3.0, 12.0, 16.0, 17.0, 30.0, 100.0, 1e4]


def rows_with_targets_below_the_top(offset):
    """(logits, targets): the target of row i lies BELOW[i] nats under the largest logit."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(len(BELOW), 200, generator=rng) + offset
    target = 25 * torch.arange(len(BELOW))
    top = logits.amax(1)
    logits[torch.arange(len(BELOW)), target] = top - torch.tensor(BELOW)
    return logits.to(DEVICE), target


@both
@pytest.mark.parametrize("offset", [0.0, -200.0, 1e5, 1e6, -1e6])
def test_targets_far_below_the_top(backend, offset, small_blocks):
    """The Triton kernel changes its reference between 12 and 16 nats. Errors are relative to the
    log-prob. The entropy is at most ln 200."""
    logits, target = rows_with_targets_below_the_top(offset)
    logp, entropy, slope = expect(logits, target)
    stats, dz = rows(backend, logits, target)
    assert ((stats["logprob"] - logp).abs() <= 1e-6 + 2e-7 * logp.abs()).all()
    assert (stats["entropy"] - entropy).abs().max() <= 3e-6
    assert (dz + slope).abs().max() <= 3e-7


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="compiled code cannot be patched")
def test_only_rare_targets_read_the_row_again(monkeypatch, small_blocks):
    """That costs a third of the row pass."""
    read_again, original = [], head._online_softmax

    def recorded(*args):
        read_again.append(args)
        return original(*args)

    monkeypatch.setattr(head, "_online_softmax", recorded)
    logits, target = rows_with_targets_below_the_top(-200.0)
    rows("triton", logits, target)
    rare = expect(logits, target)[0] < -24 * math.log(2)
    assert len(read_again) == rare.sum() == 5


@both
def test_row_of_only_infinities_is_nan(backend, small_blocks):
    logits = torch.zeros(3, 100, device=DEVICE)
    logits[1] = -math.inf
    stats, dz = rows(backend, logits, torch.tensor([0, 1, 2]))
    for x in (stats["logprob"], stats["entropy"], dz):
        assert x[1].isnan().all()
        assert x[[0, 2]].isfinite().all()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_rounded_logits(backend, dtype, small_blocks):
    """Given 16-bit logits, the arithmetic is fp32: 5e-6, not 2e-2. dlogits are exact but for the
    rounding of the store. Its bound is twice the error of rounding to nearest, because the
    interpreter truncates."""
    logits = (4 * torch.randn(6, 333, generator=torch.Generator().manual_seed(1))).to(DEVICE, dtype)
    target = torch.arange(6) * 60
    logp, entropy, slope = expect(logits, target)
    stats, dz = rows(backend, logits, target)
    assert ((stats["logprob"] - logp).abs() <= 5e-6 * logp.abs().clamp(min=1)).all()
    assert (stats["entropy"] - entropy).abs().max() <= 1e-5
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal * eps
    assert ((dz.double() + slope).abs() <= (eps + 1e-5) * slope.abs() + tiny).all()


@needs_triton
@pytest.mark.parametrize("V", [40, 64, 200, 333])
def test_16_bit_gradient_in_the_row_of_fp32_logits(V, small_blocks):
    """dZ takes the upper half of the row that it is computed from: no logit may be overwritten
    before it is read."""
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    target = torch.tensor([0, V // 2, V - 1])
    slope = expect(logits, target)[2]
    _, dz = rows("triton", logits, target, grad_dtype=torch.bfloat16)
    assert dz.dtype == torch.bfloat16
    assert dz.shape == logits.shape
    assert ((dz.double() + slope).abs() <= 2.0**-7 * slope.abs() + 1e-30).all()


@both
@pytest.mark.parametrize("a", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("log_ratio", [0.0, 1e-7, -1e-7, 0.19, -0.25, 80.0, -80.0, 100.0, -100.0])
def test_extreme_ratios(backend, log_ratio, a, small_blocks):
    """Uniform rows: logp = -ln 4 and p = 1/4, so the gradient is g (3/4, -1/4, ...). exp(100)
    overflows fp32: without an advantage the loss is 0 all the same, and where the bound cuts it off
    it is the bound."""
    logits, advantage = torch.zeros(1, 4, device=DEVICE), torch.full((1,), a)
    old = torch.full((1,), -math.log(4) - log_ratio, device=DEVICE)
    stats, dz = rows(backend, logits, torch.tensor([2]), advantage, old=old, clip_high=0.28)
    actual = stats["log_ratio"].item()  # after the rounding of old
    assert actual == pytest.approx(log_ratio, abs=1e-5)
    rho = math.exp(actual) if actual < 88.7 else math.inf
    cut = rho > 1.28 if a > 0 else (rho < 0.8 and a < 0)
    loss = 0.0 if a == 0 else -a * min(max(rho, 0.8), 1.28) if cut else -a * rho
    g = 0.0 if cut or a == 0 else -a * rho
    assert stats["clipped"].item() == (0 if not cut else 1 if a > 0 else -1)
    assert stats["token_loss"].item() == pytest.approx(loss, rel=1e-5)
    if math.isinf(g):
        assert not dz.isfinite().any()
    else:
        want = [-g / 4, -g / 4, g * 3 / 4, -g / 4]
        assert dz[0].tolist() == pytest.approx(want, rel=1e-5, abs=1e-30)


@both
@pytest.mark.parametrize("a", [1.0, -1.0])
def test_exactly_on_the_bound_the_gradient_passes(backend, a, small_blocks):
    """As in torch, where clamp and minimum tie. Ratio 1 between bounds 1 and 1 is exact in every
    arithmetic."""
    logits, target = torch.randn(2, 30, device=DEVICE), torch.tensor([3, 4])
    old = rows(backend, logits, target)[0]["logprob"].clone()
    advantage = torch.full((2,), a)
    stats, dz = rows(backend, logits, target, advantage, old=old, clip_low=0.0, clip_high=0.0)
    assert (stats["log_ratio"] == 0).all()
    assert (stats["clipped"] == 0).all()
    assert (dz + a * expect(logits, target)[2]).abs().max() <= 1e-6


# ---- one pass and another


@both
@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16, "shifted"])
def test_a_separate_pass_gives_ratio_one_exactly(backend, logits_dtype, small_blocks):
    """And on-policy is the same call with old = the own log-prob."""
    case = make(10, 16, 130, torch.bfloat16, seed=12, on_policy=True)
    how = dict(chunk_tokens=4, backend=backend, logits_dtype=logits_dtype)
    old, entropy = linear_logprob(case.hidden, case.weight, case.target, **how)
    _, stats, dhidden, dweight = run(linear_drgrpo_loss, case, old_logprob=old, **how)
    assert (stats["log_ratio"] == 0).all()
    assert torch.equal(stats["entropy"], entropy)
    how |= dict(logits_dtype=logits_dtype or torch.float32)
    on_policy = run(linear_drgrpo_loss, case, **how)
    assert torch.equal(on_policy[1]["logprob"], old)
    assert torch.equal(on_policy[2], dhidden)
    assert torch.equal(on_policy[3], dweight)


@both
def test_sampler_log_probs_that_are_not_used_change_nothing(backend, small_blocks):
    """Without a cap they weigh nothing, and must not buy fp32 logits either."""
    case = make(10, 16, 130, torch.bfloat16, seed=12, on_policy=True)
    how = dict(backend=backend, chunk_tokens=4)
    sampler = torch.full((10,), -3.0, device=DEVICE)
    plain = run(linear_drgrpo_loss, case, **how)
    assert_same_bits(plain, run(linear_drgrpo_loss, case, sampler_logprob=sampler, **how))
    fp32 = run(linear_drgrpo_loss, case, logits_dtype=torch.float32, **how)
    assert not torch.equal(plain[1]["logprob"], fp32[1]["logprob"]), (
        "this case cannot tell bf16 logits from fp32 ones"
    )


@both
def test_repeating_gives_the_same_bits(backend, small_blocks):
    case, how = make(10, 16, 130, seed=13), dict(backend=backend, chunk_tokens=4, tis_cap=1.2)
    assert_same_bits(run(linear_drgrpo_loss, case, **how), run(linear_drgrpo_loss, case, **how))


@both
def test_chunks_change_nothing_but_rounding(backend, small_blocks):
    case = make(13, 16, 130, seed=14)
    single = run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=13)
    for chunk_tokens in (1, 5, 12, 100):
        chunked = run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=chunk_tokens)
        assert (chunked[1]["logprob"] - single[1]["logprob"]).abs().max() <= 1e-5
        assert distance(chunked[2], single[2]) <= 2e-6
        assert distance(chunked[3], single[3]) <= 2e-6


@both
def test_micro_batches_add_up(backend, small_blocks):
    case, how = make(12, 16, 130, seed=15), dict(backend=backend, scale=0.1)
    total = run(linear_drgrpo_loss, case, **how)
    one = run(linear_drgrpo_loss, case.tokens(slice(0, 5)), **how)
    two = run(linear_drgrpo_loss, case.tokens(slice(5, 12)), **how)
    assert total[0] == pytest.approx((one[0] + two[0]).item(), rel=1e-5)
    assert distance(torch.cat([one[2], two[2]]), total[2]) <= 2e-6
    assert distance(one[3] + two[3], total[3]) <= 2e-6


@both
def test_dropping_tokens_without_advantage_changes_nothing(backend, small_blocks):
    case = make(20, 8, 100, seed=11)
    keep = case.advantage != 0
    assert 0 < keep.sum() < 20
    full = run(linear_drgrpo_loss, case, backend=backend)
    kept = run(linear_drgrpo_loss, case.tokens(keep), backend=backend)
    assert full[0] == pytest.approx(kept[0].item(), rel=1e-6)
    assert distance(full[2][keep], kept[2]) <= 1e-6
    assert distance(full[3], kept[3]) <= 1e-6


# ---- random shapes


def ratio_on_a_bound(case, temperature, clip_low, clip_high, **_):
    """A ratio on a bound may fall on either side of it."""
    double = case.double()
    logprob, _ = linear_logprob_ref(
        double.hidden, double.weight, double.target, temperature=temperature
    )
    ratio = (logprob - double.old_logprob).exp()
    bounds = torch.tensor([1 - clip_low, 1 + clip_high], device=DEVICE)
    return ((ratio[:, None] - bounds).abs() <= 1e-4).any()


def test_random_shapes_and_options():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        T=st.integers(1, 9),
        D=st.integers(1, 9),
        V=st.integers(1, 150),
        chunk_tokens=st.integers(1, 10),
        seed=st.integers(0, 10**6),
        spread=st.floats(0.0, 4.0),
        temperature=st.floats(0.3, 3.0),
        clip_low=st.floats(0, 1),
        clip_high=st.floats(0, 2),
        tis_cap=st.none() | st.floats(0.5, 3),
        on_policy=st.booleans(),
        scale=st.just(0.0) | st.floats(1e-3, 10) | st.floats(-10, -1e-3),
        kl_coef=st.sampled_from([0.0, 0.1]),
        backend=st.sampled_from(["torch", "triton"] if find_spec("triton") else ["torch"]),
        block_v=st.sampled_from([16, 64, 256]),
    )
    def check(T, D, V, seed, spread, on_policy, backend, block_v, **options):
        case = make(T, D, V, seed=seed, spread=spread)
        if on_policy:
            case.old_logprob = None
        else:
            hypothesis.assume(not ratio_on_a_bound(case, **options))
        with pytest.MonkeyPatch.context() as patch:
            use_blocks(patch, block_v, 1)
            assert_close_to_float64(case, backend, gradient=1e-4, floor=0.1, **options)

    check()
