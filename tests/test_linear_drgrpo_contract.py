"""What callers of the fused head rely on: which inputs are accepted or refused, what a broken
number does, what is left unchanged, which backend and chunk run.

    pytest tests/test_linear_drgrpo_contract.py
"""

import inspect
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drgrpo.kernels import linear_drgrpo as head
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss, linear_logprob, resolve_backend
from head_cases import (
    DEVICE,
    assert_close_to_float64,
    assert_same_bits,
    both,
    distance,
    ignore_numpy_warnings,
    make,
    needs_triton,
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
    assert loss.isnan()
    assert dweight.isnan().all()
    assert dhidden[2].isnan().all()
    for name in ("logprob", "entropy", "log_ratio", "token_loss"):
        assert stats[name][2].isnan()
        assert torch.equal(stats[name][other], clean[name][other])
    assert torch.equal(dhidden[other], clean_dhidden[other])


@both
@pytest.mark.parametrize("name", ["advantage", "old_logprob", "sampler_logprob", "ref_logprob"])
def test_nan_in_a_per_token_input_surfaces(backend, name, small_blocks):
    case = make(3, 8, 70, seed=8)
    case.advantage = torch.ones(3, device=DEVICE)
    getattr(case, name)[1] = math.nan
    options = dict(backend=backend, tis_cap=2.0, kl_coef=0.1)
    loss, stats, dhidden, _ = run(linear_drgrpo_loss, case, **options)
    assert loss.isnan()
    assert stats["token_loss"].isnan().tolist() == [False, True, False]
    assert dhidden.isnan().any(1).tolist() == [False, True, False]


@both
def test_infinite_advantage_surfaces(backend, small_blocks):
    case = make(3, 8, 70, seed=8)
    case.advantage[1] = math.inf
    loss, _, dhidden, _ = run(linear_drgrpo_loss, case, backend=backend)
    assert not loss.isfinite()
    assert dhidden.isfinite().all(1).tolist() == [True, False, True]


@both
@pytest.mark.parametrize("how", ["ignored", "no_advantage"])
def test_nothing_to_learn_is_exactly_zero(backend, how, small_blocks):
    """Not even a broken row reaches the gradient of the hidden states. In the GEMM of dW 0 times
    NaN is NaN: only dropping the token avoids it."""
    case = make(6, 8, 100, seed=10)
    case.hidden[0] = math.nan
    if how == "ignored":
        case.target.fill_(-100)
    else:
        case.advantage.zero_()
    loss, stats, dhidden, _ = run(linear_drgrpo_loss, case, backend=backend, chunk_tokens=4)
    assert loss == 0
    assert (dhidden == 0).all()
    assert (stats["clipped"] == 0).all()
    case.hidden[0] = 0.0
    *_, dweight = run(linear_drgrpo_loss, case, backend=backend)
    assert (dweight == 0).all()


@both
def test_broken_numbers_of_an_ignored_token_reach_nothing(backend, small_blocks):
    """Padding may hold anything."""
    case = make(5, 8, 70, seed=8)
    case.target[1] = -100
    options = dict(backend=backend, tis_cap=2.0, kl_coef=0.1)
    clean = run(linear_drgrpo_loss, case, **options)
    for field in fields(case)[3:]:
        getattr(case, field.name)[1] = math.nan
    assert_same_bits(run(linear_drgrpo_loss, case, **options), clean)
    assert clean[1]["tis_weight"][1] == 0


@both
def test_watching_the_kl_costs_no_gradient(backend, small_blocks):
    """kl_coef = 0 with a reference so far away that k3 overflows: the statistic shows it, and the
    loss does not change."""
    case = make(3, 8, 70, seed=8)
    case.ref_logprob = torch.full((3,), 200.0, device=DEVICE)
    watched = run(linear_drgrpo_loss, case, backend=backend)
    plain = run(linear_drgrpo_loss, case, backend=backend, ref_logprob=None)
    assert "kl" not in plain[1]
    assert watched[1].pop("kl").isinf().all()
    assert_same_bits(watched, plain)


# ---- inputs: targets, layouts, aliasing


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
    invalid = [False, False, False, True, True, False]
    _, stats, dhidden, dweight = run(linear_drgrpo_loss, case, backend=backend)
    assert stats["logprob"].isnan().tolist() == invalid
    assert dhidden.isnan().all(1).tolist() == invalid
    assert dweight.isnan().all()
    assert all(stat[2] == 0 for stat in stats.values())
    assert (dhidden[2] == 0).all()
    logprob, entropy = linear_logprob(case.hidden, case.weight, case.target, backend=backend)
    assert logprob.isnan().tolist() == invalid
    assert entropy[2] == 0
    assert_close_to_float64(case.tokens(torch.tensor([0, 1, 5], device=DEVICE)), backend)


@both
@pytest.mark.parametrize("name", ["hidden_view", "weight_transposed", "flattened", "strided"])
def test_layouts(backend, name, small_blocks):
    """Hidden states as a view of a wider tensor, a weight stored transposed, a view [B, L, D]
    flattened, per-token tensors with a stride."""
    case = make(12, 16, 130, seed=16)
    wide = torch.randn(12, 40, device=DEVICE)
    wide[:, 8:24] = case.hidden
    by_position = case.hidden.view(3, 4, 16).transpose(0, 1).contiguous()
    strided = {x: getattr(case, x).repeat_interleave(2)[::2] for x in ("old_logprob", "target")}
    changes = {
        "hidden_view": dict(hidden=wide[:, 8:24]),
        "weight_transposed": dict(weight=case.weight.t().contiguous().t()),
        "flattened": dict(hidden=by_position.transpose(0, 1).flatten(0, 1)),
        "strided": strided,
    }
    want = run(linear_drgrpo_loss, case, backend=backend)
    got = run(linear_drgrpo_loss, replace(case, **changes[name]), backend=backend)
    assert distance(got[2], want[2]) <= 2e-6
    assert distance(got[3], want[3]) <= 2e-6


@both
def test_inputs_are_not_changed(backend):
    case = make(6, 8, 50, seed=17)
    copy = case.map(torch.clone)
    run(linear_drgrpo_loss, case, backend=backend, tis_cap=1.1, kl_coef=0.1)
    linear_logprob(case.hidden, case.weight, case.target, backend=backend)
    for field in fields(case):
        assert torch.equal(getattr(case, field.name), getattr(copy, field.name))


def test_meta_tensors_give_the_shapes():
    case = make(6, 8, 50).map(lambda x: x.to("meta"))
    loss, stats, dhidden, dweight = run(linear_drgrpo_loss, case, tis_cap=1.1, kl_coef=0.1)
    logprob, _ = linear_logprob(case.hidden, case.weight, case.target)
    assert loss.shape == () and dhidden.shape == (6, 8) and dweight.shape == (50, 8)
    assert all(x.is_meta and x.shape == (6,) for x in (*stats.values(), logprob))


def test_references_have_the_signature_of_what_they_define():
    for name in ("linear_logprob", "linear_drgrpo_loss"):
        function, reference = getattr(head, name), getattr(head, f"{name}_ref")
        assert inspect.signature(reference) == inspect.signature(function)


# ---- errors

WRONG = {
    "hidden_3d": (dict(hidden=torch.zeros(1, 4, 8)), r"\[1, 4, 8\].*flatten"),
    "width": (dict(hidden=torch.zeros(4, 9)), r"\[4, 9\]"),
    "float64": (dict(hidden=torch.zeros(4, 8).double()), "float64"),
    "mixed": (dict(hidden=torch.zeros(4, 8).bfloat16()), "autocast"),
    "no_vocabulary": (dict(weight=torch.zeros(0, 8)), "no rows"),
    "target_shape": (
        dict(target=torch.zeros(5, dtype=torch.int64)),
        r"target is torch.int64 \[5\]",
    ),
    "target_dtype": (dict(target=torch.zeros(4)), "int32 or int64"),
    "advantage_dtype": (dict(advantage=torch.zeros(4).double()), "advantage is torch.float64"),
    "old_shape": (dict(old_logprob=torch.zeros(3)), r"old_logprob is torch.float32 \[3\]"),
    "device": (dict(advantage=torch.zeros(4, device="meta")), "advantage is on meta"),
    "temperature": (dict(temperature=0.0), r"temperature \(0.0\)"),
    "clip": (dict(clip_low=-0.1), r"clip_low \(-0.1\)"),
    "tis_without_sampler": (dict(tis_cap=2.0), "needs sampler_logprob"),
    "tis_cap": (dict(tis_cap=0.0, sampler_logprob=torch.zeros(4)), r"tis_cap \(0.0\)"),
    "kl_without_ref": (dict(kl_coef=0.1), "needs ref_logprob"),
    "chunk": (dict(chunk_tokens=0), r"chunk_tokens \(0\)"),
    "logits_dtype": (dict(logits_dtype=torch.float16), "float16"),
    "shifted_float32": (dict(logits_dtype="shifted"), "hidden is float32"),
    "backend": (dict(backend="cuda"), "'cuda'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_value(name):
    change, message = WRONG[name]
    arguments = dict(
        hidden=torch.zeros(4, 8),
        weight=torch.zeros(20, 8),
        target=torch.zeros(4, dtype=torch.int64),
        advantage=torch.zeros(4),
    )
    with pytest.raises(ValueError, match=message):
        linear_drgrpo_loss(**(arguments | change))


# ---- backends and chunks


def test_auto_is_triton_on_cuda_and_torch_elsewhere(monkeypatch):
    monkeypatch.setattr(head, "triton", object())  # installed, or so it seems
    assert resolve_backend("auto", torch.device("cuda", 0)) == "triton"
    assert resolve_backend("auto", torch.device("cpu")) == "torch"
    assert resolve_backend("torch", torch.device("cuda", 0)) == "torch"


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
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout


@needs_triton
def test_compiled_triton_refuses_cpu_tensors(monkeypatch):
    import triton

    monkeypatch.setattr(head, "_drgrpo_row_kernel", triton.JITFunction(head._drgrpo_row_kernel.fn))
    case = make(3, 4, 9).map(torch.Tensor.cpu)
    with pytest.raises(RuntimeError, match=r"the tensors are on cpu.*TRITON_INTERPRET=1"):
        linear_logprob(case.hidden, case.weight, case.target, backend="triton")
    logprob, _ = linear_logprob(case.hidden, case.weight, case.target)  # auto
    assert logprob.isfinite().all()


@pytest.mark.parametrize("V", [1, 7, 260, 32_000, 151_936, 152_064, 10**7])
@pytest.mark.parametrize("T", [0, 1, 127, 4096, 16_384, 65_537])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_cover_the_tokens_within_the_budget(T, V, device):
    """A CPU's are balanced: the last one is not a sliver."""
    sizes = head.sizes_of() if device == "cuda" else head.sizes_on(torch.device("cpu"))
    chunk = head.default_chunk_tokens(T, 64, V, sizes)
    assert chunk % 128 == 0
    assert chunk == 128 or chunk * V <= head.CHUNK_LOGITS[device]
    chunks = -(-T // chunk)
    if device == "cpu":
        assert chunks * chunk - T < 128 * max(chunks, 1) + 128
    elif head.CHUNK_LOGITS[device] >= T * V:
        assert chunks <= 1 and chunk - T <= 128


def test_chunks_on_a_cpu_are_what_they_were():
    sizes = head.sizes_on(torch.device("cpu"))
    expected = {(4096, 8192): 128, (4096, 260): 1408, (1024, 260): 1024, (1000, 1300): 384}
    assert {(T, V): head.default_chunk_tokens(T, 256, V, sizes) for T, V in expected} == expected


def waves(C: int, D: int, processors: int = 108) -> int:
    """Waves of dX's tiles of 128 x 256."""
    return -(-(-(-C // 128) * -(-D // 256)) // processors)


@pytest.mark.parametrize(("D", "V"), [(3584, 152_064), (1536, 151_936)])
def test_chunks_of_many_tokens_fill_complete_waves_of_tiles(D, V):
    """On 108 SMs 6912 tokens are exactly 7 waves of dX at D = 3584, and 3 at D = 1536."""
    assert head.default_chunk_tokens(65_536, D, V, head.sizes_of(processors=108)) == 6912
    assert 108 * waves(6912, D) == 54 * D // 256


def test_chunks_of_few_tokens_take_the_waves_of_one_product_and_no_more_memory():
    """16384 tokens at D = 3584 are 17 waves of 108 SMs in one product. Three chunks can do it, and
    two of 8192 take 18. 14 waves of 132 SMs take two."""
    sizes = head.sizes_of(processors=108)
    chunk = head.default_chunk_tokens(16_384, 3584, 152_064, sizes)
    rest = 16_384 - 2 * chunk
    assert 2 * waves(chunk, 3584) + waves(rest, 3584) == waves(16_384, 3584) == 17
    assert 2 * waves(8192, 3584) == 18 and chunk < 6912
    sizes = head.sizes_of(processors=132)
    assert head.default_chunk_tokens(16_384, 3584, 152_064, sizes) == 8192


@pytest.mark.parametrize("T", [8320, 10_000, 16_384, 40_000])
@pytest.mark.parametrize("processors", [108, 132, 148])
def test_no_chunk_of_the_budget_is_faster_by_the_cost(T, processors):
    D, V, sizes = 1536, 151_936, head.sizes_of(processors=processors)
    chosen = head.default_chunk_tokens(T, D, V, sizes)

    def cost(C: int) -> float:
        return head._gemm_cost(T, C, D, V, processors)

    assert all(cost(chosen) <= cost(C) for C in range(128, 8192, 128))


def test_a_card_of_little_memory_has_smaller_chunks():
    for memory, limit in ((24, 2651), (40, 4419), (80, 8192), (140, 8192)):
        chunk = head.default_chunk_tokens(10**5, 3584, 152_064, head.sizes_of(memory=memory << 30))
        assert 0.6 * limit < chunk <= limit


def test_sizes_are_those_of_the_card_that_is_there(monkeypatch):
    cuda, card = torch.device("cuda"), dict(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert head.sizes_on(cuda) == head.sizes_of((8, 0), 108, 80 << 30)
    assert head.sizes_on(cuda, 24 << 30).chunk_logits == (24 << 30) // 64
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(**card, total_memory=40 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert head.sizes_on(cuda) == head.sizes_of((9, 0), 132, 40 << 30)
    assert head.sizes_on(torch.device("cpu")).processors == 0
