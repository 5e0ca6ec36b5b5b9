"""The warm-up learns, is cached by its inputs, and leaves nothing half-made behind."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drgrpo.tiny import warmup
from drgrpo.tiny.warmup import Warmup, build_tiny_model, cached_tiny_model

SHORT = Warmup(steps=2, batch=8)


def test_the_model_is_a_small_qwen2_that_any_text_fits_into(tmp_path):
    build_tiny_model(Warmup(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.num_parameters() < 5e6 and model.config.tie_word_embeddings
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path)) == 260
    assert (
        model.config.hidden_size // model.config.num_attention_heads == 32
    )  # the least that vLLM's CPU build takes


def test_weights_follow_the_seed_and_leave_the_global_generator_alone(tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_tiny_model(Warmup(seed=seed), tmp_path / name)
    assert torch.equal(torch.rand(1), expected)
    a, b, c = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n).model.embed_tokens.weight for n in "abc"
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_same_inputs_are_trained_once(tmp_path):
    lines = []
    first = cached_tiny_model(SHORT, tmp_path, lines.append)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert cached_tiny_model(SHORT, tmp_path, lines.append) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp and "from the cache" in lines[
        -1
    ]
    for change in (
        {"seed": 1},
        {"lr": 1e-3},
        {"steps": 3},
        {"hidden_size": 128},
        {"notices": False},
    ):
        assert cached_tiny_model(replace(SHORT, **change), tmp_path, lines.append) != first


def test_a_warm_up_that_dies_leaves_no_model_under_the_final_name(tmp_path, monkeypatch):
    monkeypatch.setattr(warmup, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        cached_tiny_model(SHORT, tmp_path)
    assert all(p.name.endswith(".partial") for p in tmp_path.iterdir())
    monkeypatch.undo()
    assert cached_tiny_model(SHORT, tmp_path).exists()


def test_it_learns_to_imitate(tmp_path):
    lines = []
    cached_tiny_model(Warmup(steps=100, batch=16), tmp_path, lines.append)
    nll = float(re.search(r"100/100  nll/token ([\d.]+)", lines[-1])[1])
    assert nll < 1.5, "a uniform guess over 260 bytes costs 5.6 nats"
