"""The models that recipes make themselves, and the one of `tiny`."""

from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drgrpo import imitation
from drgrpo.config import RECIPES
from drgrpo.tiny import arithmetic, warmup
from drgrpo.tiny import tokenizer as byte_tokenizer
from drgrpo.tiny.warmup import Warmup, build_tiny_model, cached_tiny_model, demonstrations
from drgrpo.warmup import initial_model
from runs import finish, launch, metrics, small

SHORT = Warmup(steps=2, batch=8)


def test_the_model_of_a_run_has_its_seed(tmp_path, monkeypatch, group_of_one):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imitation, "imitate", lambda *args: None)
    path = initial_model(replace(RECIPES["tiny"](), seed=5), print)
    assert path == str(cached_tiny_model(Warmup(seed=5), "runs/warmup"))


def test_any_other_model_is_taken_as_it_is():
    assert initial_model(RECIPES["oat_zero_7b"](), print) == "Qwen/Qwen2.5-Math-7B"


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


@pytest.mark.slow
def test_two_processes_with_an_empty_cache_start(tmp_path):
    """Rank 0 alone runs the supervised phase, so no part of it may be a collective."""
    prelude = f"""
from pathlib import Path
from drgrpo import imitation
from drgrpo.tiny import warmup
imitation.CACHE = Path({str(tmp_path / "cache")!r})
initial = warmup.Warmup.__init__
warmup.Warmup.__init__ = lambda self, **fields: initial(self, **fields | dict(steps=2, batch=4))
"""
    config = small("tiny", tmp_path / "run", steps=1, eval_data="")
    shown = finish(launch(config, processes=2, prelude=prelude))
    assert "warm-up    2/2" in shown and len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lr": 1e-3}, {"steps": 3}, {"hidden_size": 128}, {"notices": False}]
)
def test_every_setting_is_part_of_the_cache_key(tmp_path, monkeypatch, change):
    monkeypatch.setattr(imitation, "imitate", lambda *args: None)
    configs = (SHORT, replace(SHORT, **change), replace(SHORT, **asdict(SHORT)))
    first, other, same = (cached_tiny_model(config, tmp_path) for config in configs)
    assert first == same != other


@pytest.mark.parametrize("module", [arithmetic, byte_tokenizer, imitation, warmup], ids=str)
def test_the_code_is_part_of_the_cache_key(tmp_path, monkeypatch, module):
    monkeypatch.setattr(imitation, "imitate", lambda *args: None)
    first = cached_tiny_model(SHORT, tmp_path)
    (tmp_path / "changed.py").write_text("changed")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    assert cached_tiny_model(SHORT, tmp_path) != first


def test_prompts_are_those_that_rl_trains_on(tokenizer):
    prompts = {f"{p.question}~" for p in arithmetic.problems("train")}
    shown = {tokenizer.decode(sequence.prompt_ids) for sequence in next(demonstrations(SHORT))}
    assert shown <= prompts


def test_the_seed_chooses_problems_and_flaws(monkeypatch):
    made, original = [], arithmetic.Demonstrator
    monkeypatch.setattr(
        arithmetic, "Demonstrator", lambda *args: made.append(args) or original(*args)
    )
    configs = [replace(SHORT, seed=seed, notices=False) for seed in (0, 0, 1)]
    first, same, other = (next(demonstrations(config)) for config in configs)
    assert [s.prompt_ids for s in first] != [s.prompt_ids for s in other]
    assert first == same and made == [(0, False), (0, False), (1, False)]


def test_every_response_ends():
    for _, batch in zip(range(2), demonstrations(SHORT), strict=False):
        assert len(batch) == 8
        assert all(
            sequence.token_ids.index(256) + 1 == len(sequence.token_ids) for sequence in batch
        )
