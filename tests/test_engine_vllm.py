"""Real vLLM, in this process: its log-probs are the trainer's, after every weight sync, and what breaks that is noticed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from drgrpo.engine import Sampling, make_engine
from drgrpo.log import read_jsonl
from drgrpo.types import Request

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make env"),
]

MAX_GAP = 1e-4  # nats, float32; measured: 1e-6 at this size


@pytest.fixture(scope="module")
def group():
    from drgrpo import distributed

    distributed.start()
    yield
    distributed.stop()


def build(path: str, tokenizer):
    return make_engine("vllm", path, tokenizer, dtype=torch.float32, device=torch.device("cpu"), batch=64, max_tokens=256,
                       kv_cache_gb=0.05)  # fmt: skip


@pytest.fixture(scope="module")
def tied(group, random_model, tokenizer):
    """(engine, model): Qwen2 with tied embeddings, as the 0.5B and 1.5B models have."""
    yield build(random_model, tokenizer), AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def untied(group, tokenizer, tmp_path_factory):
    """(engine, model): Llama with an LM head of its own."""
    path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.08, max_position_embeddings=512,
        eos_token_id=256, bos_token_id=None, pad_token_id=257,
    )).save_pretrained(path)  # fmt: skip
    tokenizer.save_pretrained(path)
    yield build(str(path), tokenizer), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(params=["tied", "untied"])
def pair(request):
    return request.getfixturevalue(request.param)


def requests(count: int = 12) -> list[Request]:
    """Prompts of 40 to 70 tokens: more than one block of the prefix cache. Four samples of each."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(256, (40 + 10 * i,), generator=generator).tolist() for i in range(count // 4)]
    return [Request(prompts[i // 4], seed=77 + i) for i in range(count)]


def sampling(**changes) -> Sampling:
    return Sampling(**{"max_new_tokens": 16, "stop_token_ids": (256,)} | changes)


def gap(engine, model, temperature: float = 1.0) -> float:
    """Largest |sampler's log-prob - model's log-prob| over fresh samples."""
    largest = 0.0
    asked = requests()
    for request, completion in zip(asked, engine.generate(asked, sampling(temperature=temperature)), strict=True):
        prompt, response = request.prompt_ids, completion.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        own = torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]
        largest = max(largest, (own - torch.tensor(completion.logprobs)).abs().max().item())
    return largest


def train_a_little(model) -> None:
    """Move every weight, as an optimizer step does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_model_after_temperature(pair, temperature):
    engine, model = pair
    engine.sync(model.state_dict().items())
    assert gap(engine, model, temperature) < MAX_GAP


def test_sync_brings_every_weight(pair):
    engine, model = pair
    for _ in range(2):
        train_a_little(model)
        assert gap(engine, model) > 100 * MAX_GAP, "the sampler cannot know the new weights yet"
        engine.sync(model.state_dict().items())
        assert gap(engine, model) < MAX_GAP


def test_without_a_reset_the_prefix_cache_answers_for_the_old_weights(pair, monkeypatch):
    engine, model = pair
    engine.sync(model.state_dict().items())
    gap(engine, model)  # fills the cache
    train_a_little(model)
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
        engine.sync(model.state_dict().items())
    assert gap(engine, model) > 100 * MAX_GAP, "this test's prompts do not reach the cache"
    engine.sync(model.state_dict().items())
    assert gap(engine, model) < MAX_GAP


def test_a_refused_reset_is_an_error(tied, monkeypatch):
    engine, model = tied
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache"):
        engine.sync(model.state_dict().items())


def test_a_weight_that_is_left_out_is_an_error(pair):
    engine, model = pair
    engine.sync(model.state_dict().items())
    for left_out in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight"):
        with pytest.raises(RuntimeError, match=left_out):
            engine.sync((name, w) for name, w in model.state_dict().items() if name != left_out)
    engine.sync(model.state_dict().items())
    assert gap(engine, model) < MAX_GAP


def test_a_sample_depends_on_its_seed_alone(tied):
    engine, model = tied
    engine.sync(model.state_dict().items())
    together = engine.generate(requests(), sampling())
    assert [c.token_ids for c in together] == [engine.generate([r], sampling())[0].token_ids for r in requests()]
    assert len({tuple(c.token_ids) for c in together[:4]}) == 4, "samples of one prompt must differ"


def test_responses_end_with_a_stop_token_a_stop_string_or_at_the_limit(tied, tokenizer):
    engine, _ = tied
    stops = tuple(range(0, 256, 8))
    for c in engine.generate(requests(), sampling(stop_token_ids=stops)):
        assert [t in stops for t in c.token_ids] == [False] * (len(c.token_ids) - 1) + [c.finished] or c.token_ids[-1] == 256
        assert c.finished or len(c.token_ids) == 16
    (free,) = engine.generate(requests()[:1], sampling())
    text = tokenizer.decode(free.token_ids)
    needle = next(ch for ch in text[4:] if ch.isascii() and ch.isprintable())
    (cut,) = engine.generate(requests()[:1], sampling(stop=(needle,)))
    assert cut.finished and tokenizer.decode(cut.token_ids) == text[: text.index(needle) + 1]


def test_the_trainers_random_numbers_are_left_alone(group, random_model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(random_model, tokenizer)
    assert torch.equal(torch.rand(3), expected)


# ---- the whole job


def launch(model: str, out: Path, processes: int) -> list[dict]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "train.py",
        "--recipe", "tiny", "--engine", "vllm", "--model", model, "--out", str(out), "--prompts-per-step", "8",
        "--minibatches", "2", "--steps", "3", "--eval-every", "0",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine vllm" in done.stdout
    return read_jsonl(out / "metrics.jsonl")


def test_training_samples_from_vllm_on_one_process_and_on_two(group, warm_model, tokenizer, tmp_path):
    one, two = (launch(warm_model, tmp_path / str(n), n) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert a["parity_max"] < MAX_GAP and b["parity_max"] < MAX_GAP
        for column in ("reward_mean", "tokens", "loss", "grad_norm"):
            assert a[column] == pytest.approx(b[column], rel=1e-4), column
    assert {r["step"] for r in one} == {1, 2, 3} and max(r["reward_mean"] for r in one) > 0

    engine, model = build(str(tmp_path / "1" / "hf"), tokenizer), AutoModelForCausalLM.from_pretrained(tmp_path / "1" / "hf")
    assert gap(engine, model.float()) < MAX_GAP, "vLLM reads the written folder otherwise than transformers"
