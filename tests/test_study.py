"""The study's bookkeeping and statistics on made-up runs whose answers are known, and one real run
through its command line."""

import json
import subprocess
from itertools import product

import numpy as np
import pytest
from scipy import stats

from bench.experiments import study
from bench.experiments.study import Setting, difference, ends, folder, pooled, train_one
from drgrpo.run.files import read_jsonl
from drgrpo.tiny.warmup import Warmup, cached_tiny_model

pytestmark = pytest.mark.slow

STEPS = 60


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_up_run(run, wrong_length, accuracy=0.5, say_so=0.25):
    """Evaluations at 0, 10, ... 60, in which wrong answers end `wrong_length` long, and as many
    steps. The last three have `accuracy` on average, none but one has it by itself. Before the last
    thirty steps every wrong sample says so."""
    late = {40: -0.05, 50: 0.0, 60: 0.05} if accuracy < 0.9 else {}
    evals = []
    for step, temperature in product(range(0, STEPS + 1, 10), (0.0, 1.0)):
        row = {"step": step, "temperature": temperature, "n": 384}
        row |= {"len_correct": 20.0, "truncated_frac": 0.1}
        row["accuracy"] = accuracy + late.get(step, 0.0 if step == 0 else 0.02)
        evals.append(row | {"len_incorrect": 30.0 if step == 0 else wrong_length})
    write(run / "eval.jsonl", evals)
    steps = range(1, STEPS + 1)
    metrics = [{"step": s, "reward_mean": s / STEPS, "entropy": 0.5} for s in steps]
    write(run / "metrics.jsonl", metrics)
    samples = [{"step": s, "reward": 0.0, "response": "n"} for s in range(1, 31)]
    for step, i in product(range(31, STEPS + 1), range(5)):
        response = "n" if i <= 4 * say_so else "y"
        samples.append({"step": step, "reward": float(i == 0), "response": response})
    write(run / "samples.jsonl", samples)


@pytest.fixture
def runs(tmp_path):
    """Two seeds each; GRPO's wrong answers are 40 and 42 tokens longer."""
    for seed in (0, 1):
        ours = folder(tmp_path, "one update", "drgrpo", seed)
        made_up_run(ours, 25 + seed, accuracy=0.5 - seed / 100)
        for algo in ("grpo", "grpo_length", "grpo_std"):
            made_up_run(folder(tmp_path, "one update", algo, seed), 65 + 3 * seed, accuracy=0.51)
    return tmp_path


def test_a_run_s_end_pools_the_last_evaluations_by_how_many_answers_were_wrong():
    values = ((0.9, 80.0), (0.5, 20.0), (1.0, None))
    evals = [{"n": 100, "accuracy": a, "len_incorrect": length} for a, length in values]
    assert pooled(evals, "len_incorrect") == pytest.approx((10 * 80 + 50 * 20) / 60)
    assert pooled(evals, "accuracy") == pytest.approx(0.8)
    assert pooled(evals[2:], "len_incorrect") is None


def test_ends_reads_before_and_after(tmp_path):
    made_up_run(tmp_path, 77.0)
    end = ends(tmp_path)
    assert end["len_incorrect"] == pytest.approx([30, 77])
    # the last three evaluations, not the last
    assert end["accuracy"] == end["greedy"] == pytest.approx([0.5, 0.5])
    assert end["reward"] == pytest.approx([5.5 / STEPS, 55.5 / STEPS])
    # of four wrong samples a step one says so; the right one does not count
    assert end["admitted"] == 0.25


def test_the_difference_is_paired_by_seed():
    # the seeds differ more than the arms
    ours, baseline = [75.0, 62.0, 90.0, 71.0], [25.0, 10.0, 42.0, 20.0]
    test, d = difference(ours, baseline), np.subtract(ours, baseline)
    assert test["mean"] == pytest.approx(50.25)
    half = stats.t.ppf(0.975, 3) * d.std(ddof=1) / 2
    assert test["interval"] == pytest.approx([50.25 - half, 50.25 + half])
    assert test["p"] < 1e-4
    # all four of one sign, two-sided
    assert test["p_sign_flip"] == pytest.approx(2 / 2**4)


@pytest.mark.parametrize(
    ("shift", "noise"), [(0.0, 0.01), (0.03, 0.01), (0.05, 0.01), (-0.05, 0.01), (0.0, 0.2)]
)
def test_equivalence_needs_a_small_difference_and_little_noise(shift, noise):
    equivalent = abs(shift) < study.MARGIN and noise < study.MARGIN
    d = shift + noise * np.array([1, -1, 1, -1, 1, -1, 1, -1])
    test = study.equivalence((0.8 + d).tolist(), [0.8] * 8)
    assert test["equivalent"] is equivalent
    inside = max(map(abs, test["interval"])) < study.MARGIN
    assert bool(inside) is equivalent, "the two one-sided tests and the 90 % interval say the same"


def test_the_report_compares_every_objective_and_draws(runs, tmp_path, capsys):
    setting = Setting(algos=tuple(study.ALGOS), seeds=2, steps=STEPS)
    study.report({"one update": setting}, runs, tmp_path)
    result = json.loads((tmp_path / "study.json").read_text())["settings"]["one update"]
    assert set(result["against_drgrpo"]) == {"grpo", "grpo_length", "grpo_std"}
    grpo = result["against_drgrpo"]["grpo"]
    assert grpo["len_incorrect"]["mean"] == pytest.approx(41)
    assert grpo["accuracy"]["mean"] == pytest.approx(0.015)
    for name in ("study", "study_details", "study_settings"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    shown = capsys.readouterr().out
    assert "| one update | GRPO | 2 | 0.51 → 0.51 (0.51–0.51) | 30 → 66 (65–68) |" in shown
    assert "+41 (" in shown and shown.count("| one update |") == 7


def test_a_run_without_wrong_answers_has_no_length(runs):
    made_up_run(folder(runs, "one update", "grpo", 1), None, accuracy=1.0)
    arm = [ends(folder(runs, "one update", "grpo", seed)) for seed in (0, 1)]
    assert arm[0]["len_incorrect"][1] == pytest.approx(65) and arm[1]["len_incorrect"][1] is None
    setting = {"runs": {"grpo": arm}, "against_drgrpo": {}}
    assert "65 (65–65)" in study.table({"one update": setting})
    test = difference([65.0, 70.0, None], [25.0, 31.0, 20.0])  # its seed is left out
    assert test["mean"] == pytest.approx(39.5) and test["seeds"] == 2


def test_a_finished_run_is_not_run_again_and_a_failed_one_is_named(tmp_path, monkeypatch):
    calls = []

    def fail(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", fail)
    made_up_run(tmp_path / "done", 30.0)
    train_one(Setting(steps=STEPS), tmp_path, tmp_path / "done", "grpo", 0)
    assert not calls
    with pytest.raises(RuntimeError, match=r"train.py ended with status 3: see .*new\.log"):
        train_one(Setting(steps=STEPS, train={"lr": 1e-4}), tmp_path, tmp_path / "new", "grpo", 5)
    assert " --lr 0.0001" in " ".join(calls[0]) and " --seed 5 " in " ".join(calls[0])


def test_a_setting_reaches_the_trainer_and_leaves_what_the_report_reads(tmp_path):
    model = cached_tiny_model(Warmup(steps=2, batch=8, notices=False), tmp_path / "warmup")
    setting = Setting(train={"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 16}, steps=1)
    train_one(setting, model, tmp_path / "run", "grpo_std", 3)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["algo"], config["seed"], config["group_size"]) == ("grpo_std", 3, 4)
    # an untrained model runs into any budget
    assert ends(tmp_path / "run")["truncated_frac"][1] > 0.9
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 1


def test_every_setting_is_one_that_the_trainer_takes():
    from drgrpo.config import RECIPES, replace

    for setting in study.SETTINGS.values():
        replace(RECIPES["tiny"](), **setting.train)
        Warmup(**setting.warmup)


def test_figures_and_tables_come_from_study_json_alone(tmp_path, monkeypatch, capsys):
    run = {"accuracy": [0.3, 0.8], "len_correct": [19.0, 20.0], "truncated_frac": [0.0, 0.0]}
    run |= {"entropy": [0.07, 0.05], "admitted": None}
    runs = {algo: [run | {"len_incorrect": [40.0, 70.0]}] * 3 for algo in study.ALGOS}
    runs["drgrpo"] = [run | {"len_incorrect": [40.0, 20.0 + seed]} for seed in range(3)]
    test = {"mean": 1.0, "interval": [0.5, 1.5], "p": 0.01, "p_sign_flip": 0.25, "equivalent": True}
    against = {algo: {"len_incorrect": test, "accuracy": test} for algo in list(runs)[1:]}
    settings = {"four updates": {"train": {}, "runs": runs, "against_drgrpo": against}}
    (tmp_path / "study.json").write_text(json.dumps({"settings": settings}))
    monkeypatch.setattr("sys.argv", ["study", "--figures-only", "--out", str(tmp_path)])
    monkeypatch.setattr(study, "train_all", None)  # nothing may train
    study.main()
    assert {p.name for p in tmp_path.glob("*.png")} == {"study_length.png", "study_settings.png"}
    assert "40 → 21 (20–22)" in capsys.readouterr().out
