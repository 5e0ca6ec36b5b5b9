"""The PyTorch sampler: what it reports is what the model computes, and a sample depends on its own
seed alone. Then the order in which vLLM is called, on an imitation of it."""

import json
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from drgrpo.config import RECIPES
from drgrpo.engine import (
    check_batch_invariance,
    check_drafts,
    make_engine,
    resolve_engine,
    stop_token_ids,
)
from drgrpo.engine_torch import grouped_attention, sample_token, uniforms
from drgrpo.engine_vllm import (
    cache_arguments,
    draft_arguments,
    joined,
    llm_arguments,
    prepare_environment,
    reload_arguments,
    reload_weights,
    rest_seed,
    to_completion,
    warn_of_old_runner,
)
from drgrpo.types import BLANK, MAX_BATCHED_TOKENS, Completion, Request, Sampling, UserError

CPU = torch.device("cpu")


def build(path: str, tokenizer, name: str = "torch", max_tokens=1024, **options):
    config = replace(RECIPES["tiny"](), engine=name, sampler_batch=16)
    for field in ("tp", "batch_invariant", "dtype", "vllm", "speculate"):
        if field in options:
            config = replace(config, **{field: options.pop(field)})
    return make_engine(config, path, tokenizer, CPU, max_tokens, **options)


@pytest.fixture(scope="module")
def engine(random_model, tokenizer):
    return build(random_model, tokenizer)


@pytest.fixture(scope="module")
def model(random_model):
    return AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32).eval()


def requests(count: int, lengths=(3, 11, 40)) -> list[Request]:
    """Prompts of different lengths, three samples of each."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, lengths[i % len(lengths)]).tolist() for i in range(count)]
    return [Request(prompts[i // 3], seed=1000 + i) for i in range(count)]


def sampling(**changes) -> Sampling:
    return Sampling(**{"max_new_tokens": 24, "stop_token_ids": (256,)} | changes)


def forward_logprobs(
    model, prompt: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logprob_LV = torch.log_softmax(logits / temperature, -1)
    return logprob_LV.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_plain_forward_pass(engine, model, temperature):
    batch = requests(24)  # two batches, padded prompts, rows that stop early
    completions = engine.generate(batch, sampling(temperature=temperature))
    for request, completion in zip(batch, completions, strict=True):
        expected = forward_logprobs(model, request.prompt_ids, completion.token_ids, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)


def test_log_probs_of_prompts_without_padding(engine, model):
    batch = requests(12, lengths=(7,))
    for request, completion in zip(batch, engine.generate(batch, sampling()), strict=True):
        expected = forward_logprobs(model, request.prompt_ids, completion.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_heads_attend_to_the_keys_of_their_group(new, padded):
    """Four query heads on two key heads, with a scale of the model's own."""
    torch.manual_seed(0)
    query = torch.randn(3, 4, new, 8)
    key, value = torch.randn(2, 3, 2, 5, 8)
    mask = torch.ones(new, 5, dtype=torch.bool).tril(5 - new).expand(3, 1, new, 5).clone()
    mask[1, ..., 0] = not padded
    mask[1, ..., 0, 0] |= new == 5  # a padded query attends to itself
    out_BnHd, _ = grouped_attention(None, query, key, value, mask if padded else None, scaling=0.3)

    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    score = (0.3 * query @ key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(out_BnHd, (score.softmax(-1) @ value).transpose(1, 2))


def test_a_16_bit_sampler_computes_logits_in_float32(random_model, tokenizer):
    engine = build(random_model, tokenizer, dtype="bfloat16")
    base = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.bfloat16).eval()
    weights = base.state_dict()
    weights["lm_head.weight"] = weights["lm_head.weight"] * 16  # bfloat16 would round the logits
    engine.sync(weights.items())
    request = requests(1)[0]
    (completion,) = engine.generate([request], sampling(max_new_tokens=1))
    with torch.no_grad():
        hidden_D = base.model(torch.tensor([request.prompt_ids])).last_hidden_state[0, -1]
        logit_V = weights["lm_head.weight"].float() @ hidden_D.float()
    expected = torch.log_softmax(logit_V, -1)[completion.token_ids[0]].item()
    assert completion.logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_a_sample_does_not_depend_on_the_batch(engine):
    every_fifth = requests(24)[::5]
    batch = every_fifth + requests(24)[1::2]  # samples of a prompt need not stand together
    together = engine.generate(batch, sampling())
    alone = [engine.generate([r], sampling())[0].token_ids for r in every_fifth]
    assert alone == [c.token_ids for c in together[: len(every_fifth)]]
    assert together == engine.generate(batch, sampling())
    samples = engine.generate(requests(3), sampling())
    assert len({tuple(c.token_ids) for c in samples}) == 3, "samples of one prompt must differ"


def test_greedy_takes_the_likeliest_token(engine, model):
    (request,) = requests(1)
    (completion,) = engine.generate([request], sampling(temperature=0.0, max_new_tokens=8))
    ids = list(request.prompt_ids)
    for token in completion.token_ids:
        with torch.no_grad():
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
        ids.append(token)


def test_a_response_ends_with_its_stop_token_or_at_the_limit(engine):
    stops = tuple(range(0, 256, 8))
    completions = engine.generate(requests(48), sampling(stop_token_ids=stops, max_new_tokens=20))
    assert 0 < sum(c.finished for c in completions) < 48
    for c in completions:
        assert len(c.token_ids) == len(c.logprobs)
        *earlier, last = [token in stops for token in c.token_ids]
        assert not any(earlier) and last == c.finished
        assert c.finished or len(c.token_ids) == 20


def test_a_stop_string_ends_a_response_and_stays_in_it(engine, tokenizer):
    texts = [tokenizer.decode(c.token_ids) for c in engine.generate(requests(48), sampling())]
    needle = next(text[10:12] for text in texts if text[10:12].isascii() and len(text) > 14)
    for free, c in zip(
        texts, engine.generate(requests(48), sampling(stop=("~~~~", needle))), strict=True
    ):
        text = tokenizer.decode(c.token_ids)
        assert text == (free[: free.index(needle) + len(needle)] if needle in free else free)
        assert c.finished == (needle in text or c.token_ids[-1] == 256)


def test_no_stop_string_is_seen_before_the_text_has_it(engine, tokenizer):
    """The first tokens of a response are fewer than those in which a stop string is looked for."""
    (free,) = engine.generate(requests(1), sampling())
    first = tokenizer.decode(free.token_ids[:1])
    needle = first * 2
    assert needle not in tokenizer.decode(free.token_ids)
    assert engine.generate(requests(1), sampling(stop=(needle,))) == [free]


def test_prompt_and_response_together_end_at_max_tokens(random_model, engine, tokenizer):
    short = build(random_model, tokenizer, max_tokens=45)
    batch = requests(9)  # prompts of 3, 11 and 40 tokens
    pairs = zip(engine.generate(batch, sampling()), short.generate(batch, sampling()), strict=True)
    for request, (free, cut) in zip(batch, pairs, strict=True):
        room = 45 - len(request.prompt_ids)
        assert cut.token_ids == free.token_ids[:room]
        assert cut.finished == (free.finished and len(free.token_ids) <= room)


def in_parts(engine, batch, sampling, every: int):
    """The completions of a batch that is left open after each `every` tokens, and how often."""
    done, drawn, calls = {}, dict(enumerate(batch)), 0
    while drawn:
        asked, which = [], list(drawn)
        completions = engine.generate(
            list(drawn.values()),
            sampling,
            lambda k, completion, which=which: done.update({which[k]: completion}),
            lambda asked=asked: asked.append(1) or len(asked) > every,
        )
        for i, completion in zip(which, completions, strict=True):
            assert completion.open == (i not in done)
            drawn[i] = replace(drawn[i], drawn=completion)
        drawn = {i: request for i, request in drawn.items() if i not in done}
        calls += 1
    return [done[i] for i in range(len(batch))], calls


@pytest.mark.parametrize("every", [1, 5, 23])
def test_an_open_response_goes_on_as_if_it_had_never_stopped(engine, every):
    """Three batches of prompts with padding. Some rows end early."""
    batch, how = requests(36), sampling(stop_token_ids=tuple(range(0, 256, 16)))
    whole = engine.generate(batch, how)
    parts, calls = in_parts(engine, batch, how, every)
    assert calls > 24 // every
    for one, other in zip(parts, whole, strict=True):
        assert one.token_ids == other.token_ids and one.finished == other.finished
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
    assert {c.finished for c in whole} == {True, False}


def test_a_stop_string_may_begin_before_a_response_is_left_and_end_after(engine, tokenizer):
    texts = [tokenizer.decode(c.token_ids) for c in engine.generate(requests(12), sampling())]
    needles = (texts[0][4:8], texts[5][9:13])
    whole = engine.generate(requests(12), sampling(stop=needles))
    assert whole[0].finished and len(whole[0].token_ids) < 24
    for every in (1, 2, 3):
        parts, _ = in_parts(engine, requests(12), sampling(stop=needles), every)
        assert [c.token_ids for c in parts] == [c.token_ids for c in whole]


def test_what_was_drawn_keeps_its_log_probs_and_counts_in_the_limits(random_model, tokenizer):
    short = build(random_model, tokenizer, max_tokens=45)  # 5 tokens after a prompt of 40
    for request in requests(9)[::3]:
        drawn = Completion([7, 8, 9], [-7.0, -8.0, -9.0], finished=False, open=True)
        (completion,) = short.generate([replace(request, drawn=drawn)], sampling())
        assert completion.token_ids[:3] == [7, 8, 9] and completion.logprobs[:3] == [-7, -8, -9]
        assert len(completion.token_ids) == min(24, 45 - len(request.prompt_ids))


def test_what_no_batch_has_reached_is_returned_as_it_came(engine):
    batch = requests(20)  # the engine runs 16 at once
    completions = engine.generate(batch, sampling(), enough=lambda: True)
    assert completions == [BLANK] * 20
    asked = []
    completions = engine.generate(
        batch, sampling(), enough=lambda: len(asked.append(1) or asked) > 3
    )
    assert sorted(len(c.token_ids) for c in completions) == [0] * 4 + [3] * 16


def test_sync_takes_over_every_weight_and_notices_a_missing_one(random_model, engine, tokenizer):
    fresh = build(random_model, tokenizer)
    changed = {name: weight + 0.01 for name, weight in engine.lm.state_dict().items()}
    fresh.sync(changed.items())
    assert all(torch.equal(weight, changed[name]) for name, weight in fresh.lm.state_dict().items())
    changed.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(RuntimeError, match="up_proj"):
        fresh.sync(changed.items())


def test_sampled_tokens_follow_the_distribution():
    logits_BV = torch.tensor([[0.0, 1.0, 2.0, -1e9]]).repeat(20000, 1)
    uniform_B = torch.from_numpy(uniforms(list(range(20000)), 1))[:, 0]
    for temperature in (1.0, 0.5):
        token_B, logprob_B = sample_token(logits_BV, uniform_B, temperature)
        expected = torch.softmax(logits_BV[0] / temperature, -1)
        counts = torch.bincount(token_B, minlength=4) / 20000
        assert (counts - expected).abs().max() < 0.015  # four standard deviations
        torch.testing.assert_close(logprob_B, expected.log()[token_B])


def test_no_random_number_gives_a_token_without_probability():
    """Not the smallest one, nor one that rounding lifts to the sum of all probabilities."""
    logits_BV = torch.tensor([[-1e9, 0.0, 0.0]] * 2)
    token_B, _ = sample_token(logits_BV, torch.tensor([0.0, 1.0], dtype=torch.float64), 1.0)
    assert token_B.tolist() == [1, 2]


def test_uniforms_are_splitmix64():
    """The first outputs of the published generator from state 0."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert uniforms([0], 3)[0].tolist() == [(z >> 11) * 2.0**-53 for z in outputs]


def test_uniforms_are_stateless_uniform_and_uncorrelated():
    u = uniforms(list(range(400)), 250)
    assert (u >= 0).all() and (u < 1).all()
    assert np.array_equal(u[7:9], uniforms([7, 8], 250))
    assert np.array_equal(u[:, :10], uniforms(list(range(400)), 10))
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    neighbouring_seeds = np.corrcoef(u[:-1].ravel(), u[1:].ravel())
    neighbouring_positions = np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())
    assert abs(neighbouring_seeds[0, 1]) < 0.02 and abs(neighbouring_positions[0, 1]) < 0.02


def test_no_request_gives_no_completion(engine):
    assert engine.generate([], sampling()) == []


def test_auto_is_torch_without_a_gpu_and_vllm_with_one():
    assert resolve_engine("auto", CPU) == "torch"
    assert resolve_engine("auto", torch.device("cuda", 0)) == "vllm"
    assert resolve_engine("vllm", CPU) == "vllm"


def test_the_tiny_recipe_samples_with_pytorch_on_a_gpu_too():
    """It is over before vLLM would have started."""
    assert resolve_engine(RECIPES["tiny"]().engine, torch.device("cuda", 0)) == "torch"


@pytest.mark.parametrize(
    ("generation", "tokenizer", "expected"),
    [
        (256, 256, (256,)),
        ([7, 8], 9, (7, 8, 9)),
        (7, None, (7,)),
        (None, 9, (9,)),
        (None, None, ()),
    ],
)
def test_stop_tokens_are_those_of_the_model_and_of_its_tokenizer(
    tmp_path, generation, tokenizer, expected
):
    GenerationConfig(eos_token_id=generation).save_pretrained(tmp_path)
    assert stop_token_ids(str(tmp_path), SimpleNamespace(eos_token_id=tokenizer)) == expected


# ---- the calls of vLLM, in order: what a GPU would need, on an imitation that records them


class RecordingLLM:
    """Imitates `vllm.LLM`: notes what is called, with what."""

    def __init__(self, **settings):
        self.settings, self.calls = settings, []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method, args: tuple = (), kwargs: dict | None = None) -> None:
        weights = args[0] if args else kwargs["weights_iterator"]
        self.calls.append("load " + " ".join(name for name, _ in weights))

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True


class OldWorker:
    """vLLM's worker before it provided its own config to the layers that load."""

    def reload_weights(self, weights_iterator):
        self.model_runner.reload_weights(weights_iterator)


class Worker:
    """vLLM 0.32's worker."""

    def reload_weights(self, weights_iterator):
        with set_current_vllm_config(self.vllm_config):  # noqa: F821
            self.model_runner.reload_weights(weights_iterator)


@pytest.fixture
def imitation(monkeypatch, group_of_one):
    """Builds a `VLLMEngine` on a `RecordingLLM`."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=RecordingLLM))
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", SimpleNamespace(Worker=Worker))
    monkeypatch.setattr("drgrpo.engine_vllm.prepare_environment", lambda *settings: None)
    return lambda **changes: build("model", None, "vllm", **changes)


WEIGHTS = [("a", torch.ones(1)), ("b", torch.ones(1))]


def test_sync_wakes_the_weights_loads_wakes_the_cache_and_resets_it(imitation, monkeypatch):
    engine = imitation(sleep=True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: engine.llm.calls.append("empty cache"))
    engine.sync(WEIGHTS)
    engine.sleep()
    engine.sync(WEIGHTS)
    engine.sync(WEIGHTS)
    awake = ["load a b", "reset"]
    asleep = ["empty cache", "wake weights", "load a b", "wake kv_cache", "reset"]
    assert engine.llm.calls == [*awake, "sleep 2", *asleep, *awake]


def test_an_engine_that_sleeps_wakes_before_it_ends(imitation, monkeypatch):
    engine = imitation(sleep=True)
    calls = engine.llm.calls
    shutdown = SimpleNamespace(shutdown=lambda: calls.append("shutdown"))
    engine.llm.llm_engine = SimpleNamespace(engine_core=shutdown)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty cache"))
    engine.sleep()
    engine.close()
    assert calls == ["sleep 2", "empty cache", "wake weights kv_cache", "shutdown"]
    engine.close()
    assert calls[4:] == ["shutdown"]


def test_vllm_is_made_as_the_config_says(imitation):
    """And it samples from the whole distribution, whatever the model's own settings are."""
    settings = imitation(max_tokens=77, kv_cache_gb=2.0, tp=2).llm.settings
    expected = {
        "model": "model",
        "load_format": "auto",
        "dtype": "float32",
        "max_model_len": 77,
        "max_num_seqs": 32,  # 16 a process
        "tensor_parallel_size": 2,
        "distributed_executor_backend": None,
        "kv_cache_memory_bytes": 2 * 2**30,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
    }
    assert expected.items() <= settings.items()
    assert imitation(load_weights=False).llm.settings["load_format"] == "dummy"


def arguments(**changes) -> dict:
    """Those of `LLM` for a 7B run on one node."""
    settings = {
        "dtype": torch.bfloat16,
        "on_gpu": True,
        "world": 8,
        "batch": 256,
        "max_tokens": 4024,
        "kv_cache_gb": 30.0,
        "tp": 1,
        "sleep": False,
    }
    return llm_arguments("model", **settings | changes)


def test_on_a_gpu_the_engine_gets_the_gpus_arguments(imitation, monkeypatch, capsys):
    vllm_config = SimpleNamespace(use_v2_model_runner=False)
    inner = SimpleNamespace(vllm_config=vllm_config)
    monkeypatch.setattr(RecordingLLM, "llm_engine", inner, raising=False)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    room = {"max_tokens": 4024, "kv_cache_gb": 30.0, "sleep": False, "load_weights": False}
    recipe, gpu = RECIPES["oat_zero_7b"](), torch.device("cuda", 0)
    engine = make_engine(recipe, "model", None, gpu, **room)
    assert engine.llm.settings == arguments(world=1, load_weights=False, batch=128)
    assert "V1 model runner" in capsys.readouterr().out


def test_options_reach_vllm_and_its_refusal_names_them(imitation, monkeypatch):
    options = {"enforce_eager": False, "swap": 1}
    assert options.items() <= imitation(vllm=json.dumps(options)).llm.settings.items()

    def refuse(self, **settings):
        raise TypeError("EngineArgs.__init__() got an unexpected keyword argument 'swap'")

    monkeypatch.setattr(RecordingLLM, "__init__", refuse)
    with pytest.raises(UserError, match="--vllm: vLLM refuses swap: EngineArgs"):
        imitation(vllm=json.dumps(options))
    with pytest.raises(TypeError):
        imitation()


def test_options_of_vllm_are_refused_without_it():
    config = replace(RECIPES["tiny"](), vllm='{"enforce_eager": true}')
    with pytest.raises(UserError, match=r"--vllm goes with --engine vllm, .* is torch"):
        make_engine(config, "no folder", None, CPU, 64)


def test_only_processes_among_others_are_placed_by_torchruns_variables():
    assert arguments()["distributed_executor_backend"] == "external_launcher"
    assert arguments(world=1)["distributed_executor_backend"] is None


@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_head_of_a_16_bit_sampler_computes_in_float32(on_gpu):
    head = {"head_dtype": "float32"}
    for dtype in (torch.bfloat16, torch.float16):
        assert arguments(dtype=dtype, on_gpu=on_gpu)["hf_overrides"] == head
    assert "hf_overrides" not in arguments(dtype=torch.float32, on_gpu=on_gpu)


def test_a_gpu_computes_as_many_tokens_at_once_as_the_memory_ledger_counts():
    assert arguments()["max_num_batched_tokens"] == MAX_BATCHED_TOKENS
    assert arguments(batch=10000)["max_num_batched_tokens"] == 10000, "vLLM refuses fewer"
    assert "max_num_batched_tokens" not in arguments(on_gpu=False)


def test_only_a_gpu_gives_a_cache_without_a_size_what_it_has_left():
    assert cache_arguments(0.0, on_gpu=True) == {"gpu_memory_utilization": 0.9}
    assert cache_arguments(0.0, on_gpu=False) == {"kv_cache_memory_bytes": 2**28}
    size = {"kv_cache_memory_bytes": 3 * 2**30}
    assert cache_arguments(3.0, on_gpu=False) == size
    assert cache_arguments(3.0, on_gpu=True) == size | {"gpu_memory_utilization": 0.01}


@pytest.fixture
def environment(monkeypatch):
    """An environment of this test alone."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    return variables


def test_variables_that_the_user_has_set_are_kept(environment):
    environment["VLLM_LOGGING_LEVEL"] = "DEBUG"
    prepare_environment(on_gpu=False, dtype=torch.float32)
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.parametrize("on_gpu", [True, False])
def test_vllms_warnings_are_shown_on_a_gpu(environment, on_gpu):
    prepare_environment(on_gpu, torch.bfloat16)
    assert environment["VLLM_LOGGING_LEVEL"] == ("WARNING" if on_gpu else "ERROR")


def test_the_flag_for_batch_invariance_is_stronger_than_the_users_variable(environment):
    prepare_environment(True, torch.bfloat16)
    assert "VLLM_BATCH_INVARIANT" not in environment
    environment["VLLM_BATCH_INVARIANT"] = "0"
    prepare_environment(True, torch.bfloat16, batch_invariant=True)
    assert environment["VLLM_BATCH_INVARIANT"] == "1"


@pytest.mark.parametrize(
    ("engine", "device", "capability", "reason"),
    [
        ("vllm", "cpu", None, "the engine here is vllm on cpu"),
        ("torch", "cuda", (9, 0), "the engine here is torch on cuda"),
        ("vllm", "cuda", (7, 5), "capability 8.0 or higher, as an A100; this one has 7.5"),
    ],
)
def test_batch_invariance_is_refused_where_there_is_none(
    monkeypatch, engine, device, capability, reason
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=rf"--batch-invariant.*{reason}.*[Ll]eave the flag out"):
        check_batch_invariance(engine, torch.device(device))


def test_batch_invariance_is_for_vllm_on_an_a100_or_newer(monkeypatch):
    for capability in ((8, 0), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        check_batch_invariance("vllm", torch.device("cuda", 0))


def test_an_engine_is_not_made_where_batch_invariance_is_refused():
    config = replace(RECIPES["tiny"](), batch_invariant=True)
    with pytest.raises(UserError, match="--batch-invariant"):
        make_engine(config, "no folder", None, CPU, 64)


@pytest.mark.parametrize("engine", ["vllm", "torch"])
def test_drafts_are_refused_without_vllm_on_a_gpu(engine):
    config = replace(RECIPES["tiny"](), engine=engine, speculate="ngram")
    with pytest.raises(UserError, match=rf"--speculate ngram is for vLLM on a GPU.* {engine} on"):
        make_engine(config, "no folder", None, CPU, 64)
    check_drafts("vllm", torch.device("cuda", 0))
    with pytest.raises(UserError, match="--speculate"):
        check_drafts("torch", torch.device("cuda", 0))


def test_drafts_reach_vllm(imitation, monkeypatch):
    monkeypatch.setattr("drgrpo.engine.check_drafts", lambda engine, device: None)
    assert "speculative_config" not in imitation().llm.settings
    drafts = imitation(speculate="ngram").llm.settings["speculative_config"]
    assert drafts == draft_arguments("ngram")["speculative_config"]


def test_a_vllm_without_the_batch_invariant_mode_is_refused(imitation, monkeypatch):
    monkeypatch.setattr("drgrpo.engine.check_batch_invariance", lambda engine, device: None)
    for envs in (SimpleNamespace(), SimpleNamespace(VLLM_BATCH_INVARIANT=False)):
        modules = SimpleNamespace(LLM=RecordingLLM, envs=envs, __version__="0.1")
        monkeypatch.setitem(sys.modules, "vllm", modules)
        with pytest.raises(UserError, match=r"vLLM 0\.1 does not have this mode"):
            imitation(batch_invariant=True)
    modules.envs = SimpleNamespace(VLLM_BATCH_INVARIANT=True)
    imitation(batch_invariant=True)


def test_a_slow_model_runner_of_vllm_is_loud(capsys):
    for config in (SimpleNamespace(), SimpleNamespace(use_v2_model_runner=False)):
        warn_of_old_runner(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config)))
        assert "WARNING: vLLM uses its V1 model runner" in capsys.readouterr().out
    config.use_v2_model_runner = True
    warn_of_old_runner(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config)))
    assert capsys.readouterr().out == ""


def test_a_worker_that_lacks_vllms_config_gets_it(monkeypatch):
    """Only an older vLLM is helped: 0.32 does it itself."""
    gpu_worker, weights = SimpleNamespace(Worker=Worker), iter(WEIGHTS)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", gpu_worker)
    kwargs = {"weights_iterator": weights}
    assert reload_arguments(weights) == {"method": "reload_weights", "kwargs": kwargs}
    gpu_worker.Worker = OldWorker
    assert reload_arguments(weights) == {"method": reload_weights, "args": (weights,)}


def test_the_help_for_an_older_worker_loads_under_vllms_config(monkeypatch):
    current, loaded = [], []

    @contextmanager
    def set_current_vllm_config(config):
        current.append(config)
        yield
        current.pop()

    class ModelRunner:
        def reload_weights(self, weights_iterator):
            loaded.append((current[-1], list(weights_iterator)))

    config = SimpleNamespace(set_current_vllm_config=set_current_vllm_config)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    worker = SimpleNamespace(vllm_config="its config", model_runner=ModelRunner())
    reload_weights(worker, iter(WEIGHTS))
    assert loaded == [("its config", WEIGHTS)] and not current


@pytest.mark.parametrize(("reason", "finished"), [("stop", True), ("length", False)])
@pytest.mark.parametrize("flat", [True, False])
def test_a_response_of_vllm_is_finished_if_a_stop_rule_ended_it(reason, finished, flat):
    """Log-probs come as flat lists or, from an older vLLM, as a dict for every token."""
    logprobs = [{5: SimpleNamespace(logprob=-1.0)}, {6: SimpleNamespace(logprob=-2.0)}]
    if flat:
        logprobs = SimpleNamespace(logprobs=[-1.0, -0.5, -2.0], start_indices=[0, 2])
    output = SimpleNamespace(logprobs=logprobs, token_ids=(5, 6), finish_reason=reason)
    assert to_completion(output) == Completion([5, 6], [-1.0, -2.0], finished)


def test_the_rest_of_a_response_has_random_numbers_of_its_own():
    """vLLM's V1 runner would repeat those of the first tokens."""
    request, drawn = Request([1], seed=7), Completion([5], [-1.0], False, open=True)
    begun, longer = (replace(request, drawn=replace(drawn, token_ids=[5] * n)) for n in (1, 2))
    assert rest_seed(request) == 7
    assert rest_seed(begun) == rest_seed(begun) and 0 <= rest_seed(begun) < 2**63
    others = [replace(begun, seed=8), longer, request]
    assert len({rest_seed(r) for r in (begun, *others)}) == 4


def test_a_stop_string_across_two_requests_of_vllm_ends_the_response(tokenizer):
    ids = tokenizer("so 42</answer> and on").input_ids
    for cut in range(14):  # the string ends with token 14
        drawn = Completion(ids[:cut], [-1.0] * cut, False, open=True)
        rest = Completion(ids[cut:], [-2.0] * (len(ids) - cut), False, open=True)
        whole = joined(drawn, rest, ("~~~~~~~~~~~~~~~", "</answer>"), tokenizer)
        text = tokenizer.decode(whole.token_ids)
        across = cut > 0  # else vLLM has seen the whole text
        assert text == ("so 42</answer>" if across else "so 42</answer> and on")
        assert whole.finished == across and whole.open != across
        assert whole.logprobs == ([-1.0] * cut + [-2.0] * len(ids))[: len(whole.token_ids)]


def test_an_engine_that_must_stay_awake_is_not_put_to_sleep(imitation):
    engine = imitation(sleep=False)
    assert engine.llm.settings["enable_sleep_mode"] is False
    engine.sleep()
    engine.sync(WEIGHTS)
    assert engine.llm.calls == ["load a b", "reset"]


def test_other_weights_than_at_first_are_an_error(imitation):
    engine = imitation(sleep=True)
    engine.sync(WEIGHTS)
    for weights in (WEIGHTS[:1], [*WEIGHTS, ("c", torch.ones(1))]):
        with pytest.raises(RuntimeError, match=r"other names than at first: \['[bc]'\]"):
            engine.sync(weights)


def test_the_order_of_the_weights_does_not_matter(imitation):
    engine = imitation(sleep=True)
    engine.sync(WEIGHTS)
    engine.sync(WEIGHTS[::-1])
    assert engine.llm.calls == ["load a b", "reset", "load b a", "reset"]


def test_vllm_that_is_not_installed_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("drgrpo.engine_vllm.prepare_environment", lambda *settings: None)
    with pytest.raises(UserError, match="or use --engine torch"):
        build("model", None, "vllm")
