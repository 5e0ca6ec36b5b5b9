"""The loop as a whole: it learns, and what should change time only changes time only."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from conftest import ROOT, SHARED_DATA
from drgrpo import pack, parity
from drgrpo.config import RECIPES
from drgrpo.engine_torch import TorchEngine
from drgrpo.grade import Grade
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss_ref
from drgrpo.model import Objective, load_policy
from drgrpo.pack import Sequence
from drgrpo.rollout import Sampler
from drgrpo.run.files import append_jsonl, read_jsonl
from drgrpo.types import UserError
from runs import assert_close_run, assert_same_run, metrics, run, small


def test_every_step_writes_the_documented_columns(base):
    out, rows = base
    assert [r["step"] for r in rows] == [1, 2]
    documented = """step algo reward_mean response_len_mean response_len_correct
        response_len_incorrect truncated_frac zero_adv_frac entropy clip_frac ratio_max grad_norm lr
        parity_mean parity_max tokens tokens_per_s seconds hours_used tflops mfu"""
    phases = {"rollout", "grade", "pack", "old", "train", "sync", "eval", "save"}
    for row in rows:
        assert set(documented.split()) <= row.keys()
        seconds = dict(row["seconds"])
        total = seconds.pop("total")
        assert seconds.keys() == phases and sum(seconds.values()) <= total + 1e-3
        assert row["parity_max"] < 1e-4, "sampler and trainer disagree"
        assert 0 < row["reward_mean"] < 1 and row["entropy"] > 0 and row["grad_norm"] > 0
    assert any(r["tokens_trained"] < r["tokens"] for r in rows), "no group had a single reward"
    samples = read_jsonl(out / "samples.jsonl")
    assert len(samples) == 32, "one response to each of 16 prompts, twice"
    assert {"step", "problem", "answer", "response", "reward"} <= samples[0].keys()
    evals = read_jsonl(out / "eval.jsonl")
    expected = [(0, 0.0), (0, 1.0), (2, 0.0), (2, 1.0)]
    assert [(r["step"], r["temperature"]) for r in evals] == expected
    columns = {"benchmark", "accuracy", "n", "len_correct", "len_incorrect", "truncated_frac"}
    assert columns <= evals[0].keys() and evals[0]["template"] == "arithmetic"
    (start,) = json.loads((out / "run.json").read_text())
    assert start["resumed_step"] == 0 and start["torch"] == torch.__version__
    for figure in ("curves.png", "time.png"):
        assert (out / "plots" / figure).read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_run_bit_for_bit(base, warm_model, tmp_path):
    run(small(warm_model, tmp_path / "again"))
    assert_same_run(base[0], tmp_path / "again")


def test_another_seed_gives_another_run(base, warm_model, tmp_path):
    rows = run(small(warm_model, tmp_path / "seed1", seed=1))
    assert rows[0]["tokens"] != base[1][0]["tokens"]


@pytest.mark.parametrize(
    "changes",
    [
        {"drop_zero_advantage": False},
        {"tokens_per_microbatch": 200},
        {"checkpointing": "full"},
        {"sampler_batch": 7},
    ],
    ids=[
        "zero-advantage responses kept",
        "many micro-batches",
        "activations recomputed",
        "a small sampler batch",
    ],
)
def test_systems_knobs_change_time_and_memory_only(base, warm_model, tmp_path, changes):
    run(small(warm_model, tmp_path / "other", **changes))
    assert_close_run(base[0], tmp_path / "other")


def test_evaluation_sets_are_asked_in_one_call_and_scored_apart(base, warm_model, tmp_path):
    rows = [{"problem": "4+6+x=14", "answer": "0"}, {"problem": "2+8+x=18", "answer": "0"}]
    append_jsonl(tmp_path / "wrong.jsonl", rows)
    sets = f"arithmetic_heldout,{tmp_path}/wrong.jsonl"
    run(small(warm_model, tmp_path / "two", eval_data=sets, eval_samples=2, steps=1))
    evals = [r for r in read_jsonl(tmp_path / "two" / "eval.jsonl") if r["step"] == 0]
    alone = read_jsonl(base[0] / "eval.jsonl")[0]
    assert evals[0] == alone, "the answers to one set do not depend on the other"
    assert [(r["n"], r["accuracy"]) for r in evals[1::2]] == [(2, 0.0), (2, 0.0)]
    assert [r["n"] for r in evals[::2]] == [128, 128], "greedily, and with two samples each"


def test_without_eval_samples_only_the_greedy_answer_is_scored(warm_model, tmp_path):
    run(small(warm_model, tmp_path / "greedy", steps=1, eval_samples=0))
    evals = read_jsonl(tmp_path / "greedy" / "eval.jsonl")
    assert [(r["step"], r["temperature"]) for r in evals] == [(0, 0.0), (1, 0.0)]


def test_a_complete_run_is_left_as_it_is(base, warm_model, capsys):
    before = (base[0] / "metrics.jsonl").read_text()
    train.main(small(warm_model, base[0]))
    assert "is complete at step 2" in capsys.readouterr().out
    assert (base[0] / "metrics.jsonl").read_text() == before


def test_another_config_does_not_touch_the_run(base, warm_model):
    before = (base[0] / "metrics.jsonl").read_text()
    message = r"another config \(algo='drgrpo' there, 'grpo' now\).*--out .*base-grpo"
    with pytest.raises(UserError, match=message):
        train.main(small(warm_model, base[0], algo="grpo"))
    assert (base[0] / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("algo", ["grpo", "grpo_length", "grpo_std", "rloo", "dapo"])
def test_the_other_algorithms_run_and_differ_in_the_update_only(base, warm_model, tmp_path, algo):
    rows = run(small(warm_model, tmp_path / algo, algo=algo, steps=1))
    assert rows[0]["tokens"] == base[1][0]["tokens"]
    assert rows[0]["grad_norm"] != pytest.approx(base[1][0]["grad_norm"], rel=0.02)


def test_a_kl_penalty_trains_every_response_and_holds_the_policy_back(base, warm_model, tmp_path):
    weak, strong = (
        run(small(warm_model, tmp_path / f"kl{coef}", kl_coef=coef, lr=3e-3, steps=4, eval_data=""))
        for coef in (1e-6, 10.0)
    )
    assert all(r["tokens_trained"] == r["tokens"] for r in strong), (
        "a response without advantage has a KL gradient"
    )
    assert 0 < strong[-1]["kl"] < weak[-1]["kl"] / 2
    assert base[1][1]["kl"] == 0


def test_truncated_importance_sampling_weighs_every_token(warm_model, tmp_path):
    """Sampler and trainer agree here, so that a cap of one half halves the gradient."""
    settings = {"old_logprob": "recompute", "minibatches": 1, "steps": 1}
    norms = {}
    for cap in (0.0, 0.5, 2.0):
        (row,) = run(small(warm_model, tmp_path / f"cap{cap}", tis_cap=cap, **settings))
        norms[cap] = row["grad_norm"]
    assert norms[0.5] == pytest.approx(norms[0.0] / 2, rel=1e-3)
    assert norms[2.0] == pytest.approx(norms[0.0], rel=1e-3)


def test_each_side_of_the_clip_is_its_own(warm_model, tmp_path):
    clipped = []
    for low, high in ((1e-4, 1e-4), (1e-4, 0.99), (0.99, 1e-4), (0.99, 99.0)):
        clip = {"clip_low": low, "clip_high": high}
        (row,) = run(small(warm_model, tmp_path / f"{low}-{high}", steps=1, **clip))
        clipped.append(row["clip_frac"])
    both, low, high, none = clipped
    assert none == 0 < min(low, high) and both == pytest.approx(low + high)


def test_strictly_on_policy_is_the_sampler_ratio_with_one_update(warm_model, tmp_path):
    """With one update per rollout the old policy is the new one: three ways to say so, one
    gradient."""
    norms = []
    for old in ("none", "sampler", "recompute"):
        config = small(warm_model, tmp_path / old, old_logprob=old, minibatches=1, steps=1)
        norms.append(run(config)[0]["grad_norm"])
    assert norms[1:] == pytest.approx(norms[:2], rel=1e-4)


def test_truncated_responses_earn_nothing_whatever_they_say(warm_model, tmp_path, monkeypatch):
    original, right = Sampler.rollout, Future()
    right.set_result(Grade(1.0, parsed=True))

    def truncated(self, *args, **kwargs):
        rollouts, _ = original(self, *args, **kwargs)
        cut = [replace(r, completion=replace(r.completion, finished=False)) for r in rollouts]
        return cut, [right] * len(cut)

    monkeypatch.setattr(Sampler, "rollout", truncated)
    (row,) = run(small(warm_model, tmp_path / "cut", steps=1))
    assert row["truncated_frac"] == 1 and row["reward_mean"] == 0
    assert row["zero_adv_frac"] == 1 and row["tokens_trained"] == 0
    assert row["grad_norm"] == 0 and row["skipped_updates"] == 0, "an empty minibatch still steps"
    assert row["parity_mean"] is None and row["ratio_max"] is None


def test_a_sampler_that_missed_a_sync_stops_the_run(warm_model, tmp_path, monkeypatch):
    original, synced = TorchEngine.sync, []

    def only_once(self, named_weights):
        if not synced:
            synced.append(original(self, named_weights))

    monkeypatch.setattr(TorchEngine, "sync", only_once)
    with pytest.raises(parity.ParityError, match="disagree on fresh samples"):
        run(small(warm_model, tmp_path / "stale"))
    assert len(metrics(tmp_path / "stale")) == 1, "the step on stale samples was trained on"


def test_the_last_sync_is_checked_too(warm_model, tmp_path, monkeypatch):
    original, synced = TorchEngine.sync, []

    def all_but_the_last(self, named_weights):
        synced.append(1)
        if len(synced) < 3:  # at the start, after step 1
            original(self, named_weights)

    monkeypatch.setattr(TorchEngine, "sync", all_but_the_last)
    with pytest.raises(parity.ParityError, match="disagree on fresh samples"):
        run(small(warm_model, tmp_path / "stale"))
    assert len(metrics(tmp_path / "stale")) == 2


def test_a_run_may_go_on_beside_a_sampler_that_disagrees(warm_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parity.LIMITS, torch.float32, (0.0, 0.0))
    rows = run(small(warm_model, tmp_path / "warn", parity="warn"))
    assert len(rows) == 2 and "WARNING: trainer and sampler disagree" in capsys.readouterr().out


@pytest.mark.slow
def test_reward_rises(warm_model, tmp_path):
    """The first steps of the recipe: held-out accuracy, sampled, goes up by half and more."""
    recipe = {"prompts_per_step": 32, "minibatches": 4, "steps": 15, "eval_samples": 3}
    run(small(warm_model, tmp_path / "learn", **recipe))
    rows = read_jsonl(tmp_path / "learn" / "eval.jsonl")
    before, after = [r["accuracy"] for r in rows if r["temperature"] == 1]
    assert after > 1.5 * before, (before, after)


def test_the_hf_folder_answers_like_the_trained_policy(base):
    """What transformers loads from OUT/hf writes, greedily, what the last evaluation saw."""
    out, _ = base
    tok = AutoTokenizer.from_pretrained(out / "hf")
    lm = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32)
    ids = tok("7+4+x=18~", return_tensors="pt")
    text = tok.decode(lm.generate(**ids, max_new_tokens=20, do_sample=False)[0])
    assert text.startswith("7+4+x=18~7+4=11,")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_an_optimizer_step_is_that_of_the_reference_head(
    random_model, group_of_one, monkeypatch, dtype
):
    """train.py's own step on the Triton kernel, on its torch backend, and on the formula in plain
    torch with whole logits."""
    device, half = torch.device("cuda", 0), getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randint(260, (n,), generator=generator).tolist()

    parts = []
    for _ in range(2):
        lengths = range(5, 100, 7)
        parts.append([Sequence(draw(20), draw(n), [-5.0] * n, 1.0 - 2 * (n % 2)) for n in lengths])
    config, steps = replace(RECIPES["tiny"](), dtype=dtype, lr=1e-3), {}
    for head in ("triton", "torch", "reference"):
        generator.manual_seed(1)
        kernel = "torch" if head == "reference" else head
        policy = load_policy(random_model, Objective(), dtype=half, device=device, kernel=kernel)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
        batches = [pack.pack(part, device) for part in parts]
        for batch in batches:
            noise_N = 0.3 * torch.randn(len(batch.target_N), generator=generator).to(device)
            batch.old_logprob_N = policy.logprob(batch) + noise_N
        with monkeypatch.context() as patch:
            if head == "reference":
                patch.setattr("drgrpo.model.linear_drgrpo_loss", linear_drgrpo_loss_ref)
            steps[head] = train.train_minibatch(config, policy, optimizer, batches, lr=1e-3)
    expected = steps.pop("reference")
    assert expected.clipped > 10 and expected.grad_norm > 0
    rel = 1e-4 if dtype == "float32" else 2e-2
    for head, step in steps.items():
        for column in ("loss", "grad_norm", "ratio_max", "clipped", "tokens"):
            assert getattr(step, column) == pytest.approx(getattr(expected, column), rel=rel), head


# ---- bad input, through the command line

MATH_ROW = '{"problem": "What is 1 + 1?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--recipe tinny", "unknown recipe 'tinny'"),
        ("--recipee tiny", "did you mean '--recipe'"),
        ("--template qwen-math", "qwen_math"),
        ("--train-data nowhere.jsonl", "nowhere.jsonl"),
        ("--eval-data nowhere", "nowhere"),
        ("--train-data math.jsonl --answer-field anwser", "'answer'"),
        ("--train-data holes.jsonl", "no answer"),
        ("--minibatches 5", "--minibatches 4 or 8"),
        ("--out .", "is not empty and holds no run"),
    ],
)
def test_a_mistake_is_one_clear_line_before_torch_is_imported(tmp_path, extra, message):
    (tmp_path / "math.jsonl").write_text(MATH_ROW * 3)
    (tmp_path / "holes.jsonl").write_text(MATH_ROW + '{"problem": "1 + 1?", "answer": null}\n')
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, ROOT / "train.py", "--recipe", "tiny", "--out", "run"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, *extra.split()], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists() and not done.stdout


def test_without_a_mistake_torch_is_imported(tmp_path):
    """Otherwise the test above could not fail."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, ROOT / "train.py", "--recipe", "tiny", "--out", "run"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "torch was imported" in done.stderr


def test_prompts_that_do_not_fit_are_an_error(random_model, tmp_path):
    (tmp_path / "math.jsonl").write_text(MATH_ROW)
    data = {"train_data": str(tmp_path / "math.jsonl"), "max_prompt_tokens": 3}
    with pytest.raises(UserError, match="no prompt fits"):
        train.main(small(random_model, tmp_path / "run", **data))
    assert not (tmp_path / "run").exists()


def test_overlong_prompts_are_dropped_and_counted(warm_model, tmp_path, capsys):
    long = json.dumps({"problem": "x" * 2000, "answer": "2"}) + "\n"
    (tmp_path / "math.jsonl").write_text(MATH_ROW * 3 + long)
    data = {"train_data": str(tmp_path / "math.jsonl"), "template": "qwen_math", "eval_data": ""}
    run(small(warm_model, tmp_path / "run", steps=1, **data))
    expected = "3 training problems, 1 dropped for a prompt of more than 928 tokens"
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_real_math_problems_run_through(warm_model, tmp_path):
    path = SHARED_DATA / "train" / "math_12k.jsonl"
    if not path.exists():
        pytest.skip(f"MATH-12K is not at {path}")
    data = {"train_data": str(path), "template": "qwen_math", "eval_data": ""}
    rows = run(small(warm_model, tmp_path / "math", **data))
    assert len(rows) == 2 and rows[0]["response_len_mean"] > 1
