"""The bookkeeping of the comparison of objectives on made-up runs whose answers are known, and its
controls."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from bench.experiments import controls, objectives
from bench.experiments.objectives import compare, cost_ratio, costs_to, first_reached, folder
from drgrpo.advantage import group_advantage
from drgrpo.tiny.arithmetic import Demonstrator, problems
from runs import ROOT, run, small, weights

STEPS = 30
TO_TARGETS = {"0.5": 1500, "0.6": 2000, "0.7": 2500}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_up_run(run, end=0.8, tokens=100, wrong_length=30.0):
    """Accuracies 0.2, 0.4, 0.6, `end` at steps 0, 10, 20, 30, and `tokens` sampled a step."""
    evals = []
    for (step, accuracy), temperature in product(
        zip((0, 10, 20, 30), (0.2, 0.4, 0.6, end), strict=True), (0.0, 1.0)
    ):
        row = {"step": step, "temperature": temperature, "n": 384, "accuracy": accuracy}
        row |= {"len_incorrect": wrong_length, "len_correct": 20.0, "truncated_frac": 0.0}
        evals.append(row)
    write(run / "eval.jsonl", evals)
    seconds = {"rollout": 1.0, "old": 0.5, "train": 2.0, "eval": 50.0}
    row = {"reward_mean": 0.5, "entropy": 0.1, "tokens": tokens, "tokens_trained": tokens / 2}
    rows = [row | {"step": step, "seconds": seconds} for step in range(1, STEPS + 1)]
    write(run / "metrics.jsonl", rows)
    write(run / "samples.jsonl", [{"step": STEPS, "reward": 0.0, "response": "1n"}])


def test_a_cost_is_what_was_spent_when_the_target_was_first_reached(tmp_path):
    made_up_run(tmp_path)
    assert costs_to(tmp_path, "tokens") == pytest.approx(TO_TARGETS)
    assert costs_to(tmp_path, "tokens_trained")["0.7"] == pytest.approx(1250)
    assert costs_to(tmp_path, "seconds")["0.7"] == pytest.approx(87.5), "evaluations cost nothing"


def test_a_target_counts_when_it_is_reached_first():
    points = [(0, 0.2), (10, 0.6), (20, 0.4), (30, 0.8)]
    assert first_reached(points, 0.5) == pytest.approx(7.5)
    assert first_reached(points, 0.7) == pytest.approx(27.5)
    assert first_reached(points, 0.9) is None
    assert first_reached(points, 0.1) == 0


def test_costs_are_compared_by_the_geometric_mean_of_ratios_of_one_seed():
    ours, baseline = [200.0, 100.0, None, 50.0], [100.0, 200.0, 100.0, 25.0]
    test = cost_ratio(ours, baseline)
    logs = np.log([2.0, 0.5, 2.0])
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / 3**0.5
    assert test["mean"] == pytest.approx(2 ** (1 / 3))
    assert np.log(test["interval"]) == pytest.approx([logs.mean() - half, logs.mean() + half])
    assert (test["seeds"], test["missing"]) == (3, 1)
    assert cost_ratio([1.0, None], [1.0, 1.0])["mean"] is None, "one seed has no interval"


@pytest.fixture
def runs(tmp_path):
    """Two seeds of everything. GRPO's wrong answers are longer, and it samples twice as much."""
    for arm, seed in product([*objectives.OBJECTIVES, *objectives.CONTROLS], (0, 1)):
        longer = {"wrong_length": 70.0 + seed, "tokens": 200} if arm == "grpo" else {}
        end = 0.8 if arm in objectives.OBJECTIVES else 0.5
        made_up_run(folder(tmp_path, arm, seed), end + seed / 100, **longer)
    return tmp_path


def test_every_objective_is_compared_with_dr_grpo(runs, tmp_path, capsys):
    result = objectives.measured(runs, seeds=2)
    assert set(result["against_drgrpo"]) == set(objectives.OBJECTIVES) - {"drgrpo"}
    grpo = result["against_drgrpo"]["grpo"]
    assert grpo["len_incorrect"]["mean"] == pytest.approx(40.5)
    assert grpo["costs"]["tokens"]["0.7"]["mean"] == pytest.approx(2)
    assert compare(result["runs"]["dapo"], result["runs"]["drgrpo"])["accuracy"]["mean"] == 0
    objectives.show(json.loads(json.dumps({"where": WHERE, **result})), tmp_path)
    text = (tmp_path / "objectives.md").read_text()
    assert "| GRPO | 0.20 → 0.60 (0.60–0.60) | 70 → 70 (70–71) | 0.00 → 0.00 (0.00–0.00) |" in text
    assert "| Dr. GRPO | 2,4" in text and "| GRPO | 2.00 x (2.00 to 2.00) | 2.00 x" in text
    assert "| random | 0.20 → " in text and "on nobody's card, torch 9, commit abc." in text.lower()
    for name in ("objectives.png", "controls.png"):
        assert (tmp_path / name).stat().st_size > 10_000


WHERE = {"device": "nobody's card", "torch": "9", "commit": "abc"}


def test_a_run_that_never_gets_there_is_counted_and_not_averaged(runs):
    made_up_run(folder(runs, "grpo", 1), end=0.65)
    made_up_run(folder(runs, "drgrpo", 1), end=0.65)
    result = objectives.measured(runs, seeds=2)
    ratio = result["against_drgrpo"]["rloo"]["costs"]["tokens"]["0.7"]
    assert (ratio["seeds"], ratio["missing"]) == (1, 1)
    assert objectives.own_costs(result["runs"]["drgrpo"], "0.7")[0] == "2,500"
    assert objectives.times(ratio) == "–"


# ---- controls


def test_the_random_reward_pays_a_share_whatever_the_answer_and_repeats_itself():
    pay = [controls.random_reward(str(i), problem="q", answer=i) for i in range(4000)]
    assert np.mean(pay) == pytest.approx(controls.RATE, abs=3 * (0.29 * 0.71 / 4000) ** 0.5)
    assert pay == [controls.random_reward(str(i), problem="q", answer=0) for i in range(4000)]
    assert pay != [controls.random_reward(str(i), problem="p", answer=0) for i in range(4000)]


def test_the_reward_for_form_accepts_what_was_demonstrated_right_or_wrong():
    demonstrator = Demonstrator(0)
    for problem in problems("train")[:50]:
        response = demonstrator.solve(problem)
        assert controls.form_reward(response) == 1.0
        assert controls.form_reward(response[:-1]) == controls.form_reward(response + "#1") == 0.0


@pytest.mark.parametrize("algo", objectives.OBJECTIVES)
def test_the_constant_reward_gives_no_response_an_advantage(algo):
    reward = controls.constant_reward("anything", problem="q", answer="1", finished=True)
    finished_PG = torch.ones(3, 4, dtype=torch.bool)
    assert not group_advantage(torch.full((3, 4), reward), algo, finished_PG).any()


@pytest.mark.slow
def test_training_on_the_constant_reward_changes_no_weight(warm_model, tmp_path):
    reward = f"{ROOT}/bench/experiments/controls.py:constant_reward"
    rows = run(small(warm_model, tmp_path, reward=reward))
    assert [row["reward_mean"] for row in rows] == [1, 1] and rows[0]["accuracy"] < 1
    before = AutoModelForCausalLM.from_pretrained(warm_model, dtype=torch.float32).state_dict()
    after = weights(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
