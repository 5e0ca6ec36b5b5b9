"""The comparison with TRL and Liger compares like with like, and its tables say what was measured.

What needs TRL or Liger is skipped without them: pip install --group peers
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
from drgrpo import data, pack
from drgrpo.advantage import group_advantage, mismatch_weight, token_weight
from drgrpo.config import RECIPES
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss_ref
from drgrpo.model import Policy, make_objective

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CASES = losses.make_cases()


def make_run(folder: Path, trainer: str, model: str = "", **changes) -> bench.Run:
    size = {"seed": 0, "steps": 2, "minibatches": 4}
    return bench.Run(trainer=trainer, model=model, folder=str(folder), **size | changes)


# ---- what a user meets


def test_a_missing_package_is_one_line_with_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        bench.main([])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--group peers" in line
    compared = "bench.experiments.peers compares with trl, liger-kernel, not installed"
    assert line.startswith(f"error: {compared}")


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
    """A phase inside another one counts once."""
    meter = bench.Meter()
    meter.start()
    with meter.phase("train"):
        clock.time += 3.0
        with meter.phase("rollout"):
            clock.time += 5.0
    meter.positions["rollout"] += 7
    clock.time += 4.0
    meter.step()
    clock.time += 5.0
    meter.step()
    first, second = meter.rows
    assert first["seconds"] == {"rollout": 5.0, "train": 3.0, "rest": 4.0}
    assert first["total"] == 12.0 and first["cpu"] == 3.0 and first["positions"] == {"rollout": 7}
    assert second["seconds"] == {"rest": 5.0} and second["total"] == 5.0
    assert second["cpu"] == 5 / 4 and second["positions"] == {}


def result(totals: list[float], rewards: list[float]) -> dict:
    rows = []
    for total, reward in zip(totals, rewards, strict=True):
        facts = {"total": total, "cpu": total / 10, "reward": reward, "tokens": 100}
        seconds = {"rollout": total / 2, "train": total / 2}
        rows.append(facts | {"seconds": seconds, "positions": {"rollout": 300, "train": 200}})
    accuracy = {"greedy": 0.9, "sampled": 0.8}
    return {"rows": rows, "peak_gb": 1.0, "before_gb": 0.5, "accuracy": accuracy}


def test_a_summary_is_the_median_turn_of_mean_steps_without_the_first_and_the_last():
    turns = [result([99, 1, 3, 50], [0, 0.5, 1, 0.5])]
    turns += [result([99, total, total, 50], [0] * 4) for total in (4, 8)]
    summary = bench.summary(turns)
    assert summary["steps"] == [2, 4, 8] and summary["cpu_steps"] == pytest.approx([0.2, 0.4, 0.8])
    assert summary["seconds"]["rollout"] == 2 and summary["seconds"]["old"] == 0
    assert summary["tokens_per_s"] == 25 and summary["late_reward"] == [0.5, 0, 0]
    assert summary["curves"][0]["seconds"] == [99, 100, 103, 153]


def test_the_table_and_the_figure_say_by_what_factor_ours_is_better(tmp_path):
    sides = [bench.summary([result([9, t, t, 9], [0.5] * 4)]) for t in (6.0, 1.5)]
    trainers = dict(zip(bench.TRAINERS, sides, strict=True))
    text = bench.speed_table("4", trainers)
    for line in (
        "| 4 optimizer steps a rollout | TRL | ours | factor |",
        "| **s/step**, median (range) | 6.00 (6.00–6.00) | 1.50 (1.50–1.50) | 4.0 |",
        "| CPU-s/step | 0.60 (0.60–0.60) | 0.15 (0.15–0.15) | 4.0 |",
        "| rollout, s | 3.000 | 0.750 | 4.0 |",
        "| sync, s | 0.000 | 0.000 | – |",
        "| µs a position, rollout | 10000.0 | 2500.0 | 4.0 |",
        "| sampled tokens/s | 17 | 67 | 4.0 |",
    ):
        assert line in text
    bench.draw({"4": trainers, "1": trainers}, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_smoothing_uses_the_past_only():
    assert bench.smooth([0.0, 1.0, 2.0, 9.0], width=2) == [0.0, 0.5, 1.5, 5.5]


# ---- the same work for both


@pytest.mark.parametrize("minibatches", [1, 4])
def test_trl_makes_as_many_optimizer_steps_of_as_many_responses(minibatches, tmp_path):
    config = bench.config_of(make_run(tmp_path, "TRL", minibatches=minibatches, steps=3))
    options = bench.trl_arguments(config)
    size = options["per_device_train_batch_size"]
    assert size * options["gradient_accumulation_steps"] == config.minibatch_size
    assert size * options["steps_per_generation"] == 256 == config.rollouts_per_step
    assert options["max_steps"] == 3 * minibatches


def test_trl_gets_the_prompts_of_our_steps_in_their_order(tmp_path):
    config = bench.config_of(make_run(tmp_path, "TRL", seed=1, steps=15))  # more than one epoch
    prompts, problems = bench.prompts_in_order(config), data.load_problems("arithmetic")
    assert len(prompts) == 15 * 32
    for step in (1, 14):
        rows = prompts[32 * (step - 1) : 32 * step]
        ours = data.step_problems(problems, step, 32, seed=1)
        assert rows["prompt"] == [p.question + "~" for p in ours]
        assert rows["answer"] == [p.answer for p in ours]


def check_run(run: bench.Run) -> list[dict]:
    """What a child process does, in this one: rows whose phases add up, a mean of 256 grades, a
    model that can be evaluated."""
    Path(run.folder).mkdir()
    bench.child(run)
    bench.distributed.stop()
    result = json.loads((Path(run.folder) / "result.json").read_text())
    assert len(result["rows"]) == run.steps and 0 < result["before_gb"] <= result["peak_gb"]
    for row in result["rows"]:
        seconds = row["seconds"]
        assert sum(seconds.values()) == pytest.approx(row["total"])
        assert min(seconds.values()) >= 0 and seconds["rest"] < 0.5 * row["total"]
        assert min(row["cpu"], seconds["rollout"], seconds["train"]) > 0
        assert 0 < row["reward"] < 1 and row["reward"] * 256 == int(row["reward"] * 256)
        assert row["tokens"] <= row["positions"]["rollout"]
    bench.distributed.start()
    assert set(bench.held_out(result["hf"], RECIPES["tiny"]())) == {"greedy", "sampled"}
    return result["rows"]


def test_a_run_of_ours_reports_its_phases_and_positions(tmp_path, warm_model):
    rows = check_run(make_run(tmp_path / "ours", "ours", model=warm_model))
    saved = (json.loads(line) for line in (tmp_path / "ours" / "run" / "metrics.jsonl").open())
    for row, line in zip(rows, saved, strict=True):
        assert row["reward"] == line["reward_mean"]
        assert row["seconds"]["rollout"] == line["seconds"]["rollout"]
        assert row["positions"]["train"] >= line["tokens_trained"] and "old" not in row["positions"]


def test_a_run_of_trl_reports_its_phases_and_positions(tmp_path, warm_model):
    """TRL trains on every response, padded, and computes the old log-probs of all of them."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install --group peers")
    for row in check_run(make_run(tmp_path / "trl", "TRL", model=warm_model)):
        positions = row["positions"]
        assert positions["train"] == positions["old"] >= row["tokens"] + 256 * 9


def test_a_failed_run_shows_what_it_said(tmp_path):
    message = r"(?s)^nobody failed with status 1:.*KeyError: 'nobody'"
    with pytest.raises(RuntimeError, match=message):
        bench.launch(make_run(tmp_path / "run", "nobody"))


# ---- losses


def reference(case: losses.Case, loss_type: str, hidden: torch.Tensor, weight: torch.Tensor):
    """Token by token with weighted advantages, in float64."""
    mask = case.mask_BL
    weight_B = token_weight(mask.sum(1), losses.LOSSES[loss_type], case.budget).double()
    advantage_B = case.advantage_B.double() * weight_B
    old, ref = (None if x is None else x[mask].double() for x in (case.old_BL, case.ref_BL))
    inputs = hidden[mask], weight, case.target_BL[mask], advantage_B[:, None].expand_as(mask)[mask]
    how = dict(scale=1 / (len(mask) * case.budget), kl_coef=case.kl_coef)
    how |= dict(old_logprob=old, ref_logprob=ref, temperature=case.temperature)
    return linear_drgrpo_loss_ref(*inputs, **how)[0]


# the kernel divides the KL term by B C: it is the formula's for dr_grpo only
WRITTEN_TWICE = [(n, t) for n in CASES for t in losses.LOSSES if "KL" not in n or t == "dr_grpo"]


@pytest.mark.parametrize(("name", "loss_type"), WRITTEN_TWICE)
def test_the_formula_is_the_kernels_reference(name, loss_type):
    case = CASES[name]
    exact = losses.differentiate(losses.formula, case, loss_type, torch.float64)
    values = losses.differentiate(reference, case, loss_type, torch.float64)
    assert max(losses.relative_errors(values, exact).values()) < 1e-6  # token_weight is float32
    ours = losses.differentiate(losses.our_loss, case, loss_type)
    assert max(losses.relative_errors(ours, exact).values()) < losses.TOLERANCE


@pytest.mark.parametrize("change", [{"temperature": 1.01}, {"budget": 33}, {"old_BL": None}])
def test_a_loss_of_other_inputs_is_beyond_the_tolerance(change):
    case = CASES["off-policy"]
    exact = losses.differentiate(losses.formula, case, "dr_grpo", torch.float64)
    other = losses.differentiate(losses.our_loss, replace(case, **change), "dr_grpo")
    assert max(losses.relative_errors(other, exact).values()) > losses.TOLERANCE


def test_the_cases_have_what_they_are_for():
    """Uneven lengths, advantages of both signs, ratios on both sides of both clips."""
    case = CASES["off-policy"]
    length = case.mask_BL.sum(1)
    assert length.min() == 1 and length.max() == case.mask_BL.shape[1] and len(length.unique()) > 4
    logprob = losses.logprobs(case.hidden_BLD, case.weight_VD, case.target_BL, case.temperature)
    ratio = (logprob - case.old_BL).exp()
    for sign in (case.advantage_B > 0, case.advantage_B < 0):
        chosen = ratio[sign[:, None] & case.mask_BL]
        assert (chosen < 0.8).any() and (chosen > 1.2).any()
        assert ((chosen > 0.8) & (chosen < 1.2)).any()


def test_the_table_marks_errors_beyond_float32():
    ours = {"loss": 1e-8, "dhidden": 2e-7, "dweight": 3e-7}
    errors = {"ours": ours, "TRL": ours | {"dhidden": 2e-4}}
    text = losses.loss_table([{"case": "c", "loss_type": "grpo", "errors": errors}])
    assert "| c | grpo | 1e-08 / 2e-07 / 3e-07 | **1e-08 / 2e-04 / 3e-07** |" in text


@pytest.mark.parametrize("name", CASES)
def test_trl_and_liger_agree_on_drgrpo(name, warm_model, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: pip install --group peers")
    pytest.importorskip("liger_kernel", reason="Liger is not installed: pip install --group peers")
    case = CASES[name]
    exact = losses.differentiate(losses.formula, case, "dr_grpo", torch.float64)
    errors = {}
    peers = {"TRL": losses.trl_loss(warm_model, str(tmp_path)), "Liger": losses.liger_loss}
    for peer, loss in peers.items():
        values = losses.differentiate(loss, case, "dr_grpo")
        errors[peer] = max(losses.relative_errors(values, exact).values())
    assert errors["Liger"] < losses.TOLERANCE
    assert (errors["TRL"] < losses.TOLERANCE) == (name != "off-policy, KL, TRL's default")


def test_trl_divides_by_the_std_unless_told_not_to(warm_model, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: pip install --group peers")
    told, default, grpo = losses.measure_advantages(warm_model, tmp_path)
    assert told["TRL"] < 1e-6 and default["TRL"] > 0.5 and 1e-5 < grpo["TRL"] < 1e-3
    assert max(row["ours"] for row in (told, default, grpo)) < 1e-6


def policy_loss(case: losses.Case, algo: str, hidden: torch.Tensor, weight: torch.Tensor):
    """`Policy.loss` on given hidden states, with the objective that --algo names."""
    mask = case.mask_BL
    weight_B = token_weight(mask.sum(1), algo, case.budget)
    advantage_BL = (case.advantage_B * weight_B)[:, None].expand_as(mask)
    batch = SimpleNamespace(
        target_N=case.target_BL[mask],
        advantage_N=advantage_BL[mask],
        old_logprob_N=case.old_BL[mask],
        ref_logprob_N=None,
    )
    objective = make_objective(replace(RECIPES["tiny"](), algo=algo), torch.device("cpu"))
    policy = SimpleNamespace(objective=objective, kernel="torch")
    policy._head_inputs = lambda batch: (hidden[mask], weight)
    return Policy.loss(policy, batch, 1 / (len(mask) * case.budget))[0]


def test_the_gradient_of_cispo_is_trl_s(warm_model, tmp_path):
    """TRL's `epsilon_high` of this loss is the cap itself."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install --group peers")
    case = replace(CASES["off-policy"], trl_options={"epsilon_high": 1 + losses.CLIP})
    ours = losses.differentiate(policy_loss, case, "cispo")
    theirs = losses.differentiate(losses.trl_loss(warm_model, str(tmp_path)), case, "cispo")
    for name in ("dhidden", "dweight"):
        assert losses.relative_error(ours[name], theirs[name].double()) < losses.TOLERANCE


def test_lite_ppo_s_advantages_are_trl_s_with_scale_rewards_batch(warm_model, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: pip install --group peers")
    reward_PG = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 1, 0]])
    inputs = [{"prompt": "0", "answer": r} for r in reward_PG.flatten().tolist()]
    options = dict(loss_type="dapo", scale_rewards="batch", num_generations=4)
    trainer = losses.trl_trainer(warm_model, str(tmp_path), **options)
    ids = [[1]] * 8
    trainer._generate = lambda prompts: (ids, ids, None, ["0"] * 8, None, {}, None, None)
    theirs_PG = trainer._generate_and_score_completions(inputs)["advantages"].view(2, 4)
    ours_PG = group_advantage(reward_PG, "lite_ppo")
    torch.testing.assert_close(ours_PG, theirs_PG, rtol=5e-4, atol=0)  # TRL adds 1e-4 to the std


@pytest.mark.parametrize(
    ("algo", "mode"), [("icepop", "token_mask"), ("sequence_mask", "sequence_mask")]
)
def test_the_masks_are_trl_s(warm_model, tmp_path, algo, mode):
    pytest.importorskip("trl", reason="TRL is not installed: pip install --group peers")
    mask_BL, old_BL = CASES["off-policy"].mask_BL, CASES["off-policy"].old_BL
    rng = torch.Generator().manual_seed(0)
    sampler_BL = old_BL + 0.2 * torch.randn(old_BL.shape, generator=rng)
    options = {"mode": mode, "clip_min": 0.8, "clip_max": 1.25}
    options = {f"vllm_importance_sampling_{name}": value for name, value in options.items()}
    trainer = losses.trl_trainer(warm_model, str(tmp_path), **options)
    trainer.use_vllm = True
    ids, responses = [[1]] * 8, [[1] * length for length in mask_BL.sum(1)]
    sampled = [row[mask].tolist() for row, mask in zip(sampler_BL, mask_BL, strict=True)]
    trainer._generate = lambda prompts: (ids, responses, None, ["0"] * 8, sampled, {}, None, None)
    trainer._get_per_token_logps_and_entropies = lambda *inputs, **options: (old_BL, None, None)
    output = trainer._generate_and_score_completions([{"prompt": "0", "answer": 0.0}] * 8)
    theirs_N = output["importance_sampling_ratio"].expand_as(mask_BL)[mask_BL]

    sequences = map(pack.Sequence, ids, responses, sampled, [1.0] * 8)
    batch = pack.pack(list(sequences))
    batch.old_logprob_N = old_BL[mask_BL]
    ours_N = mismatch_weight(batch, algo, 1.25)
    assert 0 < (ours_N == 0).sum() < len(ours_N)
    torch.testing.assert_close(ours_N, theirs_N)
