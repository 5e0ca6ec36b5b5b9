"""The step simulator against closed forms and brute force, and the report that is made of it."""

import json
import math
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bench.experiments import budget, simulator
from bench.experiments.simulator import (
    GPUS,
    Decode,
    Machine,
    Rates,
    Setup,
    decode_cost,
    drain,
    plan,
    recipe,
    shape,
    simulate,
)
from bench.harness import ROOT
from drgrpo import pack
from drgrpo.config import RECIPES
from drgrpo.run.flops import training_flops
from drgrpo.types import UserError

M = Machine()
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)
COST = Decode(
    weights=1.0, per_sequence=0.1, per_kv_token=1e-3, overhead=0.2, overhead_per_sequence=0.01
)


# ---- rollout


def test_a_sequence_alone_reads_all_weights_for_every_token_and_its_cache():
    seconds, tail, left = drain([(100, 20)], 8, COST)
    assert seconds == pytest.approx(100 * (1.0 + 0.2 + 0.01) + 1e-3 * (100 * 20 + 100 * 99 / 2))
    assert tail == seconds and left == []
    cost = decode_cost(Setup(), M)
    assert cost.weights == pytest.approx(
        2 * (7_615_616_512 - 152064 * 3584) / (0.92 * 1700e9)
    )  # no input embedding
    assert shape("Qwen2.5-7B").kv_bytes == 57_344
    assert shape("Qwen2.5-1.5B").read == shape("Qwen2.5-1.5B").parameters  # tied: the head reads it


def test_two_lengths_drain_in_two_stretches():
    seconds = drain([(10, 5)] * 3 + [(25, 5)], 8, COST)[0]
    together = 10 * (1.0 + 0.2 + 4 * 0.01) + 1e-3 * (4 * 5 * 10 + 4 * 10 * 9 / 2)
    alone = 15 * (1.0 + 0.2 + 0.01) + 1e-3 * (15 * 15 + 15 * 14 / 2)
    assert seconds == pytest.approx(together + alone)


def token_by_token(queue, slots, cost):
    waiting, running, seconds = list(queue), [], 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(list(waiting.pop(0)))
        n, kv = len(running), sum(context for _, context in running)
        seconds += (
            max(cost.weights, cost.per_sequence * n)
            + cost.overhead
            + cost.overhead_per_sequence * n
            + cost.per_kv_token * kv
        ) / (cost.tail_gain if n < simulator.TAIL else 1)
        running = [[left - 1, context + 1] for left, context in running if left > 1]
    return seconds


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.floats(1, 2))
def test_draining_is_what_stepping_token_by_token_gives(lengths, slots, gain):
    cost, queue = replace(COST, tail_gain=gain), [(n, 7) for n in lengths]
    assert drain(queue, slots, cost)[0] == pytest.approx(token_by_token(queue, slots, cost))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 39), st.integers(1, 200), st.floats(0.1, 1))
def test_longer_is_never_faster_and_more_bandwidth_never_slower(lengths, i, more, share):
    queue = [(n, 7) for n in lengths]
    longer = [(n + more * (j == i % len(lengths)), 7) for j, n in enumerate(lengths)]
    before = drain(queue, 64, COST)[0]
    assert drain(longer, 64, COST)[0] > before
    quick = replace(COST, weights=share * COST.weights, per_kv_token=share * COST.per_kv_token)
    assert drain(queue, 64, quick)[0] <= before


def test_what_is_left_over_goes_on_where_it_stopped():
    queue = [(10, 5), (40, 5), (60, 5)]
    first, _, left = drain(queue, 8, COST, leave=2)
    assert left == [(30, 15), (50, 15)]
    assert first + drain(left, 8, COST)[0] == pytest.approx(drain(queue, 8, COST)[0])


def test_tp_has_to_divide_the_heads():
    assert decode_cost(Setup(tp=4), M).weights == pytest.approx(decode_cost(Setup(), M).weights / 4)
    with pytest.raises(
        UserError, match=r"--tp 8 does not divide the 28 attention heads of Qwen2\.5-7B"
    ):
        decode_cost(Setup(tp=8), M)


# ---- lengths


def test_lengths_have_the_mean_the_truncations_and_the_groups_that_were_asked_for():
    s = Setup(mean=800, sigma=0.6, cap_share=0.05, between=0.5)
    draw = lambda seed, s=s: simulator.draw(
        s, np.random.default_rng(seed), 4000, 8, s.cap_share, None
    )
    length_PG = draw(0)
    assert length_PG.mean() == pytest.approx(800, rel=0.03)
    assert (length_PG == 3000).mean() == pytest.approx(0.05, abs=0.01)
    logs = np.log(draw(0, replace(s, cap_share=0.0)))
    assert logs.std() == pytest.approx(0.6, rel=0.05)
    assert np.corrcoef(logs[:, 0], logs[:, 1])[0, 1] == pytest.approx(0.5, abs=0.05)
    assert (draw(0) == draw(0)).all() and (draw(0) != draw(1)).any()


def test_lengths_of_a_run(tmp_path):
    (tmp_path / "a.json").write_text("[5, 7]")
    (tmp_path / "b.jsonl").write_text('{"tokens": 5}\n{"tokens": 7}\n')
    (tmp_path / "step-000001.jsonl").write_text('{"token_ids": [1, 2, 3, 4, 5]}\n')
    (tmp_path / "step-000002.jsonl").write_text('{"token_ids": [1, 2, 3, 4, 5, 6, 7]}\n')
    for path in (tmp_path / "a.json", tmp_path / "b.jsonl", tmp_path):
        assert budget.read_lengths(path).tolist() == [5, 7]
    quick = simulate(Setup(), M, 2, file=np.array([50]))
    assert quick.seconds < simulate(Setup(), M, 2).seconds / 2
    for name, text, message in (
        ("c", '{"length": 5}', "neither"),
        ("d", "[]", "no response"),
        ("e", None, "does not exist"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            budget.read_lengths(tmp_path / name)


# ---- training


@pytest.mark.parametrize("name", ["Qwen2.5-1.5B", "Qwen3-0.6B"])
def test_flops_are_the_trainers_own_and_about_six_per_weight_and_token(name):
    lm = shape(name)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(lm.config)
    pairs = [(120, 700), (120, 3000), (120, 1)]
    assert lm.flops(120, [r for _, r in pairs]) == pytest.approx(
        training_flops(module, pairs), rel=1e-9
    )
    assert lm.flops(0, [1000]) == pytest.approx(6 * lm.read * 1000, rel=0.15)
    assert lm.flops(120, [700] * 8, shared=120) < lm.flops(120, [700] * 8)


def test_packed_plans_are_those_of_the_trainer():
    s = recipe("oat_zero_7b")
    length_PG = simulator.draw(s, np.random.default_rng(0), s.prompts, s.group, s.cap_share, None)
    kept_P = np.arange(s.prompts) % 2 == 0
    planned = plan(s, length_PG, kept_P, step=3)
    lengths = length_PG.ravel().tolist()
    for part, chosen in zip(planned, pack.minibatches(1024, 8, 0, 3), strict=True):
        tokens = {i: 120 + lengths[i] for i in chosen if kept_P[i // 8]}
        ranks = pack.microbatches(tokens, 8, 16384)
        assert [[sum(120 + n for n in rank) for rank in row] for row in part] == [
            [sum(tokens[i] for i in ranks[r][j]) for r in range(8)] for j in range(len(ranks[0]))
        ]
    everything = plan(replace(s, drop=False), length_PG, kept_P, step=3)
    assert sorted(n for part in everything for row in part for rank in row for n in rank) == sorted(
        lengths
    )


def test_without_packing_every_rank_has_its_own_samples_padded_to_the_longest():
    s = Setup(batching="padded", microbatch=2, prompts=16, group=2, gpus=4, minibatches=2)
    length_PG = np.arange(1, 33).reshape(16, 2)
    planned = plan(s, length_PG, np.zeros(16, bool) | True, step=0)
    assert [len(part) for part in planned] == [2, 2] and all(
        len(row) == 4 for part in planned for row in part
    )
    assert all(
        len(rank) == 2 and rank[0] == rank[1] for part in planned for row in part for rank in row
    )
    tokens = [n for part in planned for row in part for rank in row for n in rank]
    assert max(tokens) == 32 and sum(tokens) > sum(range(1, 33))
    single = plan(replace(s, microbatch=1), length_PG, np.ones(16, bool), step=0)
    assert sorted(n for part in single for row in part for rank in row for n in rank) == list(
        range(1, 33)
    )


def test_processes_wait_for_the_slowest_at_every_micro_batch():
    s = recipe("oat_zero_7b")
    alone = lambda n: simulator.pass_seconds(s, M, [n] if n else [], False)  # noqa: E731
    planned = [[[[3000], [100]], [[200], [2500]]]]
    assert simulator.train_seconds(s, M, planned, False) == pytest.approx(alone(3000) + alone(2500))


def test_checkpointing_costs_what_it_recomputes():
    none, selective, full = (
        simulator.pass_seconds(Setup(checkpointing=c), M, [900] * 16, True)
        for c in ("none", "selective", "full")
    )
    assert 1.0 < selective / none < 1.1 and 1.25 < full / none < 1.34


# ---- memory


def test_the_micro_batch_shrinks_until_it_fits():
    s = recipe("oat_zero_7b", gpu="A100-40")
    assert simulator.fitting(s, M).microbatch == s.microbatch
    assert simulator.fitting(replace(s, checkpointing="selective"), M).microbatch < s.microbatch
    assert simulator.ledger(s, M).sleep and not simulator.ledger(recipe("oat_zero_1_5b"), M).sleep
    with pytest.raises(UserError, match="do not fit a GPU"):
        simulator.fitting(replace(s, gpus=2), M)


# ---- whole steps


def test_the_setup_is_the_recipes():
    s, c = recipe("oat_zero_7b"), RECIPES["oat_zero_7b"]()
    assert (s.prompts, s.group, s.minibatches, s.cap) == (
        c.prompts_per_step,
        c.group_size,
        c.minibatches,
        c.max_new_tokens,
    )
    assert (s.steps, s.microbatch, s.slots) == (c.steps, c.tokens_per_microbatch, c.sampler_batch)
    assert s.checkpointing == c.checkpointing
    assert s.forwards == (c.old_logprob == "recompute") and s.drop == c.drops
    assert (
        s.tp == 1 and s.batching == "packed" and s.overlap_grading and s.carry == 0 and s.one_eval
    )


@pytest.fixture(scope="module")
def rungs():
    return budget.ladder(M, 2, 0)


def test_every_rung_of_the_ladder_is_at_least_as_fast_as_the_one_below(rungs):
    seconds = [r.seconds for _, r in rungs]
    assert all(a >= b for a, b in pairwise(seconds)), seconds
    assert seconds[0] > 2 * seconds[-1]
    assert [r.busiest < 1.05 for _, r in rungs] == [False] + [True] * (len(rungs) - 1)
    s = rungs[-1][1].setup
    assert s == replace(recipe("oat_zero_7b"), **budget.FLAGS, microbatch=s.microbatch)


def test_nothing_is_faster_than_the_roofline(rungs):
    ours = rungs[-1][1].setup
    bound = min(r.seconds for r in budget.floors(ours, 2, 0).values())
    candidates = [
        simulate(*budget.changed(ours, M, changes), 2, 0) for _, changes, _ in budget.NEXT
    ]
    stacks = [simulate(*budget.changed(ours, M, changes), 2, 0) for _, changes in budget.STACKS]
    assert bound < min(r.seconds for r in [*candidates, *stacks, *(r for _, r in rungs)])


def test_a_worse_rate_costs_time():
    s = recipe("oat_zero_7b")
    before = simulate(s, M, 2).seconds
    for rate, worse in {
        "decode_share": 0.5,
        "train_share": 0.5,
        "engine_ms": 9.0,
        "tensor_ms": 9.0,
        "half_tokens": 5000,
        "launch_ms": 30.0,
        "disk": 0.1,
        "sample_ms": 9.0,
        "nvlink_share": 0.01,
    }.items():
        assert simulate(*budget.changed(s, M, {rate: worse}), 2).seconds > before + 0.1, rate


def test_a_faster_gpu_saves_time():
    hours = [
        simulate(recipe("oat_zero_7b", gpu=gpu), M, 2).hours
        for gpu in ("A100-40", "A100-80", "H100", "H200")
    ]
    assert hours == sorted(hours, reverse=True) and len(set(hours)) == 4


def test_the_same_seed_gives_the_same_step():
    s = recipe("oat_zero_7b")
    assert simulate(s, M, 2, seed=5) == simulate(s, M, 2, seed=5) != simulate(s, M, 2, seed=6)


def test_what_a_step_leaves_unfinished_the_next_one_goes_on_with(monkeypatch):
    started = []
    monkeypatch.setattr(
        simulator, "drain", lambda queue, *rest: started.append(len(queue)) or drain(queue, *rest)
    )
    s = replace(recipe("oat_zero_7b"), eval_every=0)
    carried = simulate(replace(s, carry=0.2), M, 3)
    assert (
        started == [128] * 8 + [160] * 6 * 8
    )  # 32 of 160 are a fifth; 4 steps come before those that count
    assert carried.phases["rollout"] < simulate(s, M, 3).phases["rollout"]


def test_one_evaluation_call_has_one_tail():
    s = replace(recipe("oat_zero_7b"), steps=32, eval_every=16)
    five, one = (simulate(replace(s, one_eval=o), M, 2).phases["eval"] for o in (False, True))
    assert 3 < five / one < 5


def test_a_field_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="warp_speed"):
        budget.changed(Setup(), M, {"warp_speed": 9})


# ---- published, measured, reported


def test_the_realism_factor_and_what_it_predicts_for_the_row_left_out():
    assert budget.realism([1.0, 4.0])["factor"] == pytest.approx(2.0)
    rows, real = budget.validate(M, 2, 0)
    whole = [r for r in rows if r["whole"]]
    assert real["factor"] == pytest.approx(math.prod(r["ratio"] for r in whole) ** (1 / len(whole)))
    others = math.prod(r["ratio"] for r in whole[1:]) ** (1 / (len(whole) - 1))
    assert whole[0]["left_out"] == pytest.approx(
        whole[0]["predicted"] * others / whole[0]["published"]
    )
    assert all(r["low"] <= r["predicted"] <= r["high"] for r in rows) and all(
        r["source"] and r["guessed"] for r in rows
    )
    assert 0.5 < real["factor"] < 2.5


def test_every_constant_has_a_unit_and_a_source_and_the_grader_is_the_measured_one():
    for f in [*fields(Rates), *(f for f in fields(Setup) if f.metadata)]:
        assert f.metadata["unit"] and f.metadata["source"].startswith(
            ("assumed", "counted: ", "measured: ", "bench/")
        )
        assert f"| {f.name} | {f.default:g} |" in budget.constants(M)
    rows = {
        (r["load"], r["method"]): r
        for r in json.loads((ROOT / "bench/results/grade.json").read_text())["rows"]
    }
    for rate, method in (
        (Rates.serial_grades, "one at a time, workers"),
        (Rates.pooled_grades, "pool of 2"),
    ):
        assert rate == pytest.approx(
            rows["mixed", method]["n"] / rows["mixed", method]["seconds"], rel=0.01
        )


def test_measurements_replace_constants_and_the_rest_is_named(tmp_path):
    model = {"model": "Qwen2.5-1.5B"}
    row = model | {"checkpointing": "full", "microbatch": 8192, "length": 1024, "mfu": 0.31}
    rollout = model | {"sequences": 64, "prompt": 120, "length": 500, "tokens_per_s": 6000.0}
    parts = {
        "ceilings": {"copy_gb_per_s": 2500.0, "gemm_tflops": 650, "l2_mb": 50},
        "step": [row, {"mfu": 0.2}],
        "rollout": [rollout],
        "sync": [model | {"seconds": 0.5}],
        "kernel": {"ratio": 1.07},
    }
    (tmp_path / "gpu.json").write_text(
        json.dumps({"device": "NVIDIA H100 80GB HBM3", "parts": parts})
    )
    m, notes = budget.measured(tmp_path)
    assert (m.gpus["H100"].copy, m.gpus["H100"].gemm) == (2500, 650)
    assert m.gpus["A100-80"] == GPUS["A100-80"] and GPUS["H100"].copy == 2900
    assert (
        budget.constants(m).count("measured: gpu.json") == 4
        and budget.constants(M).count("measured: gpu.json") == 0
    )
    assert budget.step_ratio(m, "H100", row) == pytest.approx(1, abs=0.02)
    assert budget.rollout_ratio(m, "H100", rollout) == pytest.approx(1, abs=0.02)
    assert budget.sync_ratio(m, "H100", parts["sync"][0]) == pytest.approx(1, abs=0.02)
    assert m.rates != Rates() and simulate(recipe("oat_zero_7b"), m, 2) != simulate(
        recipe("oat_zero_7b"), M, 2
    )
    unused = [note.removeprefix("measured, not used: ") for note in notes if "not used" in note]
    assert unused == ["ceilings.l2_mb", "kernel.ratio", "step.1.mfu"]
    (tmp_path / "gpu.json").write_text(
        json.dumps({"device": "NVIDIA H100", "parts": {"step": [row | {"mfu": 0.9}]}})
    )
    m, notes = budget.measured(tmp_path)  # faster than its memory traffic allows
    assert (
        m.rates == Rates()
        and "measured, not used: step: no train_share gives what was measured" in notes[0]
    )


def test_a_missing_or_unknown_measurement_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(
        UserError,
        match=r"holds no gpu\.json; run `make gpu` on a GPU first, or leave the option out",
    ):
        budget.measured(tmp_path)
    (tmp_path / "gpu.json").write_text('{"device": "TPU v9", "parts": {}}')
    with pytest.raises(UserError, match="'TPU v9', of which GPUS"):
        budget.measured(tmp_path)
    assert [
        budget.device_key(n)
        for n in ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA H20")
    ] == ["A100-40", "A100-80", "H200", "H20"]


def test_the_command_writes_tables_a_figure_and_the_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(budget, "RESULTS", tmp_path)  # a checkout may hold measurements
    budget.main(["--draws", "2", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    result = json.loads(text.splitlines()[-1])
    assert result == json.loads((tmp_path / "budget.json").read_text())
    assert {
        "where",
        "notes",
        "seed",
        "rates",
        "validation",
        "realism",
        "anchor",
        "ladder",
        "next",
        "stacks",
        "sensitivities",
        "machines",
    } <= set(result)
    assert "no GPU measurement: all hardware constants are from data sheets and assumptions" in text
    assert all(set(row["phases"]) == set(simulator.PHASES) for row in result["ladder"])
    saved = [row["seconds"] for row in result["next"]]
    assert saved == sorted(saved) and len(saved) == len(budget.NEXT)
    assert (tmp_path / "budget.png").stat().st_size > 10_000
    budget.main(["--constants"])
    assert "decode_share" in capsys.readouterr().out
