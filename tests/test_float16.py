"""--dtype float16: the loss scale is found, saved and logged, and the sampler is closer than in
bfloat16."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from transformers import Glm4Config

import train
from drgrpo import model, parity
from drgrpo.engine_vllm import VLLMEngine
from drgrpo.model import Objective, Policy, load_policy
from drgrpo.pack import Sequence, pack
from drgrpo.run import guard
from drgrpo.run.guard import advance
from drgrpo.types import UserError
from runs import assert_same_run, finish, launch, metrics, run, small

CPU = torch.device("cpu")
TOKENS = torch.randint(260, (5, 16), generator=torch.Generator().manual_seed(0)).tolist()
FP16 = {"dtype": "float16", "eval_data": "", "save_every": 1, "keep": 3}


def batch():
    """Five responses of twelve tokens."""
    return pack([Sequence(t[:4], t[4:], [-1.0] * 12, 0.5 - i % 2) for i, t in enumerate(TOKENS)])


def flat(tensors) -> torch.Tensor:
    whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return torch.cat([t.detach().flatten() for t in whole])


def load(path: str, dtype: torch.dtype) -> Policy:
    return load_policy(path, Objective(), dtype=dtype, device=CPU)


def start_at(monkeypatch, scale: float) -> None:
    monkeypatch.setattr(model, "GradScaler", partial(GradScaler, init_scale=scale))


# ---- one optimizer step


def test_a_loss_scale_saves_gradients_that_float16_cannot_hold(random_model, group_of_one):
    """At the paper's scale of the loss, 1 / (128 x 3000), against float32."""
    gradients = {}
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**16)):
        policy = load(random_model, dtype)
        (policy.loss(batch(), scale=1 / 384_000)[0] * scale).backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.parameters())
        gradients[dtype, scale] = flat(p.grad for p in policy.parameters()) / scale
    exact, unscaled, scaled = gradients.values()
    assert (scaled - exact).norm() <= 0.01 * exact.norm()
    assert (unscaled - exact).norm() >= 0.05 * exact.norm()


@pytest.mark.parametrize("scale", [2.0**16, 2.0**40], ids=["fits", "overflows"])
def test_an_update_is_that_of_the_unscaled_gradient_or_none(
    random_model, group_of_one, monkeypatch, scale
):
    start_at(monkeypatch, scale)
    config = small(random_model, "unused", dtype="float16", max_grad_norm=1e-3)
    policy, _, _ = train.load_policies(config, random_model, CPU)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = flat(policy.parameters())
    update = train.train_minibatch(config, policy, optimizer, [batch()], lr=0.5)
    moved = flat(policy.parameters()) - before
    overflows = scale > 2.0**16
    assert update.loss_scale == scale and update.applied != overflows and not update.failed
    assert policy.scaler.get_scale() == (scale / 2 if overflows else scale)
    assert math.isfinite(update.loss) and math.isfinite(update.grad_norm) != overflows
    # The norm is clipped after the scale is taken out.
    expected = 0.0 if overflows else 0.5 * min(update.grad_norm, 1e-3)
    assert moved.norm() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types_have_no_loss_scale(random_model, group_of_one, dtype):
    config = small(random_model, "unused", dtype=dtype)
    policy, _, optimizer = train.load_policies(config, random_model, CPU)
    update = train.train_minibatch(config, policy, optimizer, [batch()], lr=0.5)
    assert update.loss_scale == 1 and update.applied
    assert not policy.scaler.is_enabled() and policy.scaler.state_dict() == {}
    assert not update._replace(applied=False).loss_scale > guard.MIN_LOSS_SCALE
    assert update._replace(applied=False).failed


def step(scaler: GradScaler, gradient: float) -> float:
    weight = torch.nn.Parameter(torch.zeros(2))
    scaler.scale((weight * gradient).sum()).backward()
    scaler.unscale_(torch.optim.SGD([weight], lr=1.0))
    return advance(scaler)


def test_the_loss_scale_halves_down_to_its_floor_and_doubles_after_2000_steps():
    scaler = GradScaler("cpu", init_scale=4.0)
    assert [step(scaler, math.inf) for _ in range(5)] == [4, 2, 1, 1, 1]
    assert [step(scaler, 1.0) for _ in range(2001)] == [1] * 2000 + [2]


def test_a_gradient_that_overflows_at_the_floor_is_a_failure(random_model, group_of_one):
    config = small(random_model, "unused", dtype="float16")
    policy, _, optimizer = train.load_policies(config, random_model, CPU)
    bad = batch()
    bad.advantage_N[0] = torch.nan
    updates = [train.train_minibatch(config, policy, optimizer, [bad], lr=0.5) for _ in range(19)]
    assert [u.failed for u in updates] == [False] * 16 + [True] * 3
    assert not any(u.applied for u in updates)


# ---- runs


@pytest.fixture(scope="module")
def straight(warm_model, tmp_path_factory):
    """(folder, rows) of three steps whose first optimizer steps overflow."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        start_at(patch, 2.0**26)
        return out, run(small(warm_model, out, **FP16, steps=3))


@pytest.mark.slow
def test_overflows_are_counted_apart_and_end_no_run(straight):
    _, rows = straight
    overflowed = [row["overflowed_updates"] for row in rows]
    assert overflowed[0] >= 1 and overflowed[2] == 0
    assert [row["skipped_updates"] for row in rows] == [0, 0, 0]
    assert rows[2]["loss_scale"] == 2.0 ** (26 - sum(overflowed))
    assert rows[2]["grad_norm"] > 0
    assert not list(straight[0].glob("nonfinite-*")), "an overflow is no batch to inspect"


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits_and_the_same_loss_scale(
    warm_model, straight, tmp_path, monkeypatch
):
    start_at(monkeypatch, 2.0**26)
    for steps in (1, 3):
        run(small(warm_model, tmp_path / "halves", **FP16, steps=steps))
    assert_same_run(straight[0], tmp_path / "halves")


@pytest.mark.slow
def test_an_overflow_of_one_process_is_one_of_all(warm_model, tmp_path):
    """Gradients of rank 1 alone are infinite, in the first optimizer step."""
    prelude = """
import os, math, torch
from drgrpo.model import Policy
original, calls = Policy.loss, []
def loss(self, batch, scale):
    value, stats = original(self, batch, scale)
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 1:
        value.register_hook(lambda grad: grad * math.inf)
    return value, stats
Policy.loss = loss
"""
    finish(launch(small(warm_model, tmp_path / "two", **FP16), 2, prelude))
    rows = metrics(tmp_path / "two")
    assert [row["overflowed_updates"] for row in rows] == [1, 0]
    assert [row["loss_scale"] for row in rows] == [2.0**15, 2.0**15]


@pytest.mark.slow
def test_trainer_and_sampler_are_closer_than_in_bfloat16(straight, warm_model, tmp_path):
    """What float16 is for (arXiv 2510.26788). Its rounding error is an eighth."""
    bfloat16 = run(small(warm_model, tmp_path / "bfloat16", dtype="bfloat16", eval_data=""))
    for ours, theirs in zip(straight[1], bfloat16, strict=False):
        assert ours["parity_mean"] < theirs["parity_mean"] / 3
        assert ours["parity_mean"] <= parity.LIMITS[torch.float16][0]


@pytest.mark.slow
@pytest.mark.vllm
def test_a_model_that_vllm_refuses_in_float16_is_one_line(tmp_path, tokenizer, group_of_one):
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Glm4Config(**shape, head_dim=16, pad_token_id=0, architectures=["Glm4ForCausalLM"])
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"batch": 4, "max_tokens": 64, "kv_cache_gb": 0.1, "tp": 1, "sleep": False}
    with pytest.raises(UserError, match=r"--dtype float16: vLLM refuses it .* --dtype bfloat16"):
        VLLMEngine(str(tmp_path), tokenizer, dtype=torch.float16, device=CPU, **settings)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_samples_in_float16_from_merged_weights(warm_model, tmp_path):
    """LoRA and float16 together, with the parity gate on."""
    config = small(warm_model, tmp_path / "run", dtype="float16", engine="vllm", eval_data="")
    config = replace(config, lora_rank=4, lora_alpha=8, lr=3e-3, sampler_batch=64, steps=3)
    shown = finish(launch(config))
    assert "runs on: 1 x cpu, float16; engine vllm" in shown
    rows = metrics(tmp_path / "run")
    assert all(row["parity_mean"] < 1e-3 for row in rows) and rows[-1]["skipped_updates"] == 0
