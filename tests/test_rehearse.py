"""A rehearsal counts what the trainer allocates, the ledger's formulas agree with it, and the way
out that it prints fits."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM

from bench.static_report import cost
from conftest import ROOT
from drgrpo.config import RECIPES, parse_args
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss
from drgrpo.run import rehearse as module
from drgrpo.run.cards import CARDS, Machine, parse_machine
from drgrpo.run.memory import GIB, kept_gib, training_gib
from drgrpo.run.rehearse import (
    fullest_batch,
    head_of_a_gpu,
    ledger_on,
    lm_config,
    rehearse,
    rehearse_training,
    ways_out,
)
from drgrpo.types import UserError

MEANT_FOR = {name: 8 for name in RECIPES if name.startswith("oat_zero")}
"""Processes of the machine that a recipe is meant for. A new recipe is rehearsed on one GPU."""

SMALL = ["--tokens-per-microbatch", "512", "--max-new-tokens", "64", "--max-prompt-tokens", "64"]


def recipe(name: str = "oat_zero_7b", **changes):
    return replace(RECIPES[name](), **changes)


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe nope --rehearse 8xA100-80GB", "unknown recipe 'nope'"),
        ("--recipe tiny --rehearse 8xA100-90GB", "did you mean 'A100-80GB'"),
        ("--recipe tiny --rehearse A100-80GB", "as in 8xA100-80GB"),
        ("--recipe tiny --rehearse 0xA100-80GB", "as in 8xA100-80GB"),
        ("--recipe tiny --rehearse 6xA100-80GB --tp 4", "--tp 4 does not divide the 6 processes"),
    ],
)
def test_a_mistake_is_answered_before_torch_is_imported(arguments, message):
    code = (
        "import json, sys\n"
        "from drgrpo.config import parse_args\n"
        "try: parse_args(sys.argv[1:])\n"
        "except ValueError as error: print(json.dumps([str(error), 'torch' in sys.modules]))"
    )
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    shown, has_torch = json.loads(done.stdout)
    assert message in shown and not has_torch


def test_every_card_has_a_name_with_its_size_and_less_memory_than_that():
    for name, gib in CARDS.items():
        (gigabytes,) = re.findall(r"-(\d+)GB$", name)
        assert 0.9 * int(gigabytes) < gib < int(gigabytes)
        assert parse_machine(f"4x{name}") == Machine(4, name)
    assert Machine(1, "A100-80GB").gpu_bytes == int(79.1 * GIB)


def test_the_command_ends_with_the_verdict_and_flags_apply(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--recipe", "tiny", "--rehearse", "1xRTX4090-24GB", *SMALL])
    shown = capsys.readouterr()
    assert end.value.code == 0 and not shown.err
    assert "4 sequences, 508 tokens, 256 of them responses" in shown.out
    assert shown.out.splitlines()[-1].startswith("tiny on 1xRTX4090-24GB: fits, training ")


# ---- the models


def test_the_recipes_models_need_no_hub_and_have_their_published_sizes():
    published = {
        "oat_zero_1_5b": 1_543_714_304,
        "oat_zero_3b": 3_212_749_824,
        "oat_zero_7b": 7_615_616_512,
    }
    for name, parameters in published.items():
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(lm_config(recipe(name).model))
        assert lm.num_parameters() == parameters


def test_a_folder_is_a_model_too(random_model):
    assert lm_config(random_model).hidden_size == lm_config("tiny").hidden_size == 64


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(UserError, match="--model no/such cannot be loaded"):
        lm_config("no/such")


def test_a_budget_beyond_the_models_positions_is_refused():
    config = recipe(max_new_tokens=4096)
    with pytest.raises(UserError, match=r"--max-new-tokens 4096 leaves no room.*4096 positions"):
        rehearse(config, Machine(8, "A100-80GB"))


# ---- the micro-batch


@pytest.mark.parametrize(
    ("budget", "lengths"), [(100, [24, 24, 24, 24]), (60, [24, 24, 9]), (7, [24]), (26, [24])]
)
def test_the_fullest_micro_batch_is_the_longest_sequences_and_a_rest(budget, lengths):
    config = recipe(tokens_per_microbatch=budget, max_new_tokens=15)
    batch = fullest_batch(config, prompt=10)  # the last token of a sequence is never an input
    assert batch.cu_seqlens.diff().tolist() == lengths
    assert len(batch.target_N) == sum(min(n, 15) for n in lengths)


def test_log_probs_are_compared_as_the_config_says():
    assert fullest_batch(recipe(), 10).old_logprob_N is not None
    none = fullest_batch(recipe(old_logprob="none", minibatches=1), 10)
    assert none.old_logprob_N is None and none.ref_logprob_N is None
    assert fullest_batch(recipe(kl_coef=0.1), 10).ref_logprob_N is not None


# ---- the head


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_heads_memory_is_that_of_the_kernels_cost_model(dtype, size):
    """On a GPU: one chunk of logits, dW in float32, dX, and nothing of the CPU's copies."""
    T, D, V = 16_384, 1536, 151_936
    with FakeTensorMode(), MemTracker() as tracker, head_of_a_gpu() as logits:
        hidden, weight = (torch.empty(n, D, dtype=torch.bfloat16) for n in (T, V))
        inputs = sum(x.requires_grad_().nbytes for x in (hidden, weight))
        per_token = torch.empty(T, dtype=torch.long), torch.empty(T)
        linear_drgrpo_loss(hidden, weight, *per_token, logits_dtype=dtype)[0].backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - inputs
    assert logits == [size * 8192 * V] * 2
    assert peak == pytest.approx(cost(T, D, V, 8192, size)["peak_memory"], rel=0.01)


# ---- the ledger and the rehearsal


def agrees(config, processes: int, **sizes) -> None:
    lm = lm_config(config.model)
    lm.update(sizes)
    rehearsal = rehearse_training(config, lm, processes)
    shards = processes // config.dp_replicate
    formula = training_gib(config, lm, rehearsal.parameters, shards)
    weights = kept_gib(config, lm, rehearsal.parameters, shards)["master weights"]
    assert rehearsal.masters == pytest.approx(weights, rel=0.001)
    assert sum(formula.values()) == pytest.approx(sum(rehearsal.peak.values()), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"oat_zero_7b_fast"}))  # 7b, selective
def test_the_ledger_agrees_with_the_rehearsal_of_every_recipe(name, checkpointing):
    agrees(recipe(name, checkpointing=checkpointing), MEANT_FOR.get(name, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, {}),
        (64, {"tokens_per_microbatch": 4096}),
        (16, {"dp_replicate": 2}),
        (8, {"tokens_per_microbatch": 65_536}),
        (8, {"logits": "float32"}),
        (8, {"max_new_tokens": 128, "max_prompt_tokens": 128, "tokens_per_microbatch": 256}),
        (1, {"lora_rank": 32, "tokens_per_microbatch": 4096}),
        (2, {"lora_rank": 8, "lora_targets": "q_proj,v_proj"}),
    ],
    ids=str,
)
def test_the_ledger_agrees_whatever_the_machine_and_the_micro_batch(processes, changes):
    """A model of few layers, whose vocabulary weighs more."""
    agrees(recipe("oat_zero_1_5b", **changes), processes, num_hidden_layers=4)


@pytest.mark.slow
def test_the_7b_run_fits_its_machine_as_counted_by_hand():
    config, lm = recipe(), lm_config("Qwen/Qwen2.5-Math-7B")
    rehearsal = rehearse_training(config, lm, 8)
    root, block = 2 * 152_064 * 3584, (7_615_616_512 - 2 * 152_064 * 3584) / 28
    assert rehearsal.at_head["logits"] * GIB == 2 * 6400 * 152_064
    # FSDP2 gathers the root and the next block beside the one in use.
    gathered = rehearsal.peak["gathered weights"] * GIB
    assert gathered == pytest.approx(2 * (root + 2 * block), rel=0.01)
    # Gradients of the micro-batches before are there, and a block is reduced in float32.
    gradients = rehearsal.peak["gradients"] * GIB
    assert gradients == pytest.approx(4 * 7_615_616_512 / 8 + 4 * block, rel=0.01)
    assert 15 < sum(rehearsal.peak.values()) < 17 and rehearsal.tokens == 16_379


def test_the_sampler_gets_every_weight_under_its_hugging_face_name(random_model):
    """The model ties its embeddings."""
    config = recipe("tiny", dtype="bfloat16", checkpointing="full")
    lm = lm_config(random_model)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(lm).state_dict()
    weights = rehearse_training(config, lm, processes=4).weights
    assert weights == {n: (w.shape, torch.bfloat16) for n, w in expected.items()}
    assert "lm_head.weight" in weights


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tiny_recipe_is_rehearsed_with_and_without_fsdp(dtype, processes):
    agrees(recipe("tiny", dtype=dtype), processes)


def test_no_process_group_is_left_behind(monkeypatch):
    monkeypatch.setattr(module, "build_policy", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rehearse_training(recipe("tiny"), lm_config("tiny"), 2)
    assert not torch.distributed.is_initialized()


# ---- the way out


@pytest.mark.parametrize(
    ("machine", "changes", "flags"),
    [
        (Machine(8, "A100-80GB"), {"checkpointing": "none"}, " --checkpointing full"),
        (Machine(2, "A100-80GB"), {"sleep": "off"}, " --sleep auto"),
        (Machine(8, "A100-80GB"), {"kv_cache_gb": 70.0}, " --kv-cache-gb 0.0"),
        (Machine(4, "A100-40GB"), {}, ""),  # twice as many
    ],
    ids=str,
)
def test_ways_out_fit_and_the_cheapest_comes_first(machine, changes, flags):
    config, lm, parameters = recipe(**changes), lm_config("Qwen/Qwen2.5-Math-7B"), 7_615_616_512
    assert not ledger_on(config, lm, parameters, machine).fits
    first, changed, other = next(ways_out(config, lm, parameters, machine))
    assert first == flags and (flags or other.count == 8)
    assert ledger_on(changed, lm, parameters, other).fits


@pytest.mark.slow
def test_a_run_that_does_not_fit_ends_with_the_flags_that_were_rehearsed(capsys):
    arguments = ["--recipe", "oat_zero_1_5b", "--checkpointing", "none"]
    with pytest.raises(SystemExit) as end:
        parse_args([*arguments, "--rehearse", "8xA100-40GB"])
    *_, verdict, way_out = capsys.readouterr().out.splitlines()
    assert end.value.code == 2
    assert verdict.startswith("oat_zero_1_5b on 8xA100-40GB: does not fit, training ")
    assert way_out.startswith("oat_zero_1_5b on 8xA100-40GB --checkpointing full: fits, ")


def test_a_way_out_that_its_rehearsal_refutes_is_not_printed(monkeypatch, capsys):
    def too_much(config, lm, machine):
        rehearsal = rehearse_training(recipe("tiny"), lm_config("tiny"), 1)
        peak = {"activations": 1000.0}
        return rehearsal, ledger_on(config, lm, rehearsal.parameters, machine, peak)

    monkeypatch.setattr(module, "rehearsed_ledger", too_much)
    assert rehearse(recipe("tiny"), Machine(1, "A100-80GB")) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("no flags make it fit")


# ---- the page


def test_the_page_has_a_row_for_every_recipe():
    page = (ROOT / "docs" / "memory.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) >= RECIPES.keys() - {"tiny"}
