"""What the GPU path gives to vLLM, before the installed vLLM's own checks for a GPU.

They run in a child process that takes itself for a machine with an H100: see vllm_card.py."""

import importlib.util
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context

import pytest
import torch
from transformers import Qwen2Config

import vllm_card
from bench.experiments.drafts import Match, Text
from drgrpo.engine_vllm import (
    DRAFT_BATCH,
    DRAFT_MATCH,
    DRAFT_TOKENS,
    draft_arguments,
    llm_arguments,
)
from drgrpo.types import MAX_BATCHED_TOKENS, Request, Sampling

missing = importlib.util.find_spec("vllm") is None
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(missing, reason="vLLM is not installed: make env-test"),
]


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> str:
    """Folder of the 7B recipe's model without its weights: vLLM's config reads none."""
    path = tmp_path_factory.mktemp("models") / "qwen2.5-math-7b"
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@contextmanager
def child(batch_invariant: bool, interpreted: bool = False):
    """A function that calls another in a process that takes itself for a GPU's, or for one whose
    kernels Triton's interpreter runs."""
    pretend = partial(vllm_card.pretend, torch.bfloat16, batch_invariant)
    with ProcessPoolExecutor(1, get_context("spawn"), pretend) as pool:
        with pytest.MonkeyPatch.context() as patch:
            # Triton reads it when it is imported.
            patch.setenv("TRITON_INTERPRET", str(int(interpreted)))
            pool.submit(int).result()
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def card():
    with child(batch_invariant=False) as call:
        yield call


@pytest.fixture(scope="module")
def batch_invariant_card():
    with child(batch_invariant=True) as call:
        yield call


@pytest.fixture(scope="module")
def interpreting_card():
    with child(batch_invariant=False, interpreted=True) as call:
        yield call


def arguments(model: str, **changes) -> dict:
    """Those of the 7B run on one node."""
    settings = {
        "dtype": torch.bfloat16,
        "world": 8,
        "batch": 256,
        "max_tokens": 4024,
        "kv_cache_gb": 30.0,
        "tp": 1,
        "sleep": False,
        "load_weights": False,
    }
    return llm_arguments(model, on_gpu=True, **settings | changes)


VARIANTS = {
    "sleep": (False, True),
    "tp": (1, 2),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "kv_cache_gb": (0.0, 30.0),
    "load_weights": (False, True),
    "world": (1, 8),
}
COMBINATIONS = [
    dict(zip(VARIANTS, values, strict=True))
    for values in product(*VARIANTS.values())
    if values[1] <= values[-1]  # tp divides the processes
]


def check_every_argument(card, model: str) -> None:
    """vLLM's config holds what it was given, in every combination that the trainer uses."""
    for changes in COMBINATIONS:
        given = arguments(model, **changes)
        config = card(vllm_card.read, given)
        by_other_names = {"hf_overrides", "distributed_executor_backend"}
        assert {name: config[name] for name in given.keys() - by_other_names} == {
            name: value for name, value in given.items() if name not in by_other_names
        }
        one = "UniProcExecutor" if changes["world"] == 1 else "ExecutorWithExternalLauncher"
        expected = {
            "head_dtype": "float32",
            "executor": one,
            "loader": "DefaultModelLoader" if changes["load_weights"] else "DummyModelLoader",
            "worker": "vllm.v1.worker.gpu_worker.Worker",
            "v2_runner": True,
            "async_scheduling": True,
            "prefix_caching": True,
            "max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "enforce_eager": False,
        }
        assert expected.items() <= config.items()


def test_vllm_takes_every_argument_of_the_gpu_path(card, model):
    check_every_argument(card, model)


def test_vllm_takes_every_argument_in_its_batch_invariant_mode(batch_invariant_card, model):
    check_every_argument(batch_invariant_card, model)
    assert batch_invariant_card(vllm_card.batch_invariance) is True


def test_without_the_flag_vllm_is_not_batch_invariant(card):
    with pytest.raises(ValueError, match="does not have this mode"):
        card(vllm_card.batch_invariance)


def test_vllm_refuses_an_argument_that_has_another_name(card, model):
    """Each of ours in turn: what vLLM renames, this test finds."""
    given = arguments(model)
    for name in given:
        refusal = card(vllm_card.refusal, vllm_card.rename(given, name))
        assert refusal.startswith("TypeError: ") and name in refusal


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int4"),
        ("max_model_len", 10**6),
        ("max_num_seqs", 2 * MAX_BATCHED_TOKENS),
        ("max_num_batched_tokens", 255),
        ("logprobs_mode", "processed"),
        ("tensor_parallel_size", 3),
        ("distributed_executor_backend", "torchrun"),
        ("gpu_memory_utilization", 0.0),
        ("kv_cache_memory_bytes", "30 GiB"),
        ("enable_sleep_mode", "often"),
    ],
)
def test_vllm_refuses_a_wrong_value(card, model, name, value):
    """So its checks for a GPU do run here."""
    assert card(vllm_card.refusal, arguments(model)) == ""
    assert card(vllm_card.refusal, arguments(model) | {name: value})


def test_vllm_checks_the_options_of_the_command_line(card, model):
    for name, value in {"enforce_eager": True, "kv_cache_dtype": "fp8"}.items():
        assert card(vllm_card.refusal, arguments(model) | {name: value}) == ""
    assert card(vllm_card.refusal, arguments(model) | {"kv_cache_dtype": "fp7"})
    assert "kv_cache" in card(vllm_card.refusal, arguments(model) | {"kv_cache": "fp8"})


# ---- drafts


def test_drafts_keep_vllms_fast_paths_and_come_for_small_batches_only(card, model):
    assert card(vllm_card.read, arguments(model))["drafts"] == []
    for changes in ({}, {"world": 1}, {"tp": 2}):
        config = card(vllm_card.read, arguments(model, **changes) | draft_arguments("ngram"))
        assert config["v2_runner"] and config["async_scheduling"]
        small, large = config["drafts"][1 : DRAFT_BATCH + 1], config["drafts"][DRAFT_BATCH + 1 :]
        assert set(small) == {DRAFT_TOKENS} and set(large) == {0}
        assert len(small) == DRAFT_BATCH and len(large) == 256 - DRAFT_BATCH


def test_vllm_refuses_drafts_under_another_name(card, model):
    given = arguments(model) | draft_arguments("ngram")
    drafts = given["speculative_config"]
    assert "num_speculative_tokens" in drafts
    for name in drafts:
        changed = {"speculative_config": vllm_card.rename(drafts, name)}
        assert name in card(vllm_card.refusal, given | changed)


def test_a_gpus_draft_is_what_followed_the_longest_match(interpreting_card):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, (20, 60), generator=generator).tolist()
    drafts = interpreting_card(vllm_card.drafted, rows, DRAFT_TOKENS, *DRAFT_MATCH)
    found = [Text(row, Match(*DRAFT_MATCH, DRAFT_TOKENS)).draft([]) for row in rows]
    filled = [guess + [row[-1]] * DRAFT_TOKENS for guess, row in zip(found, rows, strict=True)]
    assert drafts == [guess[:DRAFT_TOKENS] for guess in filled]
    assert sum(map(bool, found)) > 10


def test_a_gpus_verification_keeps_the_distribution_and_its_log_probs(interpreting_card):
    """By less than six standard deviations, for every token at every place. The first draft is
    likely, and the second unlikely. A seed gives the same tokens twice."""
    count = 300
    logits_KV = torch.tensor([[2.0, 0.5, 0.0, -1.0], [0.0, 1.0, 0.5, 0.2], [1.0, 0.0, -1.0, 0.5]])
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(0))
    samples = interpreting_card(vllm_card.verified, logits_KV, [0, 3], seeds)
    logprob_KV = logits_KV.log_softmax(-1)
    seen_KV, chances_K = torch.zeros_like(logits_KV), torch.zeros(len(logits_KV))
    for tokens, logprobs in samples:
        for k, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            assert logprob == pytest.approx(logprob_KV[k, token].item(), abs=1e-5)
            seen_KV[k, token] += 1
            chances_K[k] += 1
    prob_KV, chances_K1 = logprob_KV.exp(), chances_K[:, None]
    sigma_KV = (chances_K1 * prob_KV * (1 - prob_KV)).sqrt()
    assert ((seen_KV - chances_K1 * prob_KV).abs() < 6 * sigma_KV).all()
    assert chances_K.min() > 10
    assert samples[:5] == interpreting_card(vllm_card.verified, logits_KV, [0, 3], seeds[:5])


@pytest.mark.parametrize("stop", [(), ("</answer>",)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vllm_takes_every_argument_of_a_request(card, stop, temperature):
    sampling = Sampling(
        max_new_tokens=3000, stop_token_ids=(151643, 151645), temperature=temperature, stop=stop
    )
    refusals = card(vllm_card.request_refusals, Request([1, 2, 3], seed=2**63 - 1), sampling)
    assert {"seed", "logprobs", "flat_logprobs", "output_kind"} <= refusals.keys()
    assert all(f"{name}_" in refusal for name, refusal in refusals.items())


# ---- vLLM's start beside the trainer: what its own functions say


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        pytest.param({}, 10.64 + 0.5, id="7B on 8 GPUs, resumed"),
        pytest.param({"world": 4, "sleep": True}, 7.09 + 0.5, id="7B on 4 GPUs"),
        pytest.param({"world": 1}, 5.75 + 0.6, id="1.5B on a GPU"),
    ],
)
def test_vllm_starts_beside_what_the_trainer_holds(card, model, changes, used):
    """GiB of weights, of Adam and of the CUDA context before vLLM starts."""
    given = arguments(model, **changes)
    assert card(vllm_card.start_with, given, used) == ""
    del given["gpu_memory_utilization"]
    assert "less than desired GPU memory utilization" in card(vllm_card.start_with, given, used)


def test_a_process_alone_needs_no_variables_of_torchrun(card, model):
    method, *ranks = card(vllm_card.placement, arguments(model, world=1), {})
    assert ranks == [0, 0] and method.startswith("file://")  # unused: the process group exists
    with pytest.raises(KeyError, match="RANK"):
        card(vllm_card.placement, arguments(model, world=8), {})


def test_processes_of_torchrun_take_a_gpu_each(card, model):
    variables = {"RANK": "11", "LOCAL_RANK": "3"}
    assert card(vllm_card.placement, arguments(model, world=16), variables) == ("env://", 11, 3)


def test_a_process_cannot_have_a_second_engine(card):
    """Not even beside one that sleeps, or that has crashed: a crash of the sampler ends the
    run."""
    awake, asleep, none = card(vllm_card.second_engine)
    assert awake == asleep == "CuMem allocator can only be used for one instance per process."
    assert none == ""


def test_attention_in_float32_does_not_round_to_tf32(card):
    """In vLLM's own kernel. Triton's default does."""
    assert card(vllm_card.attention_backend, torch.float32) == "TritonAttentionBackend"
    assert card(vllm_card.attention_backend, torch.bfloat16) == "FlashAttentionBackend"
    scores, values = card(vllm_card.dot_products, torch.float32)
    assert "tf32" not in scores + values
    for dtype in (None, torch.bfloat16):
        assert all("tf32" in product for product in card(vllm_card.dot_products, dtype))


def test_random_numbers_are_functions_of_seed_and_position(interpreting_card):
    """So a response that was left open goes on with its request's seed."""
    call = interpreting_card
    whole = call(vllm_card.draws, 7, list(range(40, 60)))
    assert whole[5:] == call(vllm_card.draws, 7, list(range(45, 60)))
    assert len(set(whole)) > 10
    assert call(vllm_card.draws, 8, list(range(40, 60))) != whole
    # The position is that in prompt and response together.
    source = call(vllm_card.source_of_sampler)
    assert "pos = input_batch.positions[input_batch.logits_indices]" in source
