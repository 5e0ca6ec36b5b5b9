"""The ledger adds up, and decides as one would by hand for the paper's models and cards.

That its formulas of training are those of the trainer is tested in test_rehearse.py."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from drgrpo.config import Config
from drgrpo.run.cards import known_sizes
from drgrpo.run.memory import (
    CONTEXT,
    GIB,
    GRAPHS,
    NCCL,
    Ledger,
    draft_ledger,
    ledger_of,
    make_ledger,
    plan_sampling,
)
from drgrpo.types import MAX_BATCHED_TOKENS, UserError

MODELS = {"7B": ("Qwen/Qwen2.5-Math-7B", 7.615e9), "1.5B": ("Qwen/Qwen2.5-Math-1.5B", 1.54e9)}
CONFIG = Config(recipe="the paper's", sampler_batch=128, tp=1)


def arguments(model: str = "7B", gb: int | None = 80, world: int = 8, **changes) -> tuple:
    """The paper's 7B run on 8 cards of 80 GiB, unless told otherwise. gb=None: no GPU."""
    name, parameters = MODELS[model]
    lm = AutoConfig.for_model(**known_sizes(name))
    return replace(CONFIG, **changes), lm, parameters, 1024, world, gb * GIB if gb else None


def ledger(*args, **changes) -> Ledger:
    return make_ledger(*arguments(*args, **changes))


def draft(*args, **changes) -> Ledger:
    return draft_ledger(*arguments(*args, **changes))


# ---- what is counted


def test_shards_of_the_7b_model():
    kept = ledger().kept
    assert kept["master weights"] * GIB == pytest.approx(4 * 7.615e9 / 8)
    assert kept["Adam"] * GIB == pytest.approx(8 * 7.615e9 / 8)
    assert ledger().sampler["weights"] * GIB == pytest.approx(15.23e9)
    assert ledger(tp=2).sampler["weights"] * GIB == pytest.approx(15.23e9 / 2)


def test_two_copies_of_the_model_are_sharded_over_half_of_the_processes():
    assert ledger(world=8, dp_replicate=2) == ledger(world=4)


def test_cuda_its_graphs_and_collectives_are_always_there_on_a_gpu():
    kept = ledger().kept
    assert (kept["CUDA"], kept["NCCL"], kept["CUDA graphs"]) == (CONTEXT, NCCL, GRAPHS)
    assert "NCCL" not in ledger("1.5B", world=1).kept and "CUDA" not in ledger(gb=None).kept


@pytest.mark.parametrize(
    ("logits", "dtype", "size"),
    [("auto", "bfloat16", 2), ("float32", "bfloat16", 4), ("auto", "float32", 4)],
)
def test_the_head_has_a_chunk_of_logits_and_if_they_are_shifted_a_copy_of_its_weight(
    logits, dtype, size
):
    flags = {"logits": logits, "dtype": dtype, "checkpointing": "none"}
    head = draft("1.5B", gb=640, **flags).training["LM head"] * GIB
    weight = 151_936 * 1536
    expected = 4 * weight + size * 7680 * 151_936 + (2 * weight if size == 2 else 0)
    assert head == pytest.approx(expected, rel=0.01)


def test_the_float32_logits_of_a_chunk_take_a_sixteenth_of_a_small_card_at_most():
    weight_gradient = 4 * 151_936 * 1536 / GIB
    for gb in (24, 40):
        flags = {"checkpointing": "none", "logits": "float32"}
        logits = draft("1.5B", gb=gb, **flags).training["LM head"] - weight_gradient
        assert 0.75 * gb / 16 < logits <= gb / 16


def test_few_responses_have_a_smaller_chunk_of_logits():
    few = {"tokens_per_microbatch": 1024, "max_new_tokens": 500, "logits": "float32"}
    whole = draft("1.5B", logits="float32").training["LM head"]
    assert draft("1.5B", **few).training["LM head"] < whole / 3


def test_a_sequence_longer_than_the_micro_batch_runs_alone():
    sizes = [draft(tokens_per_microbatch=n).training for n in (1, 1000, 4024, 5000)]
    assert sizes[0] == sizes[1] == sizes[2] != sizes[3]


def test_the_root_is_reduced_in_float32():
    """Where a micro-batch is small, the end of the backward pass is its highest moment."""
    small = {"tokens_per_microbatch": 1, "max_new_tokens": 16, "max_prompt_tokens": 16}
    root = 2 * 152_064 * 3584
    for world, size in ((64, 2 + 4), (1, 4 + 4)):
        (gradients,) = draft(world=world, **small).training.values()
        assert gradients * GIB == pytest.approx(4 * 7.615e9 / world + size * root)


@pytest.mark.parametrize(
    ("model", "world", "node", "changes", "tp"),
    [
        ("7B", 8, 8, {}, 4),
        ("7B", 2, 2, {}, 2),
        ("7B", 3, 3, {}, 1),
        ("7B", 12, 6, {}, 2),
        ("7B", 8, 8, {"tp": 1}, 1),
        ("7B", 8, 8, {"engine": "torch"}, 1),
        ("1.5B", 8, 8, {}, 1),
        ("1.5B", 8, 8, {"dtype": "float32"}, 2),
    ],
)
def test_processes_share_an_engine_where_each_reads_enough_weights(
    monkeypatch, model, world, node, changes, tp
):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    assert draft(model, world=world, **{"tp": 0} | changes).tp == tp
    assert draft(model, world=world, gb=None, **{"tp": 0} | changes).tp == changes.get("tp", 1)


def test_a_planned_run_knows_nothing_of_the_processes_that_plan_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert draft("7B", world=8, tp=0).tp == 4


def test_a_reference_model_is_kept_and_its_root_stays_gathered():
    kept = ledger(kl_coef=0.1).kept
    gathered = 2 * 2 * 152_064 * 3584 / GIB
    assert kept["reference"] == pytest.approx(kept["master weights"] + gathered)


def test_float32_takes_twice_the_bytes_of_bfloat16():
    half, single = draft(gb=640), draft(gb=640, dtype="float32")
    assert single.sampler["weights"] == 2 * half.sampler["weights"]
    assert single.kv_cache == 2 * half.kv_cache


def test_checkpointing_orders_the_activations():
    ledgers = [draft(checkpointing=c, gb=None) for c in ("full", "selective", "none")]
    sizes = [result.training["activations"] for result in ledgers]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] / 5


# ---- vLLM


def test_vllm_counts_every_token_that_it_has_sampled():
    assert ledger().sampler["token counts"] * GIB == 128 * 152_064 * 4


def test_sampling_needs_a_full_batch_of_prompts_or_room_for_the_largest_weight():
    """7B: the weights that arrive. 1.5B: the activations."""
    assert ledger().sampling == {"weight sync": pytest.approx(3 * 2 * 152_064 * 3584 / GIB)}
    (activations,) = ledger("1.5B", sampler_batch=512).sampling.values()
    step = 2 * MAX_BATCHED_TOKENS * (4 * 1536 + 3 * 8960) + 12 * 512 * 151_936
    assert activations * GIB == pytest.approx(step)


def test_the_cache_it_wants_holds_all_sequences():
    wanted = 128 * 4024 * 57344  # bytes a token: 2 x 28 layers x 4 heads x 128 x 2
    assert ledger(gb=640).kv_cache * GIB == pytest.approx(wanted)


@pytest.mark.parametrize(("tp", "share"), [(2, 2), (4, 4), (8, 4)])
def test_processes_that_share_a_sampler_share_its_cache_but_no_key_value_head(tp, share):
    """And they run as many times more sequences."""
    assert ledger(gb=640, tp=tp).kv_cache == tp * ledger(gb=640).kv_cache / share
    four, one = (draft(tp=n).sampler["token counts"] for n in (4, 1))
    assert four == 4 * one


def test_vllm_stays_where_there_is_room_and_sleeps_where_there_is_none():
    assert not ledger(gb=141).sleep
    assert ledger(world=2, gb=80).sleep
    assert not ledger("1.5B", gb=80).sleep
    assert ledger(gb=80, sleep="on").sleep


def test_vllm_stays_if_half_of_the_cache_that_it_wants_fits_beside_training():
    assert plan_sampling(CONFIG, wanted=10, free=30, beside=6) == (False, 6)
    assert plan_sampling(CONFIG, wanted=10, free=30, beside=4) == (True, 10)
    assert plan_sampling(CONFIG, wanted=10, free=8, beside=4) == (True, 8)


def test_the_torch_sampler_never_sleeps():
    config = replace(CONFIG, engine="torch", sleep="on")
    assert plan_sampling(config, wanted=10, free=30, beside=4) == (False, 4)


def test_the_cache_holds_one_sequence_at_least():
    assert plan_sampling(CONFIG, wanted=128.0, free=0.1, beside=0.0) == (True, 1.0)


# ---- what is decided


@pytest.mark.parametrize("gb", [40, 80, 141])
@pytest.mark.parametrize("model", MODELS)
def test_what_it_decides_fits(model, gb):
    result = ledger(model, gb=gb)
    kept, sampler = sum(result.kept.values()), sum(result.sampler.values())
    training, sampling = sum(result.training.values()), sum(result.sampling.values())
    beside = 0 if result.sleep else sampler
    assert result.peaks["training"] == kept + training + beside
    assert result.peaks["sampling"] == kept + sampler + sampling
    assert max(result.peaks.values()) <= 0.95001 * gb and result.fits


def test_a_cache_beside_training_leaves_room_for_sampling_too():
    """A small micro-batch needs less than a decode step of 2048 sequences."""
    small = {"tokens_per_microbatch": 1, "max_new_tokens": 16, "max_prompt_tokens": 16}
    result = ledger("1.5B", gb=13, world=64, sleep="off", sampler_batch=2048, **small)
    assert sum(result.training.values()) < sum(result.sampling.values())
    assert result.peaks["sampling"] == pytest.approx(result.usable)


NO_ROOM = [{"world": 1}, {"gb": 24}, {"checkpointing": "none"}, {"world": 2, "sleep": "off"}]


@pytest.mark.parametrize("changes", NO_ROOM, ids=str)
def test_what_cannot_fit_is_refused_with_the_way_out(changes):
    with pytest.raises(UserError, match=r"7.6 B parameters.*do not fit.*--rehearse \dxCARD"):
        ledger(**changes)


def test_a_cache_that_the_user_names_is_used_and_not_refused():
    assert ledger(kv_cache_gb=5.0).kv_cache == 5.0
    too_much = ledger(kv_cache_gb=70.0)
    assert not too_much.fits and "too much" in str(too_much)


def test_without_a_gpu_nothing_is_decided():
    result = ledger(gb=None)
    assert not result.sleep and result.kv_cache == 0.25 and "no GPU" in str(result)
    assert ledger(gb=None, kv_cache_gb=1.5).kv_cache == 1.5


def test_it_shows_every_phase_and_the_decision():
    shown = str(ledger())
    assert "master weights 3.55" in shown and "weight sync 3.05" in shown
    assert "vLLM has --tp 1 and stays while training" in shown and "of 76.0" in shown


def test_a_run_asks_for_its_own_model_and_device(random_model):
    lm = AutoModelForCausalLM.from_pretrained(random_model)
    result = ledger_of(CONFIG, lm, 100, 2, torch.device("cpu"))
    assert result == make_ledger(CONFIG, lm.config, lm.num_parameters(), 100, 2, None)
