"""The warm-up learns, is cached by its inputs, and leaves nothing half-made behind."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drgrpo.config import RECIPES
from drgrpo.model import load_policy
from drgrpo.pack import pack
from drgrpo.tiny import warmup
from drgrpo.tiny.warmup import Warmup, build_tiny_model, cached_tiny_model, tiny_model

SHORT = Warmup(steps=2, batch=8)


def test_the_model_is_a_small_qwen2_that_any_text_fits_into(tmp_path):
    build_tiny_model(Warmup(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.num_parameters() < 5e6 and model.config.tie_word_embeddings
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path)) == 260
    head_size = model.config.hidden_size // model.config.num_attention_heads
    assert head_size == 32, "the least that vLLM's CPU build takes"


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


def test_the_same_inputs_are_trained_once(tmp_path, monkeypatch):
    trained, log = [], []
    monkeypatch.setattr(warmup, "train", lambda config, path, log: trained.append(config))
    changes = ({"seed": 1}, {"lr": 1e-3}, {"steps": 3}, {"hidden_size": 128}, {"notices": False})
    configs = [SHORT, *(replace(SHORT, **change) for change in changes)]
    paths = [cached_tiny_model(config, tmp_path, log.append) for config in configs * 2]
    assert trained == configs
    assert paths[:6] == paths[6:] and len(set(paths)) == 6
    assert [f"warm-up: from the cache, {path}" for path in paths[6:]] == log


def test_the_model_of_a_run_has_its_seed(tmp_path, monkeypatch, group_of_one):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warmup, "train", lambda *args: None)
    path = tiny_model(replace(RECIPES["tiny"](), seed=5), print)
    assert path == str(cached_tiny_model(Warmup(seed=5), "runs/warmup"))


def test_a_warm_up_that_dies_leaves_no_model_under_the_final_name(tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(warmup, "train", die)
        cached_tiny_model(SHORT, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial", ".lock"}
    assert (cached_tiny_model(SHORT, tmp_path) / "model.safetensors").exists()


def test_every_response_ends_and_every_step_has_its_own_gradient(tmp_path, monkeypatch):
    policies, sequences = [], []

    def noted_load(*args, **options):
        policies.append(load_policy(*args, **options))
        return policies[-1]

    def noted_pack(batch):
        assert all(p.grad is None for p in policies[0].parameters())
        sequences.extend(batch)
        return pack(batch)

    monkeypatch.setattr(warmup, "load_policy", noted_load)
    monkeypatch.setattr(warmup, "pack", noted_pack)
    build_tiny_model(SHORT, tmp_path)
    warmup.train(SHORT, tmp_path)
    lengths = [len(sequence.token_ids) for sequence in sequences]
    assert len(lengths) == 16, "two steps of eight"
    assert [sequence.token_ids.index(256) + 1 for sequence in sequences] == lengths


def test_it_learns_to_imitate(tmp_path):
    log = []
    cached_tiny_model(Warmup(steps=100, batch=16), tmp_path, log.append)
    (line,) = log
    nll = float(re.search(r"100/100  nll/token ([\d.]+)", line)[1])
    assert nll < 1.5, "a uniform guess over 260 bytes costs 5.6 nats"
