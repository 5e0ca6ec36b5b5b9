"""The benchmark of a step measures what it says: variants that agree, phases that add up, and every
absence with its reason."""

import json
import time
from functools import partial
from itertools import count, product

import numpy as np
import pytest
import torch

from bench import bench_step as bench
from bench.shapes import SHAPES
from drgrpo import pack
from drgrpo.config import RECIPES
from drgrpo.model import Objective, load_policy
from drgrpo.run.memory import GIB, USABLE
from drgrpo.types import UserError

CPU, FREE = torch.device("cpu"), 78 * GIB
LENGTHS = {7: 30, 3: 20, 5: 25, 1: 5, 4: 10, 9: 20, 2: 15}
"""Response -> tokens, in the order of arrival."""
REHEARSE = ["--rehearse", "--responses", "16", "--repeats", "1"]


def main(tmp_path, capsys, *flags) -> tuple[dict, str]:
    """(JSON, what was printed) of a rehearsal."""
    bench.main([*REHEARSE, "--out", str(tmp_path), *flags])
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "step_rehearsal.json").read_text())
    assert json.loads(shown.splitlines()[-1]) == report
    return report, shown


def made_up_trainer(**changes) -> bench.Trainer:
    """A toy, in float32."""
    sizes = {"prompts_per_step": 4, "minibatches": 2, "max_new_tokens": 40}
    how = {"dtype": "float32", "old_logprob": "sampler", "checkpointing": "none"}
    settings = {"tokens_per_microbatch": 256} | sizes | how | changes
    config = bench.replace(RECIPES["oat_zero_7b"](), **settings)
    length_B = bench.lengths_like_a_run(32, 40, np.random.default_rng(0))
    build = partial(bench.build_policy, "toy", 2, torch.float32, CPU)
    return bench.Trainer(config, CPU, build, partial(bench.made_up, config, CPU, length_B, 5))


def measured(trainer, variants, repeats=1, budget=None) -> list[dict]:
    published = []
    bench.measure(trainer, variants, repeats, budget or bench.Budget(60), published.append)
    return published[-1]


@pytest.mark.slow
def test_a_rehearsal_measures_every_variant_by_phase(tmp_path, capsys):
    report, shown = main(tmp_path, capsys)
    assert {"device", "torch", "commit", "date"} <= set(report["where"])
    (toy, long) = report["cases"].values()
    names = {row["variant"] for row in toy["rows"]}
    for level, tokens in product(("none", "selective", "full"), (128, 256)):
        assert f"checkpointing {level}, {tokens} tokens" in names
    assert {"everything on", "padded rows", "checkpointing none"} <= names
    assert len(toy["rows"]) == 15 and len(long["rows"]) == 1 and long["response_tokens"] == 2 * 511
    for row in toy["rows"]:
        seconds = row["seconds"]
        assert seconds["low"] <= seconds["median"] <= seconds["high"]
        assert set(row["phases"]) == set(bench.PHASES)
        assert row["peak_bytes"] > 0 and row["mfu"] is None
        assert sum(row["phases"].values()) == pytest.approx(seconds["median"])  # of one turn
        assert f"| {row['variant']} | {seconds['median']:.3f} (" in shown
    recomputed = next(row for row in toy["rows"] if row["variant"] == "old log-probs recomputed")
    assert recomputed["phases"]["old log-probs"] > 0.1 * recomputed["phases"]["forward"]
    assert (tmp_path / "step_rehearsal.png").read_bytes().startswith(b"\x89PNG")
    assert 1 < report["imbalance"]["balanced"] < 1.1 < report["imbalance"]["equal counts"]


def test_what_time_does_not_reach_is_listed(tmp_path, capsys):
    start = time.perf_counter()
    report, shown = main(tmp_path, capsys, "--seconds", "0")
    assert time.perf_counter() - start < 10
    rows = [row for case in report["cases"].values() for row in case["rows"]]
    assert len(rows) == 16 and {row["skipped"] for row in rows} == {"not reached"}
    assert shown.count("| not reached |") == 16


def test_nothing_starts_that_would_end_too_late(group_of_one, monkeypatch):
    """A clock that every variant moves by 10 seconds, of 35: three fit."""
    trainer, now = made_up_trainer(), [0.0]

    def visit(trainer, changes, row, reference):
        now[0] += 10
        row["skipped"] = "x"

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench, "visit", visit)
    rows = measured(trainer, {name: {} for name in "abcde"}, budget=bench.Budget(35))
    assert [row["skipped"] for row in rows] == ["x", "x", "x", "not reached", "not reached"]


def test_a_variant_that_disagrees_is_not_timed(group_of_one, monkeypatch):
    right = bench.whole_logits

    def wrong(*args, **how):
        return right(*args, **how | {"scale": 1.01 * how["scale"]})

    monkeypatch.setattr(bench, "whole_logits", wrong)
    variants = bench.features(made_up_trainer().config, sweep=False)
    with pytest.raises(SystemExit, match="not timing a wrong variant: 'LM head not fused"):
        measured(made_up_trainer(), variants)


def test_out_of_memory_is_a_row_and_the_rest_goes_on(group_of_one):
    def head(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = made_up_trainer()
    first = trainer.policy
    padded = {"rows": bench.padded_rows}
    variants = {"everything on": {}, "big": {"head": head}, "padded rows": padded}
    rows = measured(trainer, variants, repeats=2)
    assert rows[1] == {"variant": "big", "skipped": "out of memory"}
    assert [r.get("turns") for r in rows] == [2, None, 2]
    assert trainer.policy is not first  # FSDP2 does not survive it
    assert "| big | out of memory |" in bench.variants_table(rows, "variant", bench.PHASES)
    with pytest.raises(UserError, match="fewer --layers"):
        measured(trainer, {"everything on": {"head": head}})


def test_another_error_ends_the_benchmark(group_of_one):
    variants = {"everything on": {}, "broken": {"head": lambda *args, **how: 1 / 0}}
    with pytest.raises(ZeroDivisionError):
        measured(made_up_trainer(), variants)


def test_phases_add_up_to_the_wall_clock(group_of_one, monkeypatch):
    """On a clock that ticks once a look, so that no other job decides: nothing between the first
    mark and the last is lost."""
    trainer, ticks = made_up_trainer(old_logprob="recompute"), count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    start = bench.time.perf_counter()
    _, phases = trainer.step({})
    assert sum(phases.values()) == bench.time.perf_counter() - start - 2
    assert all(phases[phase] > 0 for phase in bench.PHASES)


def test_padded_rows_give_the_gradients_of_packed_ones(random_model):
    policy = load_policy(random_model, Objective(), dtype=torch.float32, device=CPU)
    grads, calls = [], []
    batch = pack.pack([pack.Sequence([1, 2], [3] * n, [-5.0] * n, 0.5 - n % 2) for n in (1, 9, 4)])
    batch.old_logprob_N = batch.sampler_logprob_N

    def note(module, args, output):
        calls.append(module.config._attn_implementation)

    policy.lm.base_model.register_forward_hook(note)
    for how in (bench.ExitStack, partial(bench.padded_model, policy.lm)):
        with how():
            policy.loss(batch, scale=0.1)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        policy.zero_grad()
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-5)
    assert calls == ["drgrpo_sdpa", "sdpa"]
    assert policy.lm.config._attn_implementation == "drgrpo_sdpa"


def test_padded_rows_stay_within_the_budget_padding_included():
    assert bench.padded_rows(LENGTHS, 1, 60) == [[[7, 3], [5, 1], [4, 9, 2]]]
    assert bench.padded_rows({}, 1, 60) == [[[]]]
    assert bench.padded_rows({0: 99, 1: 99}, 1, 60) == [[[0], [1]]]


def test_equal_counts_are_equal_and_within_the_budget():
    assert bench.equal_counts(LENGTHS, 2, 60) == [[[7, 3], [5, 1]], [[4, 9], [2]]]
    assert bench.equal_counts({}, 2, 60) == [[[]], [[]]]
    assert bench.equal_counts({0: 99, 1: 99}, 1, 60) == [[[0], [1]]]


def test_layers_that_fit_are_counted_before_anything_is_allocated():
    config = RECIPES["oat_zero_7b"]()
    layers = bench.layers_that_fit("Qwen2.5-7B", config, FREE)
    assert 8 <= layers < 28 and bench.layers_that_fit("Qwen2.5-1.5B", config, FREE) == 28
    needed = [bench.needed_bytes("Qwen2.5-7B", n, config) for n in (1, 2, layers, layers + 1)]
    assert needed[2] <= USABLE * FREE < needed[3]
    # 7B: a block's master weights, gradients and Adam states, and its input
    block = 16 * 233.06e6 + 2 * 16384 * 3584
    assert needed[3] - needed[2] == pytest.approx(block, rel=0.01)
    with pytest.raises(UserError, match="choose a smaller --shape"):
        bench.layers_that_fit("Qwen2.5-7B", config, 10 * GIB)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("0.6b", 596_049_920), ("1.5b", 1_543_714_304), ("3b", 3_212_749_824), ("7b", 7_615_616_512)],
)
def test_shapes_have_their_models_parameters(shape, parameters):
    with torch.device("meta"):
        lm = bench.AutoModelForCausalLM.from_config(bench.lm_config(SHAPES[shape], 28))
    assert lm.num_parameters() == parameters


def test_made_up_rollouts_look_like_a_run(group_of_one):
    length_B = bench.lengths_like_a_run(128, 3000, np.random.default_rng(0))
    assert 750 < length_B.mean() < 830 and length_B.min() > 50
    assert (length_B == 3000).mean() == pytest.approx(0.03, abs=0.015)
    reward_PG = bench.made_up_rewards(16, 8, np.random.default_rng(0))
    flat = reward_PG.std(1) == 0
    assert flat.float().mean() == pytest.approx(0.45, abs=0.05) and 0 < reward_PG[flat].mean() < 1


def test_a_made_up_sampler_reports_the_policys_log_probs(group_of_one):
    trainer = made_up_trainer()
    plan = bench.train.plan_updates(trainer.config, trainer.rollouts, trainer.advantage_PG, 1, CPU)
    for batch in (batch for batches in plan for batch in batches):
        logprob_N = trainer.policy.logprob(batch)
        torch.testing.assert_close(logprob_N, batch.sampler_logprob_N, atol=1e-5, rtol=0)


def test_whole_steps_say_so_without_vllm(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    skipped = bench.whole_steps(["--engine", "vllm"])
    assert skipped == {"skipped": "vLLM is not installed"}


REFUSED = {
    "are for --device cuda": ["--shape", "7b"],
    "choose a multiple": ["--responses", "20"],
    "1.5b has 28": ["--device", "cuda", "--layers", "29"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_measured_is_refused_with_a_way_out(message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        bench.parse(REFUSED[message])
    assert message in capsys.readouterr().err
