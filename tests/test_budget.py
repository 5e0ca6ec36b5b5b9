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
    Decode,
    Queued,
    Setup,
    decode_cost,
    drain,
    plan,
    recipe,
    shape,
)
from bench.harness import ROOT
from drgrpo import pack
from drgrpo.config import RECIPES
from drgrpo.run.flops import training_flops
from drgrpo.types import UserError

pytestmark = pytest.mark.slow

M = simulator.Machine()
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)
COST = Decode(1.0, per_sequence=0.1, per_kv_token=1e-3, overhead=0.2, overhead_per_sequence=0.01)


def simulate(s: Setup, draws: int = 2, m: simulator.Machine = M, **how) -> simulator.Result:
    return simulator.simulate(s, m, draws, **how)


# ---- rollout


def test_a_sequence_alone_reads_all_weights_for_every_token_and_its_cache():
    seconds, tail, unfinished = drain([Queued(100, 20)], 8, COST)
    assert seconds == pytest.approx(100 * (1.0 + 0.2 + 0.01) + 1e-3 * (100 * 20 + 100 * 99 / 2))
    assert tail == seconds and unfinished == []
    without_input_embedding = 7_615_616_512 - 152064 * 3584
    weights = 2 * without_input_embedding / (0.92 * 1700e9)
    assert decode_cost(Setup(), M).weights == pytest.approx(weights)
    assert shape("Qwen2.5-7B").kv_bytes == 57_344
    assert shape("Qwen2.5-1.5B").read == shape("Qwen2.5-1.5B").parameters  # tied: the head reads it


def test_two_lengths_drain_in_two_stretches():
    seconds = drain([Queued(10, 5)] * 3 + [Queued(25, 5)], 8, COST)[0]
    together = 10 * (1.0 + 0.2 + 4 * 0.01) + 1e-3 * (4 * 5 * 10 + 4 * 10 * 9 / 2)
    alone = 15 * (1.0 + 0.2 + 0.01) + 1e-3 * (15 * 15 + 15 * 14 / 2)
    assert seconds == pytest.approx(together + alone)


def token_by_token(queue, slots, cost):
    waiting, running, seconds = list(queue), [], 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0)[:2])
        n, kv = len(running), sum(context for _, context in running)
        step = max(cost.weights, cost.per_sequence * n) + cost.per_kv_token * kv
        step += cost.overhead + cost.overhead_per_sequence * n
        seconds += step / (cost.tail_gain if n < simulator.TAIL else 1)
        running = [[tokens - 1, context + 1] for tokens, context in running if tokens > 1]
    return seconds


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.floats(1, 2))
def test_draining_is_what_stepping_token_by_token_gives(lengths, slots, gain):
    cost, queue = replace(COST, tail_gain=gain), [Queued(n, 7) for n in lengths]
    assert drain(queue, slots, cost)[0] == pytest.approx(token_by_token(queue, slots, cost))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 39), st.integers(1, 200), st.floats(0.1, 1))
def test_longer_is_never_faster_and_more_bandwidth_never_slower(lengths, i, more, share):
    queue = [Queued(n, 7) for n in lengths]
    longer = [Queued(n + more * (j == i % len(lengths)), 7) for j, n in enumerate(lengths)]
    before = drain(queue, 64, COST)[0]
    assert drain(longer, 64, COST)[0] > before
    quick = replace(COST, weights=share * COST.weights, per_kv_token=share * COST.per_kv_token)
    assert drain(queue, 64, quick)[0] <= before


def test_what_is_left_over_goes_on_where_it_stopped():
    queue = [Queued(10, 5), Queued(40, 5), Queued(60, 5)]
    first, _, unfinished = drain(queue, 8, COST, unfinished=2)
    assert unfinished == [Queued(30, 15, 1), Queued(50, 15, 1)]
    assert first + drain(unfinished, 8, COST)[0] == pytest.approx(drain(queue, 8, COST)[0])


def test_a_sequence_that_was_left_often_enough_is_waited_for():
    queue = [Queued(10, 5), Queued(40, 5, 2), Queued(60, 5, 1)]
    assert drain(queue, 8, COST, unfinished=2, most=3)[2] == [Queued(30, 15, 3), Queued(50, 15, 2)]
    seconds, _, unfinished = drain(queue, 8, COST, unfinished=2, most=2)
    assert unfinished == [Queued(20, 45, 2)]
    assert seconds == drain(queue, 8, COST, unfinished=1)[0]


def test_what_is_carried_is_read_again(monkeypatch):
    s = recipe("oat_zero_7b", carry=0.3)
    length_PG = np.full((s.prompts, s.group), 100)
    nothing, old = [[]] * s.samplers, [[Queued(1, 1000)] * 10] * s.samplers
    monkeypatch.setattr(simulator, "drain", lambda *args: (0.0, 0.0, []))
    before, after = (simulator.sample(s, M, length_PG, left)[0] for left in (nothing, old))
    prompts = s.prompt * s.prompts / s.samplers
    assert after / before == pytest.approx((prompts + 10 * 1000) / prompts)


def test_tp_has_to_divide_the_heads():
    assert decode_cost(Setup(tp=4), M).weights == pytest.approx(decode_cost(Setup(), M).weights / 4)
    message = r"--tp 8 does not divide the 28 attention heads of Qwen2\.5-7B"
    with pytest.raises(UserError, match=message):
        decode_cost(Setup(tp=8), M)


# ---- lengths


def test_lengths_have_the_mean_the_truncations_and_the_groups_that_were_asked_for():
    s = Setup(mean=800, sigma=0.6, cap_share=0.05, between=0.5)

    def draw(seed: int, s: Setup = s) -> np.ndarray:
        return simulator.draw(s, np.random.default_rng(seed), (4000, 8), s.cap_share, None)

    length_PG = draw(0)
    assert length_PG.mean() == pytest.approx(800, rel=0.03)
    assert (length_PG == 3000).mean() == pytest.approx(0.05, abs=0.01)
    logs = np.log(draw(0, replace(s, cap_share=0.0)))
    assert logs.std() == pytest.approx(0.6, rel=0.05)
    assert np.corrcoef(logs[:, 0], logs[:, 1])[0, 1] == pytest.approx(0.5, abs=0.05)
    assert (draw(0) == draw(0)).all() and (draw(0) != draw(1)).any()


def test_lengths_of_a_run(tmp_path):
    (tmp_path / "responses.jsonl").write_text('{"tokens": 5}\n{"tokens": 7}\n')
    assert budget.read_lengths(tmp_path / "responses.jsonl").tolist() == [5, 7]
    quick = simulate(Setup(), file=np.array([50]))
    assert quick.seconds < simulate(Setup()).seconds / 2


@pytest.mark.parametrize("text", ['{"length": 5}', ""])
def test_a_file_without_lengths_is_refused(tmp_path, text):
    path = tmp_path / "lengths"
    with pytest.raises(UserError, match="does not exist"):
        budget.read_lengths(path)
    path.write_text(text)
    with pytest.raises(UserError, match="needs `tokens`"):
        budget.read_lengths(path)


# ---- training


@pytest.mark.parametrize("name", ["Qwen2.5-1.5B", "Qwen3-0.6B"])
def test_flops_are_the_trainers_own_and_about_six_per_weight_and_token(name):
    lm = shape(name)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(lm.config)
    exact = training_flops(module, [(120, 700), (120, 3000), (120, 1)])
    assert lm.flops(120, [700, 3000, 1]) == pytest.approx(exact, rel=1e-9)
    assert lm.flops(0, [1000]) == pytest.approx(6 * lm.read * 1000, rel=0.15)
    assert lm.flops(120, [700] * 8, shared=120) < lm.flops(120, [700] * 8)


def lengths_of(planned: simulator.Plan) -> list[int]:
    return sorted(n for part in planned for row in part for rank in row for n in rank)


def test_packed_plans_are_those_of_the_trainer():
    s = recipe("oat_zero_7b")
    size = s.prompts, s.group
    length_PG = simulator.draw(s, np.random.default_rng(0), size, s.cap_share, None)
    kept_P = np.arange(s.prompts) % 2 == 0
    planned = plan(s, length_PG, kept_P, step=3)
    lengths = length_PG.ravel().tolist()
    for part, chosen in zip(planned, pack.minibatches(1024, 8, 0, 3), strict=True):
        tokens = {i: 120 + lengths[i] for i in chosen if kept_P[i // 8]}
        ranks = pack.microbatches(tokens, 8, 16384)
        for j, row in enumerate(part):
            for rank, dealt in zip(row, ranks, strict=True):
                assert [120 + n for n in rank] == [tokens[i] for i in dealt[j]]
        assert len(part) == len(ranks[0])
    everything = plan(replace(s, drop=False), length_PG, kept_P, step=3)
    assert lengths_of(everything) == sorted(lengths)


def test_without_packing_every_rank_has_its_own_samples_padded_to_the_longest():
    s = Setup(batching="padded", microbatch=2, prompts=16, group=2, gpus=4, minibatches=2)
    length_PG, kept_P = np.arange(1, 33).reshape(16, 2), np.ones(16, bool)
    planned = plan(s, length_PG, kept_P, step=0)
    assert np.shape(planned) == (2, 2, 4, 2)
    assert all(rank[0] == rank[1] for part in planned for row in part for rank in row)
    tokens = lengths_of(planned)
    assert max(tokens) == 32 and sum(tokens) > sum(range(1, 33))
    single = plan(replace(s, microbatch=1), length_PG, kept_P, step=0)
    assert lengths_of(single) == list(range(1, 33))


def test_processes_wait_for_the_slowest_at_every_micro_batch():
    s = recipe("oat_zero_7b")
    slowest = [simulator.pass_seconds(s, M, [n], False) for n in (3000, 2500)]
    planned = [[[[3000], [100]], [[200], [2500]]]]
    assert simulator.train_seconds(s, M, planned, False) == pytest.approx(sum(slowest))


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
    assert (s.prompts, s.group, s.minibatches) == (c.prompts_per_step, c.group_size, c.minibatches)
    assert (s.steps, s.cap, s.slots) == (c.steps, c.max_new_tokens, 4 * c.sampler_batch)
    assert (s.microbatch, s.checkpointing) == (c.tokens_per_microbatch, c.checkpointing)
    assert c.old_logprob == "recompute" and s.forwards == 7 / 8
    assert s.drop == c.drops_zero_advantage
    assert s.tp == 4 and s.batching == "packed" and s.carry == 0
    assert s.overlap_grading and s.one_eval


RUN = budget.Simulation(M, draws=2)


@pytest.fixture(scope="module")
def rungs():
    return list(budget.ladder(RUN).values())


def test_every_rung_of_the_ladder_is_at_least_as_fast_as_the_one_below(rungs):
    seconds = [r.seconds for r in rungs]
    assert all(a >= b for a, b in pairwise(seconds)), seconds
    assert seconds[0] > 2 * seconds[-1]
    assert [r.busiest < 1.05 for r in rungs] == [False] + [True] * (len(rungs) - 1)
    s = rungs[-1].setup
    assert s == replace(recipe("oat_zero_7b"), **budget.FAST, microbatch=s.microbatch)


def test_nothing_is_faster_than_the_roofline(rungs):
    ours = rungs[-1].setup
    bound = min(r.seconds for r in budget.floors(ours, RUN).values())
    features = [RUN(ours, row[1]) for row in (*budget.NEXT, *budget.STACKS)]
    assert bound < min(r.seconds for r in [*rungs, *features])


WORSE = {"decode_share": 0.5, "train_share": 0.5, "engine_ms": 9.0, "tensor_ms": 9.0}
WORSE |= {"half_tokens": 5000, "launch_ms": 30.0, "disk": 0.1, "sample_ms": 9.0}


def test_a_worse_rate_costs_time():
    s = recipe("oat_zero_7b")
    before = simulate(s).seconds
    for rate, worse in (WORSE | {"nvlink_share": 0.01}).items():
        assert RUN(s, {rate: worse}).seconds > before + 0.1, rate


def test_a_faster_gpu_saves_time():
    gpus = ("A100-40", "A100-80", "H100", "H200")
    hours = [simulate(recipe("oat_zero_7b", gpu=gpu)).hours for gpu in gpus]
    assert hours == sorted(hours, reverse=True) and len(set(hours)) == 4


def test_the_same_seed_gives_the_same_step():
    s = recipe("oat_zero_7b")
    assert simulate(s, seed=5) == simulate(s, seed=5) != simulate(s, seed=6)


def test_what_a_step_leaves_unfinished_the_next_one_continues(monkeypatch):
    started = []
    monkeypatch.setattr(
        simulator, "drain", lambda queue, *rest: started.append(len(queue)) or drain(queue, *rest)
    )
    s = replace(recipe("oat_zero_7b"), eval_every=0, tp=1)
    carried = simulate(replace(s, carry=0.2, carry_steps=100), 3)
    # 32 of 160 are a fifth; 4 steps come before those that count
    assert started == [128] * 8 + [160] * 6 * 8
    assert carried.phases["rollout"] < simulate(s, 3).phases["rollout"]
    started.clear()
    simulate(replace(s, carry=0.2, carry_steps=1), 3)
    assert max(started) == 160 and min(started[8:]) < 160, "who waits longer leaves fewer"


def test_one_evaluation_call_has_one_tail():
    s = replace(recipe("oat_zero_7b"), steps=32, eval_every=16, tp=1)
    five, one = (simulate(replace(s, one_eval=o)).phases["eval"] for o in (False, True))
    assert 3 < five / one < 5


def test_a_field_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="warp_speed"):
        budget.changed(Setup(), M, {"warp_speed": 9})


# ---- published, measured, reported


def test_the_realism_factor_and_what_it_predicts_for_the_row_left_out():
    assert budget.realism([1.0, 4.0])["factor"] == pytest.approx(2.0)
    rows, real = budget.validate(RUN)
    first, *others = [r for r in rows if r["whole"]]
    factor = math.prod(r["ratio"] for r in others) ** (1 / len(others))
    assert first["left_out"] == pytest.approx(first["predicted"] * factor / first["published"])
    whole = math.prod(r["ratio"] for r in (first, *others)) ** (1 / (1 + len(others)))
    assert real["factor"] == pytest.approx(whole) and 0.5 < whole < 2.5
    for r in rows:
        assert r["low"] <= r["predicted"] <= r["high"] and r["source"] and r["guessed"]


def test_every_constant_has_a_unit_and_a_source_and_the_grader_is_the_measured_one():
    kinds = ("assumed", "counted: ", "measured: ", "bench/")
    for f in [*fields(simulator.Rates), *(f for f in fields(Setup) if f.metadata)]:
        assert f.metadata["unit"] and f.metadata["source"].startswith(kinds)
        assert f"| {f.name} | {f.default:g} |" in budget.constants(M)
    rows = json.loads((ROOT / "bench/results/grade.json").read_text())["rows"]
    speed = {r["method"]: r["n"] / r["seconds"] for r in rows if r["load"] == "mixed"}
    assert M.rates.serial_grades == pytest.approx(speed["one at a time, workers"], rel=0.01)
    assert M.rates.pooled_grades == pytest.approx(speed["pool of 2"], rel=0.01)


MODEL = {"model": "Qwen2.5-1.5B"}
STEP = MODEL | {"checkpointing": "full", "microbatch": 8192, "length": 1024, "mfu": 0.31}
ROLLOUT = MODEL | {"sequences": 64, "prompt": 120, "length": 500, "tokens_per_s": 6000.0}


def write_gpu(folder, device: str, parts: dict) -> None:
    (folder / "gpu.json").write_text(json.dumps({"device": device, "parts": parts}))


def test_measurements_replace_constants(tmp_path):
    ceilings = {"copy_gb_per_s": 2500.0, "gemm_tflops": 650}
    sync = MODEL | {"seconds": 0.5}
    parts = {"ceilings": ceilings, "step": [STEP], "rollout": [ROLLOUT], "sync": [sync]}
    write_gpu(tmp_path, "NVIDIA H100 80GB HBM3", parts)
    m, notes = budget.measured(tmp_path)
    assert (m.gpus["H100"].copy, m.gpus["H100"].gemm) == (2500, 650)
    assert m.gpus["A100-80"] == M.gpus["A100-80"] and M.gpus["H100"].copy == 2900
    shown = [budget.constants(machine).count("measured: gpu.json") for machine in (m, M)]
    assert shown == [4, 0]
    assert budget.step_ratio(m, "H100", STEP) == pytest.approx(1, abs=0.02)
    assert budget.rollout_ratio(m, "H100", ROLLOUT) == pytest.approx(1, abs=0.02)
    assert budget.sync_ratio(m, "H100", sync) == pytest.approx(1, abs=0.02)
    s = recipe("oat_zero_7b")
    assert m.rates != M.rates and simulate(s, m=m) != simulate(s)
    assert len(notes) == 5 and all(note.startswith("measured: ") for note in notes)


def test_a_measurement_faster_than_memory_allows_is_not_used(tmp_path):
    write_gpu(tmp_path, "NVIDIA H100", {"step": [STEP | {"mfu": 0.9}]})
    m, notes = budget.measured(tmp_path)
    assert m.rates == M.rates
    assert "measured, not used: step: no train_share gives what was measured" in notes[0]


def test_a_missing_or_unknown_measurement_is_an_error_that_says_what_to_do(tmp_path):
    message = r"holds no gpu\.json; run `make gpu` on a GPU first, or leave the option out"
    with pytest.raises(UserError, match=message):
        budget.measured(tmp_path)
    write_gpu(tmp_path, "TPU v9", {})
    with pytest.raises(UserError, match="'TPU v9', of which GPUS"):
        budget.measured(tmp_path)
    names = ("A100-SXM4-40GB", "A100-SXM4-80GB", "H200", "H20")
    keys = [budget.device_key(f"NVIDIA {name}") for name in names]
    assert keys == ["A100-40", "A100-80", "H200", "H20"]


def test_the_command_writes_tables_a_figure_and_the_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(budget, "RESULTS", tmp_path)  # a checkout may hold measurements
    budget.main(["--draws", "2", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    result = json.loads(text.splitlines()[-1])
    assert result == json.loads((tmp_path / "budget.json").read_text())
    assert {"where", "notes", "seed", "rates", "anchor"} <= set(result)
    assert budget.UNMEASURED in text
    for part in ("validation", "ladder", "next", "stacks", "sensitivities", "machines"):
        for row in result[part]:
            assert f"\n| {row['name']} | " in text
    assert all(set(row["phases"]) == set(simulator.PHASES) for row in result["ladder"])
    saved = [row["seconds"] for row in result["next"]]
    assert saved == sorted(saved) and len(saved) == len(budget.NEXT)
    assert (tmp_path / "budget.png").stat().st_size > 10_000
    budget.main(["--constants"])
    assert "decode_share" in capsys.readouterr().out
