"""What only a GPU can show of the fused head: real vocabularies, memory, host syncs, large offsets.

    pytest tests/test_linear_drgrpo_gpu.py

No machine without a GPU runs these tests.
"""

import math

import pytest
import torch

from drgrpo.kernels.linear_drgrpo import (
    linear_drgrpo_loss,
    linear_drgrpo_loss_ref,
    linear_logprob,
    linear_logprob_ref,
)
from head_cases import (
    DEVICE,
    Case,
    assert_close_to_float64,
    assert_same_bits,
    distance,
    make,
    naive,
    rms,
    run,
)


def large(T, D, V, seed=0, dtype=torch.bfloat16):
    """Realistic entropies, made on the device."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    hidden = torch.randn(T, D, generator=rng, device=DEVICE).to(dtype)
    weight = (torch.randn(V, D, generator=rng, device=DEVICE) * 3 / math.sqrt(D)).to(dtype)
    target = torch.randint(V, (T,), generator=rng, device=DEVICE)
    return Case(hidden, weight, target, torch.randn(T, generator=rng, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("V", [128_256, 151_936, 152_064, 50_257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_real_vocabularies(V, dtype):
    """In fp32 the GEMM of dX adds V products, hence the wider bound on the gradient."""
    case = large(256, 128, V, dtype=dtype)
    exact, plain = run(linear_drgrpo_loss_ref, case.double()), run(naive, case)
    budget = rms(plain[1]["logprob"], exact[1]["logprob"])
    for logits_dtype in {dtype, torch.float32, "shifted" if dtype.itemsize == 2 else dtype}:
        how = dict(chunk_tokens=100, logits_dtype=logits_dtype)
        loss, stats, *gradients = run(linear_drgrpo_loss, case, **how)
        error = rms(stats["logprob"], exact[1]["logprob"])
        bound = {torch.float32: 5e-5, "shifted": budget / 3}.get(logits_dtype, 1.05 * budget)
        assert error <= bound
        assert loss == pytest.approx(exact[0].item(), rel=1e-5, abs=1e-3)
        for x, theirs, truth in zip(gradients, plain[2:], exact[2:], strict=True):
            limit = min(1.1 * distance(theirs, truth), 1e-2)
            assert distance(x, truth) <= (1e-4 if dtype == torch.float32 else limit)


def off_policy(dtype):
    """Ratios near 1 and far beyond both bounds, but none close to a bound."""
    case = large(300, 64, 32_000, dtype=dtype)
    logprob, _ = linear_logprob_ref(case.hidden.double(), case.weight.double(), case.target)
    logprob = logprob.float()
    rng = torch.Generator(DEVICE).manual_seed(1)
    noise = torch.randn(2, 300, generator=rng, device=DEVICE)
    case.old_logprob = logprob + torch.where(noise[0].abs() > 0.7, 0.5, 0.05) * noise[0].sign()
    case.sampler_logprob = case.old_logprob + 0.3 * noise[1]
    case.ref_logprob = logprob + 0.3 * noise[0]
    return case


OFF_POLICY = dict(tis_cap=1.1, kl_coef=0.1, scale=1 / 3000)


@pytest.mark.gpu
def test_gpu_off_policy_terms_against_float64_in_fp32():
    """Ratio, both bounds, sampler weight and KL, compiled."""
    case = off_policy(torch.float32)
    assert_close_to_float64(case, "triton", gradient=1e-4, chunk_tokens=128, **OFF_POLICY)


@pytest.mark.gpu
def test_gpu_off_policy_terms_against_float64_in_bf16():
    """The log-probs are as exact as fp32 logits make them, because they are compared."""
    case = off_policy(torch.bfloat16)
    got = run(linear_drgrpo_loss, case, **OFF_POLICY)
    exact = run(linear_drgrpo_loss_ref, case.double(), **OFF_POLICY)
    assert (got[1]["logprob"] - exact[1]["logprob"]).abs().max() <= 5e-5
    assert got[1]["clipped"].any()
    assert torch.equal(got[1]["clipped"], exact[1]["clipped"])
    assert distance(got[2], exact[2]) <= 1e-2
    assert distance(got[3], exact[3]) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["hidden", "advantage", "old_logprob", "sampler_logprob", "ref_logprob"]
)
def test_gpu_nan_surfaces(name):
    """The hardware's minimum and maximum drop a NaN. The interpreter's keep it, so only a card can
    tell."""
    case = large(64, 32, 20_000, dtype=torch.float32)
    case.advantage = case.advantage.abs() + 0.1
    case.old_logprob = linear_logprob(case.hidden, case.weight, case.target)[0]
    case.sampler_logprob, case.ref_logprob = case.old_logprob.clone(), case.old_logprob.clone()
    getattr(case, name)[5] = math.nan
    loss, stats, dhidden, _ = run(linear_drgrpo_loss, case, tis_cap=2.0, kl_coef=0.1)
    broken = torch.arange(64, device=DEVICE) == 5
    assert loss.isnan()
    assert torch.equal(stats["token_loss"].isnan(), broken)
    assert torch.equal(dhidden.isnan().any(1), broken)


@pytest.mark.gpu
def test_gpu_chunk_of_more_than_2_31_logits():
    """The log-probs of two chunk sizes differ by an ulp of a bf16 logit, where cuBLAS differs."""
    T, D, V = 16_384, 32, 152_064
    case = large(T, D, V)
    assert T * V > 2**31
    last = slice(T - 64, T)
    _, stats, dhidden, _ = run(linear_drgrpo_loss, case, chunk_tokens=T)
    _, last_stats, last_dhidden, _ = run(linear_drgrpo_loss, case.tokens(last))
    assert (stats["logprob"][last] - last_stats["logprob"]).abs().max() <= 0.1
    assert distance(dhidden[last], last_dhidden) <= 1e-2


@pytest.mark.gpu
def test_gpu_more_tokens_than_a_second_grid_dimension_holds():
    case = large(70_000, 16, 320)
    _, stats, dhidden, _ = run(linear_drgrpo_loss, case, chunk_tokens=70_000)
    exact = run(linear_drgrpo_loss_ref, case.double())
    assert (stats["logprob"] - exact[1]["logprob"]).abs().max() <= 0.1
    assert distance(dhidden, exact[2]) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_no_host_sync(dtype):
    case = large(512, 64, 32_000, dtype=dtype)
    old = linear_logprob(case.hidden, case.weight, case.target)[0]
    case.old_logprob = case.sampler_logprob = case.ref_logprob = old
    options = dict(tis_cap=2.0, kl_coef=0.1, chunk_tokens=256)
    run(linear_drgrpo_loss, case, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprob(case.hidden, case.weight, case.target)
        run(linear_drgrpo_loss, case, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "V"), [(1536, 151_936), (3584, 152_064)])
def test_gpu_memory_is_the_formula(D, V):
    T, C = 8192, 4096
    case = large(T, D, V)
    run(linear_drgrpo_loss, large(128, D, V))  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    run(linear_drgrpo_loss, case, chunk_tokens=C)
    peak = torch.cuda.max_memory_allocated() - allocated
    forward = 2 * C * V + 4 * V * D + 2 * T * D
    backward = 4 * V * D + 2 * V * D + 2 * T * D
    assert peak <= max(forward, backward) + 64e6


@pytest.mark.gpu
def test_gpu_same_bits_twice():
    case = large(2048, 256, 151_936)
    one, two = (run(linear_drgrpo_loss, case, chunk_tokens=1024) for _ in range(2))
    assert_same_bits(one, two)


@pytest.mark.gpu
def test_gpu_torch_backend_agrees_with_float64():
    """backend="torch" on a GPU, where a changed loss is tried before it is ported."""
    assert_close_to_float64(make(64, 32, 1000), "torch", gradient=1e-4, tis_cap=1.1, kl_coef=0.1)
