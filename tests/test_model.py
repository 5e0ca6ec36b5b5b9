"""The policy on packed sequences is the model on each sequence alone, outputs and gradients."""

import functools
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.varlen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.utils import import_utils

from conftest import ROOT
from drgrpo import model
from drgrpo.config import RECIPES
from drgrpo.kernels.linear_drgrpo import linear_logprob
from drgrpo.model import (
    EXPENSIVE,
    Objective,
    Policy,
    check_architecture,
    load_policy,
    make_objective,
    max_positions,
    resolve_attention,
    resolve_logits,
    sdpa_attention,
    varlen_attention,
)
from drgrpo.pack import Sequence, pack
from drgrpo.types import UserError

CPU = torch.device("cpu")


def load(path: str, objective: Objective | None = None, **changes) -> Policy:
    """The policy at `path`: float32 on the CPU unless `changes` say otherwise."""
    options = {"dtype": torch.float32, "device": CPU} | changes
    return load_policy(path, objective or Objective(), **options)


def sequences(count: int = 7) -> list[Sequence]:
    """All of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(260, (n,), generator=generator).tolist()

    result = []
    for i in range(count):
        prompt, response = tokens(3 + i), tokens(1 + 5 * i % 17)
        result.append(Sequence(prompt, response, [-1.0] * len(response), 0.5 - i % 2))
    return result


def flat_gradient(policy: Policy) -> Tensor:
    """All gradients end to end, unsharded, on the CPU."""
    grads = [p.grad for p in policy.parameters()]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
    return torch.cat([g.flatten() for g in whole]).cpu()


@pytest.fixture(params=["qwen2 tied", "llama untied"])
def model_dir(request, random_model, tmp_path):
    if request.param == "qwen2 tied":
        return random_model
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
        max_position_embeddings=128,
        eos_token_id=256,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return str(tmp_path)


def separate(model_dir: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and gradients of the plain policy-gradient loss by name, of one sequence at a time
    through transformers."""
    lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    logprobs = []
    for prompt, response, _, advantage, _ in sequences():
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        target = torch.tensor(response)[:, None]
        logprobs.append(torch.log_softmax(logits, -1).gather(1, target)[:, 0])
        (-0.25 * advantage * logprobs[-1].sum()).backward()
    return torch.cat(logprobs).detach(), {name: p.grad for name, p in lm.named_parameters()}


def flat_in_order(grads: dict[str, Tensor], policy: Policy) -> Tensor:
    """Gradients by name in the order of `flat_gradient`."""
    return torch.cat([grads[name].flatten() for name, _ in policy.lm.named_parameters()])


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_packed_equals_one_sequence_at_a_time(model_dir, checkpointing):
    logprob_N, grads = separate(model_dir)
    policy = load(model_dir, checkpointing=checkpointing)
    # on-policy: the gradient is that of -advantage * logprob
    loss, stats = policy.loss(pack(sequences()), scale=0.25)
    loss.backward()
    torch.testing.assert_close(stats["logprob"], logprob_N, atol=1e-5, rtol=0)
    for name, p in policy.lm.named_parameters():
        torch.testing.assert_close(
            p.grad, grads[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_activation_checkpointing_computes_again_what_it_says(random_model):
    """Matmuls of a forward and backward pass, counted by the profiler: full runs those of the
    blocks once more."""
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for checkpointing in ("none", "selective", "full"):
        policy = load(random_model, checkpointing=checkpointing)
        with FlopCounterMode(display=False) as counter:
            policy.loss(pack(sequences()), scale=1.0)[0].backward()
        counts = counter.get_flop_counts()["Global"]
        flops[checkpointing] = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert flops["none"] == flops["selective"] < 0.85 * flops["full"]


def test_every_attention_of_this_torch_counts_as_expensive():
    """A name that no op has would be recomputed without a word."""
    existing = set()
    for name in EXPENSIVE:
        namespace, op, overload = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        existing |= {str(getattr(packet, overload))} if packet else set()
    only_missing = {"flash_attn._flash_attn_varlen_forward.default"}
    assert EXPENSIVE - existing <= only_missing, "only the package that CI lacks"
    fused = r"aten::_scaled_dot_product_(cudnn|efficient|flash)_attention(_for_cpu)?"
    ops = [name for name in torch._C._dispatch_get_all_op_names() if re.fullmatch(fused, name)]
    assert ops
    assert {f"{name.replace('::', '.')}.default" for name in ops} <= EXPENSIVE


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(random_model):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    results = []
    for compile in (False, True):
        policy = load(random_model, compile=compile)
        loss, stats = policy.loss(pack(sequences()), scale=0.25)
        loss.backward()
        results.append((stats["logprob"], flat_gradient(policy)))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)


def test_a_kl_penalty_pulls_towards_the_reference(random_model):
    """The gradient of the k3 estimator is that of a policy gradient whose advantage is minus the
    estimator's slope."""
    batch = pack([sequence._replace(advantage=0.0) for sequence in sequences()])
    ref_N = torch.linspace(-6, -5, len(batch.target_N))
    policy = load(random_model, Objective(kl_coef=0.3))
    batch.old_logprob_N, batch.ref_logprob_N = batch.sampler_logprob_N, ref_N
    loss, stats = policy.loss(batch, 0.5)
    loss.backward()
    penalty_gradient = flat_gradient(policy)

    gap_N = ref_N - stats["logprob"]
    k3_N = gap_N.exp() - 1 - gap_N
    torch.testing.assert_close(stats["kl"], k3_N)
    torch.testing.assert_close(loss.detach(), 0.5 * 0.3 * k3_N.sum())
    slope_N = 1 - gap_N.exp()  # of k3 with respect to the log-prob
    policy.zero_grad()
    plain = pack(sequences())
    plain.advantage_N = -0.3 * slope_N
    policy.loss(plain, scale=0.5)[0].backward()
    torch.testing.assert_close(penalty_gradient, flat_gradient(policy), atol=1e-5, rtol=1e-4)


def test_every_number_of_the_objective_reaches_the_loss(random_model):
    batch = pack(sequences())
    plain, default = load(random_model), Objective()
    logprob_N = plain.logprob(batch)
    batch.old_logprob_N = logprob_N + torch.linspace(-0.5, 0.5, len(logprob_N))
    loss, _ = plain.loss(batch, 1.0)
    changes = {"clip_low": 0.01, "clip_high": 0.01, "tis_cap": 1.5, "temperature": 0.7}
    for name, value in changes.items():
        policy = load(random_model, replace(default, **{name: value}))
        assert (policy.loss(batch, 1.0)[0] - loss).abs() > 1e-3, name
        assert torch.equal(policy.logprob(batch), logprob_N) == (name != "temperature")


def test_cispo_s_gradient_is_that_of_log_probs_with_a_capped_constant_weight(random_model):
    """No token loses its gradient, and only the upper side is capped."""
    policy, plain = load(random_model, Objective(clip_high=0.3, detached=True)), load(random_model)
    batch = pack(sequences())
    logprob_N = plain.logprob(batch)
    batch.old_logprob_N = logprob_N + torch.linspace(-0.9, 0.9, len(logprob_N))
    weight_N = (logprob_N - batch.old_logprob_N).exp().clamp(max=1.3)
    batch.advantage_N[0] = 0.0
    assert (weight_N < 0.7).any() and (weight_N[:2] == 1.3).all()
    loss, stats = policy.loss(batch, 0.5)
    loss.backward()
    torch.testing.assert_close(stats["log_ratio"], logprob_N - batch.old_logprob_N)
    assert torch.equal(stats["clipped"], (weight_N == 1.3) & (batch.advantage_N != 0))
    weighed = pack(sequences())  # without old log-probs: the policy gradient itself
    weighed.advantage_N = weight_N * batch.advantage_N
    plain.loss(weighed, 0.5)[0].backward()
    torch.testing.assert_close(flat_gradient(policy), flat_gradient(plain), atol=1e-6, rtol=1e-4)


def test_cispo_without_old_log_probs_is_dr_grpo_s_first_update(random_model):
    policy, plain = load(random_model, Objective(detached=True)), load(random_model)
    for one in (policy, plain):
        one.loss(pack(sequences()), 0.5)[0].backward()
    assert torch.equal(flat_gradient(policy), flat_gradient(plain))


@pytest.mark.parametrize(("algo", "cap"), [("drgrpo", 5.0), ("icepop", None)])
def test_a_mask_s_bound_is_no_cap_of_the_kernel(algo, cap):
    config = replace(RECIPES["oat_zero_7b"](), algo=algo, tis_cap=5.0)
    objective = make_objective(config, CPU)
    assert (objective.tis_cap, objective.detached) == (cap, False)


def test_shifted_logits_are_for_16_bits_on_a_gpu():
    cuda = torch.device("cuda")
    assert resolve_logits("auto", torch.bfloat16, cuda) == "shifted"
    assert resolve_logits("auto", torch.float16, cuda) == "shifted"
    assert resolve_logits("auto", torch.float32, cuda) == torch.float32
    assert resolve_logits("auto", torch.bfloat16, CPU) == torch.float32
    assert resolve_logits("shifted", torch.bfloat16, CPU) == "shifted"
    assert resolve_logits("float32", torch.bfloat16, cuda) == torch.float32


def test_all_log_probs_of_a_policy_have_the_logits_of_its_objective(random_model, group_of_one):
    """Those of an own pass, and those of an update with and without others to compare with."""
    batch, results = pack(sequences()), {}
    for logits in (torch.float32, "shifted"):
        policy = load(random_model, Objective(logits_dtype=logits), dtype=torch.bfloat16)
        batch.old_logprob_N = None
        first_N = policy.loss(batch, 1.0)[1]["logprob"]
        batch.old_logprob_N = policy.logprob(batch)
        stats = policy.loss(batch, 1.0)[1]
        assert torch.equal(first_N, batch.old_logprob_N) and not stats["log_ratio"].any()
        results[logits] = first_N
    gap_N = (results["shifted"] - results[torch.float32]).abs()
    assert 0 < gap_N.max() < 5e-3


def test_both_kernel_backends_train_the_same(random_model):
    """Triton in its interpreter where there is no GPU."""
    results, batch = [], pack(sequences(3))
    batch.old_logprob_N = batch.sampler_logprob_N
    for kernel in ("torch", "triton"):
        policy = load(random_model, kernel=kernel)
        loss, stats = policy.loss(batch, 0.25)
        loss.backward()
        values = loss.detach(), stats["logprob"], stats["entropy"], policy.logprob(batch)
        results.append((*values, flat_gradient(policy)))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


def test_the_kernel_of_the_policy_computes_the_log_probs_too(random_model, monkeypatch):
    backends = []

    def noted(*args, backend, **options):
        backends.append(backend)
        return linear_logprob(*args, backend="torch", **options)

    monkeypatch.setattr(model, "linear_logprob", noted)
    load(random_model, kernel="triton").logprob(pack(sequences(1)))
    assert backends == ["triton"]


def test_gradients_are_summed_over_processes_in_float32(random_model, group_of_one, monkeypatch):
    policies = []

    def noted(module, mp_policy, **options):
        policies.append(mp_policy)
        return fully_shard(module, mp_policy=mp_policy, **options)

    monkeypatch.setattr(model, "fully_shard", noted)
    load(random_model, dtype=torch.bfloat16)
    assert [p.reduce_dtype for p in policies] == [torch.float32] * 3, "two blocks and the root"


def test_bfloat16_compute_keeps_master_weights_and_token_numbers_in_float32(
    random_model, group_of_one
):
    """FSDP2 would cast a batch's advantages and log-probs to bfloat16 on the way in: a ratio off by
    a percent."""
    results, batch = [], pack(sequences())
    for dtype in (torch.float32, torch.bfloat16):
        policy = load(random_model, dtype=dtype)
        batch.old_logprob_N = policy.logprob(batch) - 0.001
        loss, stats = policy.loss(batch, 0.25)
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.parameters())
        results.append((stats["log_ratio"], flat_gradient(policy)))
    (_, exact), (log_ratio_N, gradient) = results
    torch.testing.assert_close(log_ratio_N, torch.full_like(log_ratio_N, 0.001), atol=1e-5, rtol=0)
    assert (gradient - exact).norm() <= 0.03 * exact.norm()


def test_loss_and_logprob_each_gather_the_weights_that_fsdp_has_sharded(random_model, group_of_one):
    """Each on a policy of its own: the first pass leaves the root's weights gathered."""
    batch = pack(sequences())
    logprob_N = load(random_model, dtype=torch.bfloat16).logprob(batch)
    _, stats = load(random_model, dtype=torch.bfloat16).loss(batch, scale=0.25)
    torch.testing.assert_close(logprob_N, stats["logprob"], atol=0.05, rtol=0)


def test_logprob_keeps_nothing_for_a_backward_pass(random_model):
    policy, hidden = load(random_model), []
    policy.lm.base_model.register_forward_hook(lambda *args: hidden.append(args[-1][0]))
    assert not policy.logprob(pack(sequences())).requires_grad
    assert not hidden[0].requires_grad


def test_packed_sequences_do_not_see_each_other(random_model):
    policy = load(random_model)
    first, *others = sequences()
    alone_N = policy.logprob(pack([first]))
    for neighbours in (others, others[::-1]):
        together_N = policy.logprob(pack([first, *neighbours]))
        torch.testing.assert_close(together_N[: len(alone_N)], alone_N, atol=1e-5, rtol=0)


def test_gradients_do_not_depend_on_the_split_into_micro_batches(random_model):
    all_at_once, one_by_one = [sequences()], [[s] for s in sequences()]
    with_an_empty_one = [sequences()[:3], [], sequences()[3:]]
    gradients = []
    for parts in (all_at_once, one_by_one, with_an_empty_one):
        policy = load(random_model)
        for batch in map(pack, parts):
            batch.old_logprob_N = batch.sampler_logprob_N
            policy.loss(batch, 1 / 100)[0].backward()
        gradients.append(flat_gradient(policy))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-5)


def test_an_empty_batch_has_exactly_zero_gradient_everywhere(random_model):
    policy = load(random_model)
    loss, _ = policy.loss(pack([]), scale=1.0)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_weights_are_sent_under_their_own_names_the_tied_head_too(random_model):
    weights = dict(load(random_model).named_weights(torch.bfloat16))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert all(w.dtype == torch.bfloat16 and not w.requires_grad for w in weights.values())
    assert set(weights) == set(AutoModelForCausalLM.from_pretrained(random_model).state_dict())


def test_attention_backends_are_chosen_or_refused_by_name():
    cuda, bf16 = torch.device("cuda", 0), torch.bfloat16
    assert resolve_attention("auto", CPU, torch.float32) == "sdpa"
    assert resolve_attention("auto", cuda, torch.float32) == "sdpa"
    assert resolve_attention("auto", cuda, bf16) in ("varlen", "flash_attn")
    assert resolve_attention("varlen", cuda, bf16) == "varlen"
    with pytest.raises(UserError, match="needs CUDA"):
        resolve_attention("varlen", CPU, bf16)


@pytest.mark.parametrize(
    ("distribution", "backend"), [("flash-attn", "flash_attn"), ("flash-attn-4", "varlen")]
)
def test_flash_attention_4_is_not_taken_for_2(tmp_path, monkeypatch, distribution, backend):
    """Both are installed as the module `flash_attn`."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    info = tmp_path / f"{distribution.replace('-', '_')}-4.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {distribution}\nVersion: 4.0.0\n")
    (info / "top_level.txt").write_text("flash_attn\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    installed = importlib.metadata.packages_distributions()
    monkeypatch.setattr(import_utils, "PACKAGE_DISTRIBUTION_MAPPING", installed)
    probes = import_utils.is_flash_attn_2_available, import_utils.is_torch_cuda_available
    for probe in probes:
        probe.cache_clear()
    try:
        assert resolve_attention("auto", torch.device("cuda", 0), torch.bfloat16) == backend
        if backend == "varlen":
            with pytest.raises(UserError, match="not flash-attn-4; install it, or use"):
                resolve_attention("flash_attn", torch.device("cuda", 0), torch.bfloat16)
    finally:
        for probe in probes:
            probe.cache_clear()


# ---- architectures that the policy would compute wrongly

SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
SLIDING_QWEN = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (MistralConfig(**SMALL, sliding_window=4), "sliding_window 4"),
        (Qwen2Config(**SMALL, **SLIDING_QWEN, max_window_layers=1), "layer_types sliding_attent"),
        (Gemma2Config(**SMALL), "attn_logit_softcapping 50.0, final_logit_softcapping 30.0, layer"),
        (Gemma3TextConfig(**SMALL), "layer_types sliding_attention"),
        (GptOssConfig(**SMALL), "layer_types sliding_attention"),
        (CohereConfig(**SMALL), "logit_scale 0.0625"),
        (GraniteConfig(**SMALL, logits_scaling=8.0), "logits_scaling 8.0"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_a_model_that_would_be_computed_wrongly_is_refused(tmp_path, config, field):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load(str(tmp_path))
    assert f"has {field}" in str(error.value) and "use another model" in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, sliding_window=None),
        Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=8),
        Qwen2Config(**SMALL, **SLIDING_QWEN, max_window_layers=2),
        LlamaConfig(**SMALL),
        GraniteConfig(**SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_full_attention_and_plain_logits_are_not_refused(tmp_path, config):
    config.save_pretrained(tmp_path)
    check_architecture(str(tmp_path))


def gap_without_refusal(config: PreTrainedConfig, path, monkeypatch) -> float:
    """Largest difference of the policy's log-probs from transformers' own, in nats."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    monkeypatch.setattr(model, "check_architecture", lambda path: None)
    lm = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    prompt, response, *_ = sequence = sequences()[6]
    with torch.no_grad():
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    expected_N = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    return (load(str(path)).logprob(pack([sequence])) - expected_N).abs().max().item()


SOFT_CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (MistralConfig(**SMALL, sliding_window=4), MistralConfig(**SMALL, sliding_window=None)),
        (Gemma2Config(**SMALL, **SOFT_CAPS), None),
        (GraniteConfig(**SMALL, logits_scaling=8.0), GraniteConfig(**SMALL)),
    ],
    ids=["sliding window", "soft-caps", "scaled logits"],
)
def test_without_the_refusal_the_numbers_would_be_wrong(tmp_path, monkeypatch, wrong, right):
    assert gap_without_refusal(wrong, tmp_path / "wrong", monkeypatch) > 0.01
    if right:
        assert gap_without_refusal(right, tmp_path / "right", monkeypatch) < 1e-5


def test_the_ranks_of_a_node_share_one_copy(monkeypatch):
    """Eight processes with two copies: ranks 0 to 3 and ranks 4 to 7."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(model, "init_device_mesh", lambda kind, shape, mesh_dim_names: shape)
    assert model.device_mesh(CPU, replicate=2) == (2, 4) and model.device_mesh(CPU, 1) == (8,)


def test_max_positions(random_model):
    assert max_positions(random_model) == 1024


# ---- what runs on a GPU only, as far as it can be called without one


def attention_of_each_sequence(query_THd, key_TKd, value_TKd, lengths):
    """One sequence after the other, [T, H, d]."""
    out = []
    for q, k, v in zip(*(x.split(lengths) for x in (query_THd, key_TKd, value_TKd)), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        score_Hqk = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        future_qk = torch.ones_like(score_Hqk[0], dtype=torch.bool).triu(1)
        weight_Hqk = score_Hqk.masked_fill(future_qk, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weight_Hqk, v))
    return torch.cat(out)


def heads_of(query: int, shared: int, lengths: list[int], dtype: torch.dtype) -> tuple[list, dict]:
    """Queries, keys and values [1, heads, T, 16], and the options that a policy passes along."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, sum(lengths), 16) for n in (query, shared, shared)]
    inputs = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    ]
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return inputs, {"cu_seq_lens_q": starts, "max_length_q": max(lengths), "scaling": 0.3}


@pytest.mark.parametrize(("query", "shared"), [(4, 4), (4, 2)], ids=["", "shared keys"])
def test_varlen_attention_asks_for_causal_attention_of_each_sequence(monkeypatch, query, shared):
    """A stand-in for FlashAttention computes what the operator is asked for."""
    lengths, real = [5, 1, 3], torch.nn.attention.varlen.varlen_attn

    @functools.wraps(real)  # with the signature of this torch
    def stand_in(*args, **kwargs):
        asked = inspect.signature(real).bind(*args, **kwargs)
        asked.apply_defaults()
        a = asked.arguments
        assert a["window_size"] == (-1, 0), "causal"
        assert a["cu_seq_q"] is a["cu_seq_k"] and a["max_q"] == a["max_k"] == max(lengths)
        assert a.get("enable_gqa", True) or a["query"].shape[1] == a["key"].shape[1]
        query_THd = a["query"] * a["scale"] * a["query"].shape[-1] ** 0.5
        return attention_of_each_sequence(
            query_THd, a["key"], a["value"], a["cu_seq_q"].diff().tolist()
        )

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", stand_in)
    inputs, options = heads_of(query, shared, lengths, torch.float32)
    out, expected = (
        function(None, *inputs, None, **options)[0]
        for function in (varlen_attention, sdpa_attention)
    )
    torch.testing.assert_close(out, expected)


def test_varlen_attention_passes_the_checks_of_this_torch():
    """PyTorch's own function and operator, forward and backward, on tensors without data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs, options = heads_of(4, 2, [5, 1, 3], torch.bfloat16)
        out, _ = varlen_attention(None, *inputs, None, **options)
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert out.shape == (1, 9, 4, 16) and out.dtype == torch.bfloat16
    assert [g.shape for g in gradients] == [x.shape for x in inputs]


COMPILE_THREADS = """
import torch
from drgrpo.engine_vllm import prepare_environment
prepare_environment(on_gpu=False, dtype=torch.float32)
import vllm, torch._inductor.config
print(torch._inductor.config.compile_threads)
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_leaves_the_trainers_compile_threads_alone():
    """vLLM sets TORCHINDUCTOR_COMPILE_THREADS=1 as it is imported. PyTorch has read it by then."""
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "3"}
    command = [sys.executable, "-c", COMPILE_THREADS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "3"


# ---- what only a GPU can show

GPU = torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "shared", "width"), [(4, 4, 64), (12, 2, 128), (28, 4, 128), (16, 8, 128), (2, 1, 32)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_gpu_packed_attention_is_that_of_each_sequence(backend, dtype, heads, shared, width):
    """Forward and backward at the head counts of the recipes' models."""
    if (backend, dtype) == ("varlen", torch.float32):
        pytest.skip("varlen_attn is for 16 bits")
    lengths, generator = [1, 300, 7, 64, 129, 2], torch.Generator(GPU).manual_seed(0)

    def random(n: int) -> Tensor:  # [T, n, width]
        shape = sum(lengths), n, width
        return torch.randn(shape, generator=generator, device=GPU).to(dtype)

    inputs, upstream = [random(n).requires_grad_() for n in (heads, shared, shared)], random(heads)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    function = {"varlen": varlen_attention, "sdpa": sdpa_attention}[backend]
    options = {
        "cu_seq_lens_q": torch.tensor([0, *lengths], device=GPU).cumsum(0, dtype=torch.int32),
        "max_length_q": max(lengths),
        "scaling": width**-0.5,
    }
    out = function(None, *(x.transpose(0, 1)[None] for x in inputs), None, **options)[0][0]
    expected = attention_of_each_sequence(*doubles, lengths)
    results = [out, *torch.autograd.grad(out, inputs, upstream)]
    exact = [expected, *torch.autograd.grad(expected, doubles, upstream.double())]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for x, y in zip(results, exact, strict=True):
        assert x.shape == y.shape and (x - y).norm() <= tolerance * y.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["varlen", "flash_attn", "sdpa"])
def test_gpu_bfloat16_policy_under_fsdp_is_the_model_on_each_sequence(
    model_dir, group_of_one, attention, checkpointing
):
    """One GPU, FSDP2: gradients and master weights are float32 shards, and a step that bfloat16
    would swallow moves them."""
    if attention == "flash_attn":
        pytest.importorskip("flash_attn", reason="the package flash-attn is not installed")
    logprob_N, grads = separate(model_dir)
    options = {"attention": attention, "checkpointing": checkpointing}
    policy = load(model_dir, dtype=torch.bfloat16, device=GPU, **options)
    loss, stats = policy.loss(pack(sequences(), GPU), scale=0.25)
    loss.backward()
    for p in policy.parameters():
        assert isinstance(p, DTensor) and p.dtype == p.grad.dtype == torch.float32
    assert (stats["logprob"].cpu() - logprob_N).abs().mean() < 0.03
    exact = flat_in_order(grads, policy)
    assert (flat_gradient(policy) - exact).norm() <= 0.05 * exact.norm()

    before = [p.full_tensor().clone() for p in policy.parameters()]
    torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True).step()
    for p, old in zip(policy.parameters(), before, strict=True):
        assert 0 < (p.full_tensor() - old).abs().max().item() < 2e-6
    for weight in dict(policy.named_weights(torch.bfloat16)).values():
        assert weight.device.type == "cuda" and weight.dtype == torch.bfloat16
        assert not isinstance(weight, DTensor)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_gpu_float32_is_float32(model_dir, kernel):
    """As exact as on a CPU: no tf32 in any matrix product."""
    logprob_N, grads = separate(model_dir)
    policy = load(model_dir, device=GPU, kernel=kernel)
    loss, stats = policy.loss(pack(sequences(), GPU), scale=0.25)
    loss.backward()
    torch.testing.assert_close(stats["logprob"].cpu(), logprob_N, atol=2e-5, rtol=0)
    exact = flat_in_order(grads, policy)
    assert (flat_gradient(policy) - exact).norm() <= 1e-4 * exact.norm()
