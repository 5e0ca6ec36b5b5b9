"""The policy on packed sequences is the model on each sequence alone, outputs and gradients."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from drgrpo.model import (
    EXPENSIVE,
    Objective,
    load_policy,
    max_positions,
    resolve_attention,
    sdpa_attention,
    varlen_attention,
)
from drgrpo.pack import pack
from drgrpo.types import UserError

CPU = torch.device("cpu")


def sequences(count=7, vocab=260, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(vocab, (n,), generator=generator).tolist()  # noqa: E731
    return [
        (draw(3 + i), response := draw(1 + 5 * i % 17), [-1.0] * len(response), 0.5 - i % 2)
        for i in range(count)
    ]


@pytest.fixture(params=["qwen2 tied", "llama untied"])
def model_dir(request, random_model, tmp_path):
    if request.param == "qwen2 tied":
        return random_model
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
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
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def separate(model_dir):
    """log-probs, and gradients of the plain policy-gradient loss, one sequence at a time through
    transformers."""
    lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    logprobs = []
    for prompt, response, _, advantage in sequences():
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprobs.append(
            torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]
        )
        (-0.25 * advantage * logprobs[-1].sum()).backward()
    return torch.cat(logprobs).detach(), {name: p.grad for name, p in lm.named_parameters()}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_packed_equals_one_sequence_at_a_time(model_dir, checkpointing):
    logprob_N, grads = separate(model_dir)
    policy = load_policy(model_dir, dtype=torch.float32, device=CPU, checkpointing=checkpointing)
    loss, stats = policy(
        pack(sequences()), Objective(), scale=0.25
    )  # on-policy: the gradient is that of -A logp
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
        policy = load_policy(
            random_model, dtype=torch.float32, device=CPU, checkpointing=checkpointing
        )
        with FlopCounterMode(display=False) as counter:
            policy(pack(sequences()), Objective(), scale=1.0)[0].backward()
        counts = counter.get_flop_counts()["Global"]
        flops[checkpointing] = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert flops["none"] == flops["selective"] < 0.85 * flops["full"]


def test_every_attention_of_this_torch_counts_as_expensive():
    """A name that no op has would be recomputed without a word."""
    import torch.nn.attention.varlen

    found = set()
    for name in EXPENSIVE:
        namespace, op, overload = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        found |= {str(getattr(packet, overload))} if packet else set()
    assert EXPENSIVE - found <= {"flash_attn._flash_attn_varlen_forward.default"}, (
        "only the package that CI lacks"
    )


def test_compiled_blocks_compute_the_same(random_model):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    results = []
    for compile in (False, True):
        policy = load_policy(random_model, dtype=torch.float32, device=CPU, compile=compile)
        loss, stats = policy(pack(sequences()), Objective(), scale=0.25)
        loss.backward()
        results.append(
            (stats["logprob"], torch.cat([p.grad.flatten() for p in policy.parameters()]))
        )
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)


def test_a_kl_penalty_pulls_towards_the_reference(random_model):
    """The gradient of the k3 estimator, by autograd on its formula."""
    policy = load_policy(random_model, dtype=torch.float32, device=CPU)
    batch = pack([(prompt, response, old, 0.0) for prompt, response, old, _ in sequences()])
    ref_N = torch.linspace(-6, -5, len(batch.target_N))
    loss, stats = policy(batch, Objective(kl_coef=0.3), batch.sampler_logprob_N, ref_N, scale=0.5)
    loss.backward()
    got = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    logprob_N = stats["logprob"]
    k3_N = (ref_N - logprob_N).exp() - 1 - (ref_N - logprob_N)
    torch.testing.assert_close(stats["kl"], k3_N)
    torch.testing.assert_close(loss.detach(), 0.5 * 0.3 * k3_N.sum())
    slope_N = 1 - (ref_N - logprob_N).exp()  # of k3 with respect to the log-prob
    weighted = pack([(p, r, o, 0.0) for p, r, o, _ in sequences()])
    weighted = replace(weighted, advantage_N=-0.3 * slope_N)
    policy(weighted, Objective(), scale=0.5)[
        0
    ].backward()  # on-policy: the gradient of -advantage * logp
    torch.testing.assert_close(
        got, torch.cat([p.grad.flatten() for p in policy.parameters()]), atol=1e-5, rtol=1e-4
    )


def test_both_kernel_backends_train_the_same(random_model):
    """Triton in its interpreter where there is no GPU."""
    results = []
    for kernel in ("torch", "triton"):
        policy = load_policy(random_model, dtype=torch.float32, device=CPU, kernel=kernel)
        batch = pack(sequences(3))
        loss, stats = policy(batch, Objective(), batch.sampler_logprob_N, scale=0.25)
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in policy.parameters()])
        results.append(
            (
                loss.detach(),
                stats["logprob"],
                stats["entropy"],
                policy(batch, Objective())[0],
                grads,
            )
        )
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


def test_bfloat16_compute_keeps_master_weights_and_token_numbers_in_float32(
    random_model, group_of_one
):
    """FSDP2 would cast a batch's advantages and log-probs to bfloat16 on the way in: a ratio off by
    a percent."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = load_policy(random_model, dtype=dtype, device=CPU)
        batch = pack(sequences())
        logprob_N, _ = policy(batch, Objective())
        loss, stats = policy(batch, Objective(), logprob_N - 0.001, scale=0.25)
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.parameters())
        grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in policy.parameters()]
        results.append((stats["log_ratio"], torch.cat([g.flatten() for g in grads])))
    (_, exact), (log_ratio_N, grads) = results
    torch.testing.assert_close(log_ratio_N, torch.full_like(log_ratio_N, 0.001), atol=1e-5, rtol=0)
    assert (grads - exact).norm() <= 0.03 * exact.norm()


def test_packed_sequences_do_not_see_each_other(random_model):
    policy = load_policy(random_model, dtype=torch.float32, device=CPU)
    one, *others = sequences()
    alone, _ = policy(pack([one]), Objective())
    for neighbours in (others, others[::-1]):
        together, _ = policy(pack([one, *neighbours]), Objective())
        torch.testing.assert_close(together[: len(alone)], alone, atol=1e-5, rtol=0)


def test_gradients_do_not_depend_on_the_split_into_micro_batches(random_model):
    grads = []
    for parts in (
        [sequences()],
        [[s] for s in sequences()],
        [sequences()[:3], [], sequences()[3:]],
    ):
        policy = load_policy(random_model, dtype=torch.float32, device=CPU)
        for part in parts:
            batch = pack(part)
            policy(batch, Objective(), batch.sampler_logprob_N, scale=1 / 100)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], atol=1e-6, rtol=1e-5)


def test_an_empty_batch_has_exactly_zero_gradient_everywhere(random_model):
    policy = load_policy(random_model, dtype=torch.float32, device=CPU)
    loss, _ = policy(pack([]), Objective(), scale=1.0)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_weights_are_sent_under_their_own_names_the_tied_head_too(random_model):
    policy = load_policy(random_model, dtype=torch.float32, device=CPU)
    weights = dict(policy.named_weights(torch.bfloat16))
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


def test_max_positions(random_model):
    assert max_positions(random_model) == 1024


# ---- what only a GPU can show

GPU = torch.device("cuda", 0)


def attention_of_each_sequence(query_THd, key_TKd, value_TKd, lengths):
    """One sequence after the other."""
    out = []
    for q, k, v in zip(*(x.split(lengths) for x in (query_THd, key_TKd, value_TKd)), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        score_Hqk = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        future_qk = torch.ones_like(score_Hqk[0], dtype=torch.bool).triu(1)
        out.append(
            torch.einsum(
                "hqk,khd->qhd", score_Hqk.masked_fill(future_qk, -torch.inf).softmax(-1), v
            )
        )
    return torch.cat(out)


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
    draw = lambda n: torch.randn(sum(lengths), n, width, generator=generator, device=GPU).to(dtype)  # noqa: E731
    inputs, upstream = [draw(n).requires_grad_() for n in (heads, shared, shared)], draw(heads)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    cu_seqlens = torch.tensor([0, *lengths], device=GPU).cumsum(0, dtype=torch.int32)
    function = {"varlen": varlen_attention, "sdpa": sdpa_attention}[backend]
    packing = {"cu_seq_lens_q": cu_seqlens, "max_length_q": max(lengths), "scaling": width**-0.5}
    out = function(None, *(x.transpose(0, 1)[None] for x in inputs), None, **packing)[0][0]
    want = attention_of_each_sequence(*wide, lengths)
    got = [out, *torch.autograd.grad(out, inputs, upstream)]
    exact = [want, *torch.autograd.grad(want, wide, upstream.double())]
    for x, y in zip(got, exact, strict=True):
        assert (
            x.shape == y.shape
            and (x - y).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * y.norm()
        )


def flat_gradient(policy):
    grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in policy.parameters()]
    return torch.cat([g.flatten() for g in grads]).cpu()


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
    policy = load_policy(
        model_dir,
        dtype=torch.bfloat16,
        device=GPU,
        attention=attention,
        checkpointing=checkpointing,
    )
    loss, stats = policy(pack(sequences(), GPU), Objective(), scale=0.25)
    loss.backward()
    assert all(
        isinstance(p, DTensor) and p.dtype == p.grad.dtype == torch.float32
        for p in policy.parameters()
    )
    assert (stats["logprob"].cpu() - logprob_N).abs().mean() < 0.03
    exact = torch.cat([grads[name].flatten() for name, _ in policy.lm.named_parameters()])
    assert (flat_gradient(policy) - exact).norm() <= 0.05 * exact.norm()
    before = [p.full_tensor().clone() for p in policy.parameters()]
    torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True).step()
    moved = [
        (p.full_tensor() - x).abs().max().item()
        for p, x in zip(policy.parameters(), before, strict=True)
    ]
    assert all(0 < most < 2e-6 for most in moved)
    sent = dict(policy.named_weights(torch.bfloat16))
    assert all(
        w.device.type == "cuda" and w.dtype == torch.bfloat16 and not isinstance(w, DTensor)
        for w in sent.values()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_gpu_float32_is_float32(model_dir, kernel):
    """As exact as on a CPU: no tf32 in any matrix product."""
    logprob_N, grads = separate(model_dir)
    policy = load_policy(model_dir, dtype=torch.float32, device=GPU, kernel=kernel)
    loss, stats = policy(pack(sequences(), GPU), Objective(), scale=0.25)
    loss.backward()
    torch.testing.assert_close(stats["logprob"].cpu(), logprob_N, atol=2e-5, rtol=0)
    exact = torch.cat([grads[name].flatten() for name, _ in policy.lm.named_parameters()])
    assert (flat_gradient(policy) - exact).norm() <= 1e-4 * exact.norm()
