"""The ledger adds up, and decides as one would by hand for the paper's models and cards."""

import pytest
from transformers import Qwen2Config

from drgrpo.run.memory import GIB, make_ledger
from drgrpo.types import UserError

QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
QWEN_1_5B = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def ledger(lm=QWEN_7B, parameters=7.615e9, gb=80, **changes):
    settings = {
        "shards": 8,
        "bytes_each": 2,
        "checkpointing": "full",
        "microbatch": 16384,
        "max_tokens": 4024,
        "sequences": 128,
        "tp": 1,
        "kv_cache_gb": 0.0,
        "sleep": "auto",
        "gpu_bytes": gb * GIB if gb else None,
    }
    return make_ledger(lm, parameters, **settings | changes)


def test_shards_of_the_7b_model():
    kept = ledger().kept
    assert kept["master weights"] * GIB == pytest.approx(4 * 7.615e9 / 8)
    assert kept["Adam"] * GIB == pytest.approx(8 * 7.615e9 / 8)
    assert ledger().sampling["vLLM weights"] * GIB == pytest.approx(15.23e9)


def test_a_reference_model_is_kept_too():
    assert ledger(reference=True).kept["reference"] == ledger().kept["master weights"]


def test_the_cache_it_wants_holds_all_sequences():
    wanted = 128 * 4024 * 57344  # bytes a token: 2 x 28 layers x 4 heads x 128 x 2
    assert ledger(gb=640).kv_cache * GIB == pytest.approx(wanted)


def test_vllm_stays_where_there_is_room_and_sleeps_where_there_is_none():
    assert not ledger(gb=141).sleep
    assert ledger(shards=2, gb=80).sleep
    assert not ledger(QWEN_1_5B, 1.54e9, gb=80).sleep
    assert ledger(gb=80, sleep="on").sleep and not ledger(shards=2, gb=80, sleep="off").sleep


@pytest.mark.parametrize("gb", [40, 80, 141])
@pytest.mark.parametrize("model", [(QWEN_7B, 7.615e9), (QWEN_1_5B, 1.54e9)], ids=["7B", "1.5B"])
def test_what_it_decides_fits(model, gb):
    result = ledger(*model, gb=gb)
    beside = 0 if result.sleep else sum(result.training.values())
    assert sum(result.kept.values()) + sum(result.sampling.values()) + beside <= 0.93 * gb


@pytest.mark.parametrize("changes", [{"shards": 1}, {"gb": 24}, {"checkpointing": "none"}], ids=str)
def test_what_cannot_fit_is_refused_with_the_way_out(changes):
    with pytest.raises(UserError, match=r"7.6 B parameters.*do not fit.*use more processes"):
        ledger(**changes)


def test_checkpointing_orders_the_activations():
    sizes = [
        ledger(checkpointing=c, gb=None).training["activations"]
        for c in ("full", "selective", "none")
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] / 5


def test_without_a_gpu_nothing_is_decided():
    result = ledger(gb=None)
    assert not result.sleep and result.kv_cache == 0.25 and "no GPU" in str(result)
    assert ledger(gb=None, kv_cache_gb=1.5).kv_cache == 1.5


def test_a_cache_that_the_user_names_is_used():
    assert ledger(kv_cache_gb=5.0).kv_cache == 5.0
