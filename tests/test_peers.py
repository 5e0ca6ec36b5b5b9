"""The comparison with TRL and Liger compares like with like, and its tables say what was measured.

pytest tests/test_bench_peers.py        what needs TRL or Liger is skipped without them: pip install --group peers
"""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.experiments import peer_losses as losses
from bench.experiments import peers as bench
from drgrpo import data
from drgrpo.advantage import token_weight
from drgrpo.config import RECIPES
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss_ref

ROOT = Path(__file__).parents[1]
CASES = losses.make_cases()


def make_run(folder: Path, trainer: str, model: str = "", **changes) -> bench.Run:
    settings = {
        "trainer": trainer,
        "model": model,
        "folder": str(folder),
        "seed": 0,
        "steps": 2,
        "minibatches": 4,
        "threads": 1,
        "options": {"per_device_train_batch_size": 64},
    }
    return bench.Run(**settings | changes)


# ---- what a user meets


@pytest.mark.parametrize(
    ("parts", "missing"),
    [(["loss"], "trl, accelerate, liger-kernel"), (["speed"], "trl, accelerate")],
)
def test_a_missing_package_is_one_line_with_the_way_out(monkeypatch, capsys, parts, missing):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        bench.main(["--parts", *parts])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert (
        line.startswith(f"error: bench.experiments.peers compares with {missing}, not installed")
        and "--group peers" in line
    )


def test_the_group_of_that_name_pins_every_peer_exactly():
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["peers"]
    assert {re.fullmatch(r"([\w-]+)==[\d.]+", pin)[1] for pin in group} == set(bench.PEERS.values())


# ---- times


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now.time)
    monkeypatch.setattr(bench.time, "process_time", lambda: now.time / 4)
    return now


def test_phases_and_the_rest_add_up_to_the_step(clock):
    meter = bench.Meter()
    meter.start()
    for seconds in (3.0, 2.0):
        with meter.phase("rollout"):
            clock.time += seconds
    meter.positions["rollout"] += 7
    clock.time += 4.0
    meter.step()
    clock.time += 5.0
    meter.step()
    first, second = meter.rows
    assert (
        first["seconds"] == {"rollout": 5.0, "rest": 4.0}
        and first["total"] == 9.0
        and first["positions"] == {"rollout": 7}
    )
    assert first["cpu"] == 9 / 4 and second["cpu"] == 5 / 4
    assert (
        second["seconds"] == {"rest": 5.0} and second["total"] == 5.0 and second["positions"] == {}
    )


def result(totals: list[float], rewards: list[float]) -> dict:
    rows = [
        {
            "total": t,
            "cpu": t / 10,
            "reward": r,
            "tokens": 100,
            "seconds": {"rollout": t / 2, "rest": t / 2},
            "positions": {"rollout": 300, "train": 200},
        }
        for t, r in zip(totals, rewards, strict=True)
    ]
    return {
        "rows": rows,
        "peak_gb": 1.0,
        "before_gb": 0.5,
        "accuracy": {"greedy": 0.9, "sampled": 0.8},
    }


def test_a_summary_is_the_median_turn_of_mean_steps_without_the_first_and_the_last():
    turns = [
        result([99, 1, 3, 50], [0, 0.5, 1, 0.5]),
        result([99, 4, 4, 50], [0] * 4),
        result([99, 8, 8, 50], [0] * 4),
    ]
    found = bench.summary(turns)
    assert found["steps"] == [2, 4, 8] and found["cpu_steps"] == pytest.approx([0.2, 0.4, 0.8])
    assert found["seconds"]["rollout"] == 2 and found["seconds"]["old"] == 0
    assert found["tokens_per_s"] == 25 and found["late_reward"] == [0.5, 0, 0]
    assert found["curves"][0]["seconds"] == [99, 100, 103, 153]


def test_the_table_says_by_what_factor_ours_is_better():
    trl, ours = (bench.summary([result([9, t, t, 9], [0.5] * 4)]) for t in (6.0, 1.5))
    rows = {
        line.split("|")[1].strip(): line
        for line in bench.speed_table("4", {"TRL": trl, "ours": ours}).splitlines()
    }
    assert "4 optimizer steps a rollout" in rows
    assert rows["**s/step**, median (range)"].endswith(
        "| 6.00 (6.00–6.00) | 1.50 (1.50–1.50) | **4.0** |"
    )
    assert rows["CPU-s/step"].endswith("| 0.60 (0.60–0.60) | 0.15 (0.15–0.15) | 4.0 |")
    assert rows["rollout, s"].endswith("| 3.000 | 0.750 | 4.0 |")
    assert rows["sync, s"].endswith("| 0.000 | 0.000 | – |")
    assert rows["sampled tokens/s"].endswith("| 17 | 67 | 4.0 |")
    assert rows["µs a position, rollout"].endswith("| 10000.0 | 2500.0 | 4.0 |")


def test_the_figure_is_drawn(tmp_path):
    sides = {
        name: bench.summary([result([9, 2, 2, 9], [0.2, 0.4, 0.6, 0.6])] * 2)
        for name in bench.TRAINERS
    }
    bench.draw({"4": sides, "1": sides}, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_trl_runs_with_the_fastest_of_its_options():
    assert (
        bench.fastest({"static cache": [1.0, 3.0], "micro-batches of 256": [1.5, 1.6]})
        == "micro-batches of 256"
    )
    assert bench.fastest({}) == next(iter(bench.TRL_OPTIONS))


def test_smoothing_uses_the_past_only():
    assert bench.smooth([0.0, 1.0, 2.0, 9.0], width=2) == [0.0, 0.5, 1.5, 5.5]


# ---- the same work for both


@pytest.mark.parametrize("minibatches", [1, 4])
@pytest.mark.parametrize("micro", [32, 64, 256])
def test_trl_makes_as_many_optimizer_steps_of_as_many_responses(minibatches, micro, tmp_path):
    config = bench.config_of(make_run(tmp_path, "TRL", minibatches=minibatches, steps=3))
    found = bench.trl_arguments(config, {"per_device_train_batch_size": micro})
    size, accumulated = found["per_device_train_batch_size"], found["gradient_accumulation_steps"]
    assert size * accumulated == config.minibatch_size == 256 // minibatches
    assert size * found["steps_per_generation"] == 256 and found["max_steps"] == 3 * minibatches


def test_trl_gets_the_prompts_of_our_steps_in_their_order(tmp_path):
    config = bench.config_of(make_run(tmp_path, "TRL", seed=1, steps=15))  # more than one epoch
    found, problems = bench.prompts_in_order(config), data.load_problems("arithmetic")
    assert len(found) == 15 * 32
    for step in (1, 14):
        ours = data.step_problems(problems, step, 32, seed=1)
        assert found["prompt"][32 * (step - 1) : 32 * step] == [p.question + "~" for p in ours]
        assert found["answer"][32 * (step - 1) : 32 * step] == [p.answer for p in ours]


def check_run(run: bench.Run) -> list[dict]:
    """What a child process does, in this one: rows whose phases add up, a mean of 256 grades, a
    model that can be evaluated."""
    Path(run.folder).mkdir()
    bench.child(run)
    bench.distributed.stop()
    found = json.loads((Path(run.folder) / "result.json").read_text())
    assert len(found["rows"]) == run.steps and 0 < found["before_gb"] <= found["peak_gb"]
    for row in found["rows"]:
        assert sum(row["seconds"].values()) == pytest.approx(row["total"])
        assert min(row["seconds"].values()) >= 0 and row["seconds"]["rest"] < 0.2 * row["total"]
        assert min(row["cpu"], row["seconds"]["rollout"], row["seconds"]["train"]) > 0
        assert 0 < row["reward"] < 1 and row["reward"] * 256 == int(row["reward"] * 256)
        assert row["tokens"] <= row["positions"]["rollout"]
    bench.distributed.start()
    assert set(bench.held_out(found["hf"], RECIPES["tiny"]())) == {"greedy", "sampled"}
    return found["rows"]


def test_a_run_of_ours_reports_its_phases_and_positions(tmp_path, warm_model):
    rows = check_run(make_run(tmp_path / "ours", "ours", model=warm_model))
    saved = (json.loads(line) for line in (tmp_path / "ours" / "run" / "metrics.jsonl").open())
    for row, line in zip(rows, saved, strict=True):
        assert (
            row["reward"] == line["reward_mean"]
            and row["seconds"]["rollout"] == line["seconds"]["rollout"]
        )
        assert row["positions"]["train"] >= line["tokens_trained"] and "old" not in row["positions"]


def test_a_run_of_trl_reports_its_phases_and_positions(tmp_path, warm_model):
    pytest.importorskip("trl", reason="TRL is not installed: pip install --group peers")
    rows = check_run(make_run(tmp_path / "trl", "TRL", model=warm_model))
    for (
        row
    ) in rows:  # it trains on every response, padded, and computes the old log-probs of all of them
        assert row["positions"]["train"] == row["positions"]["old"] >= row["tokens"] + 256 * 9


def test_a_failed_run_shows_what_it_said(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"(?s)^nobody failed with status 1:.*KeyError: 'nobody'"
    ):
        bench.launch(make_run(tmp_path / "run", "nobody"))


# ---- losses


# the kernel divides the KL term by B C: it is the formula's for dr_grpo only
@pytest.mark.parametrize(
    ("name", "loss_type"),
    [(n, t) for n in CASES for t in losses.LOSSES if "KL" not in n or t == "dr_grpo"],
)
def test_the_formula_is_the_kernels_reference(name, loss_type):
    """Two ways to write it down: response by response, and token by token with weighted
    advantages."""
    case = CASES[name]

    def reference(case, loss_type, hidden, weight):
        mask, scale = case.mask_BL, 1 / (len(case.mask_BL) * case.budget)
        weights = token_weight(mask.sum(1), losses.LOSSES[loss_type], case.budget).double()
        advantage = (case.advantage_B.double() * weights)[:, None].expand_as(mask)[mask]
        old, ref = (None if x is None else x[mask].double() for x in (case.old_BL, case.ref_BL))
        return linear_drgrpo_loss_ref(
            hidden[mask],
            weight,
            case.target_BL[mask],
            advantage,
            old_logprob=old,
            ref_logprob=ref,
            scale=scale,
            kl_coef=case.kl_coef,
            temperature=case.temperature,
        )[0]

    exact, found = (
        losses.differentiate(f, case, loss_type, torch.float64) for f in (losses.formula, reference)
    )
    assert max(losses.relative_errors(found, exact).values()) < 1e-6  # token_weight is float32
    ours = losses.differentiate(losses.our_loss, case, loss_type)
    assert max(losses.relative_errors(ours, exact).values()) < losses.TOLERANCE


@pytest.mark.parametrize("change", [{"temperature": 1.01}, {"budget": 33}, {"old_BL": None}])
def test_a_loss_of_other_inputs_is_beyond_the_tolerance(change):
    case = CASES["off-policy"]
    exact = losses.differentiate(losses.formula, case, "dr_grpo", torch.float64)
    found = losses.differentiate(losses.our_loss, replace(case, **change), "dr_grpo")
    assert max(losses.relative_errors(found, exact).values()) > losses.TOLERANCE


def test_the_cases_have_what_they_are_for():
    """Uneven lengths, advantages of both signs, ratios on both sides of both clips."""
    case = CASES["off-policy"]
    length = case.mask_BL.sum(1)
    assert length.min() == 1 and length.max() == case.mask_BL.shape[1] and len(length.unique()) > 4
    logprob = losses.logprobs(case.hidden_BLD, case.weight_VD, case.target_BL, case.temperature)
    ratio = (logprob - case.old_BL).exp()
    for sign in (case.advantage_B > 0, case.advantage_B < 0):
        chosen = ratio[sign[:, None] & case.mask_BL]
        assert all(
            share.any() for share in (chosen < 0.8, (chosen > 0.8) & (chosen < 1.2), chosen > 1.2)
        )


def test_the_table_marks_errors_beyond_float32():
    rows = [
        {
            "case": "c",
            "loss_type": "grpo",
            "errors": {
                "ours": {"loss": 1e-8, "dhidden": 2e-7, "dweight": 3e-7},
                "TRL": {"loss": 1e-8, "dhidden": 2e-4, "dweight": 3e-7},
            },
        }
    ]
    assert (
        losses.loss_table(rows).splitlines()[-1]
        == "| c | grpo | 1e-08 / 2e-07 / 3e-07 | **1e-08 / 2e-04 / 3e-07** |"
    )


@pytest.mark.parametrize("name", CASES)
def test_trl_and_liger_agree_on_drgrpo(name, warm_model, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: pip install --group peers")
    pytest.importorskip("liger_kernel", reason="Liger is not installed: pip install --group peers")
    case = CASES[name]
    exact = losses.differentiate(losses.formula, case, "dr_grpo", torch.float64)
    errors = {
        who: max(
            losses.relative_errors(losses.differentiate(loss, case, "dr_grpo"), exact).values()
        )
        for who, loss in (
            ("TRL", losses.trl_loss(warm_model, str(tmp_path))),
            ("Liger", losses.liger_loss),
        )
    }
    assert errors["Liger"] < losses.TOLERANCE
    assert (errors["TRL"] < losses.TOLERANCE) == (name != "off-policy, KL, TRL's default")


def test_trl_divides_by_the_std_unless_told_not_to(warm_model, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: pip install --group peers")
    told, default, grpo = losses.measure_advantages(warm_model, tmp_path)
    assert told["TRL"] < 1e-6 and default["TRL"] > 0.5 and 1e-5 < grpo["TRL"] < 1e-3
    assert max(row["ours"] for row in (told, default, grpo)) < 1e-6
