"""The ledger adds up, and decides as one would by hand for the paper's models and cards."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from drgrpo.config import Config
from drgrpo.run.memory import GIB, Ledger, ledger_of, make_ledger, plan_sampling
from drgrpo.types import UserError


def qwen2(vocab, width, inner, heads, kv_heads, tied):
    sizes = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": inner}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return Qwen2Config(**sizes, num_hidden_layers=28, tie_word_embeddings=tied)


MODELS = {
    "7B": (qwen2(152064, 3584, 18944, 28, 4, tied=False), 7.615e9),
    "1.5B": (qwen2(151936, 1536, 8960, 12, 2, tied=True), 1.54e9),
}
CONFIG = Config(recipe="the paper's", sampler_batch=128)


def ledger(model: str = "7B", gb: int | None = 80, shards: int = 8, **changes) -> Ledger:
    """The paper's 7B run on 8 cards of 80 GiB, unless told otherwise. gb=None: no GPU."""
    gpu_bytes = gb * GIB if gb else None
    return make_ledger(replace(CONFIG, **changes), *MODELS[model], 1024, shards, gpu_bytes)


def test_shards_of_the_7b_model():
    kept = ledger().kept
    assert kept["master weights"] * GIB == pytest.approx(4 * 7.615e9 / 8)
    assert kept["Adam"] * GIB == pytest.approx(8 * 7.615e9 / 8)
    assert ledger().sampling["vLLM weights"] * GIB == pytest.approx(15.23e9)
    assert ledger(tp=2).sampling["vLLM weights"] * GIB == pytest.approx(15.23e9 / 2)


def test_two_copies_of_the_model_are_sharded_over_half_of_the_processes():
    assert ledger(shards=8, dp_replicate=2) == ledger(shards=4)


def test_a_micro_batch_needs_two_blocks_both_embeddings_and_the_gradient_of_the_head():
    for name, embeddings in (("7B", 2), ("1.5B", 1)):  # the 1.5B model ties them
        (lm, parameters), training = MODELS[name], ledger(name).training
        vocabulary = lm.vocab_size * lm.hidden_size
        block = (parameters - embeddings * vocabulary) / 28
        gathered = 2 * (2 * vocabulary + 2 * block)  # bytes, in bfloat16
        assert training["gathered weights"] * GIB == pytest.approx(gathered)
        head = 4 * vocabulary + 2 * 4096 * lm.vocab_size
        assert training["LM head"] * GIB == pytest.approx(head)
        assert training["gradients"] * GIB == pytest.approx(4 * parameters / 8)


def test_a_reference_model_is_kept_too():
    assert ledger(kl_coef=0.1).kept["reference"] == ledger().kept["master weights"]


def test_float32_takes_twice_the_bytes_of_bfloat16():
    half, single = ledger(gb=640), ledger(gb=640, dtype="float32")
    assert single.training["activations"] == 2 * half.training["activations"]
    assert single.sampling == {name: 2 * size for name, size in half.sampling.items()}


def test_the_cache_it_wants_holds_all_sequences():
    wanted = 128 * 4024 * 57344  # bytes a token: 2 x 28 layers x 4 heads x 128 x 2
    assert ledger(gb=640).kv_cache * GIB == pytest.approx(wanted)


def test_vllm_stays_where_there_is_room_and_sleeps_where_there_is_none():
    assert not ledger(gb=141).sleep
    assert ledger(shards=2, gb=80).sleep
    assert not ledger("1.5B", gb=80).sleep
    assert ledger(gb=80, sleep="on").sleep and not ledger(shards=2, gb=80, sleep="off").sleep


def test_vllm_stays_if_half_of_the_cache_that_it_wants_fits_beside_training():
    assert plan_sampling(CONFIG, wanted=10, free=30, training=24) == (False, 6)
    assert plan_sampling(CONFIG, wanted=10, free=30, training=26) == (True, 10)


@pytest.mark.parametrize("gb", [40, 80, 141])
@pytest.mark.parametrize("model", MODELS)
def test_what_it_decides_fits(model, gb):
    result = ledger(model, gb=gb)
    while_sampling = sum(result.kept.values()) + sum(result.sampling.values())
    beside = 0 if result.sleep else sum(result.training.values())
    assert while_sampling + beside <= 0.93 * gb


@pytest.mark.parametrize("changes", [{"shards": 1}, {"gb": 24}, {"checkpointing": "none"}], ids=str)
def test_what_cannot_fit_is_refused_with_the_way_out(changes):
    with pytest.raises(UserError, match=r"7.6 B parameters.*do not fit.*use more processes"):
        ledger(**changes)


def test_checkpointing_orders_the_activations():
    ledgers = [ledger(checkpointing=c, gb=None) for c in ("full", "selective", "none")]
    sizes = [result.training["activations"] for result in ledgers]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] / 5


def test_without_a_gpu_nothing_is_decided():
    result = ledger(gb=None)
    assert not result.sleep and result.kv_cache == 0.25 and "no GPU" in str(result)
    assert ledger(gb=None, kv_cache_gb=1.5).kv_cache == 1.5


def test_a_cache_that_the_user_names_is_used():
    assert ledger(kv_cache_gb=5.0).kv_cache == 5.0


def test_a_run_asks_for_its_own_model_and_device(random_model):
    lm = AutoModelForCausalLM.from_pretrained(random_model)
    result = ledger_of(CONFIG, lm, 100, 2, torch.device("cpu"))
    assert result == make_ledger(CONFIG, lm.config, lm.num_parameters(), 100, 2, None)
