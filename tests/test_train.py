"""The loop as a whole: it learns, and what should change time only changes time only."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from conftest import ROOT, SHARED_DATA
from drgrpo import pack, parity
from drgrpo.config import RECIPES
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss_ref
from drgrpo.model import Objective, load_policy
from drgrpo.run.log import read_jsonl
from drgrpo.types import UserError
from runs import assert_close_run, assert_same_run, run, small


def test_every_step_writes_the_documented_columns(base):
    out, rows = base
    assert [r["step"] for r in rows] == [1, 2]
    columns = {
        "step",
        "algo",
        "reward_mean",
        "response_len_mean",
        "response_len_correct",
        "response_len_incorrect",
        "truncated_frac",
        "zero_adv_frac",
        "entropy",
        "clip_frac",
        "ratio_max",
        "grad_norm",
        "lr",
        "parity_mean",
        "parity_max",
        "tokens",
        "tokens_per_s",
        "seconds",
        "hours_used",
    }
    for row in rows:
        assert columns <= row.keys()
        assert {"rollout", "grade", "pack", "train", "sync", "eval", "save", "total"} <= row[
            "seconds"
        ].keys()
        assert (
            sum(v for k, v in row["seconds"].items() if k != "total")
            <= row["seconds"]["total"] + 1e-3
        )
        assert row["parity_max"] < 1e-4, "sampler and trainer disagree"
        assert 0 < row["reward_mean"] < 1 and row["entropy"] > 0 and row["grad_norm"] > 0
    assert any(r["tokens_trained"] < r["tokens"] for r in rows), (
        "no group was all right or all wrong: the test proves little"
    )
    samples = read_jsonl(out / "samples.jsonl")
    assert (
        len(samples) == 6
        and {"step", "problem", "answer", "response", "reward"} <= samples[0].keys()
    )
    evals = read_jsonl(out / "eval.jsonl")
    assert [(r["step"], r["temperature"]) for r in evals] == [
        (0, 0.0),
        (0, 1.0),
        (2, 0.0),
        (2, 1.0),
    ]
    assert {
        "benchmark",
        "accuracy",
        "n",
        "len_correct",
        "len_incorrect",
        "truncated_frac",
    } <= evals[0].keys()
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
    (tmp_path / "wrong.jsonl").write_text(
        '{"problem": "4+6+x=14", "answer": "0"}\n{"problem": "2+8+x=18", "answer": "0"}\n'
    )
    sets = f"arithmetic_heldout,{tmp_path}/wrong.jsonl"
    run(small(warm_model, tmp_path / "two", eval_data=sets, eval_samples=2, steps=1))
    evals = [r for r in read_jsonl(tmp_path / "two" / "eval.jsonl") if r["step"] == 0]
    assert evals[0] == read_jsonl(base[0] / "eval.jsonl")[0], (
        "the answers to one set do not depend on the other"
    )
    assert [(r["n"], r["accuracy"]) for r in evals[1::2]] == [(2, 0.0), (2, 0.0)]
    assert [r["n"] for r in evals[::2]] == [128, 128], "greedily, and with two samples each"


def test_a_complete_run_is_left_as_it_is(base, warm_model, capsys):
    before = (base[0] / "metrics.jsonl").read_text()
    train.main(small(warm_model, base[0], samples_logged=3))
    assert "is complete at step 2" in capsys.readouterr().out
    assert (base[0] / "metrics.jsonl").read_text() == before


def test_another_config_does_not_touch_the_run(base, warm_model):
    before = (base[0] / "metrics.jsonl").read_text()
    with pytest.raises(
        UserError, match=r"another config \(algo='drgrpo' there, 'grpo' now\).*--out .*base-grpo"
    ):
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
    norms = [
        run(small(warm_model, tmp_path / f"cap{c}", tis_cap=c, **settings))[0]["grad_norm"]
        for c in (0.0, 0.5, 2.0)
    ]
    assert norms[1] == pytest.approx(norms[0] / 2, rel=1e-3) and norms[2] == pytest.approx(
        norms[0], rel=1e-3
    )


def test_each_side_of_the_clip_is_its_own(warm_model, tmp_path):
    clipped = {
        (low, high): run(
            small(warm_model, tmp_path / f"{low}-{high}", clip_low=low, clip_high=high, steps=1)
        )[0]["clip_frac"]
        for low, high in ((1e-4, 1e-4), (1e-4, 0.99), (0.99, 1e-4), (0.99, 99.0))
    }
    both, low, high, none = clipped.values()
    assert none == 0 < min(low, high) and both == pytest.approx(low + high)


def test_strictly_on_policy_is_the_sampler_ratio_with_one_update(warm_model, tmp_path):
    """With one update per rollout the old policy is the new one: three ways to say so, one
    gradient."""
    norms = [
        run(small(warm_model, tmp_path / old, old_logprob=old, minibatches=1, steps=1))[0][
            "grad_norm"
        ]
        for old in ("none", "sampler", "recompute")
    ]
    assert norms[1:] == pytest.approx(norms[:2], rel=1e-4)


def test_truncated_responses_earn_nothing_whatever_they_say(warm_model, tmp_path, monkeypatch):
    original = train.rollout

    def cut(*args):
        return [
            replace(
                r, completion=replace(r.completion, finished=False), text="#" + r.problem.answer
            )
            for r in original(*args)
        ]

    monkeypatch.setattr(train, "rollout", cut)
    (row,) = run(small(warm_model, tmp_path / "cut", steps=1))
    assert row["truncated_frac"] == 1 and row["reward_mean"] == 0
    assert row["zero_adv_frac"] == 1 and row["tokens_trained"] == 0
    assert row["grad_norm"] == 0 and row["skipped_updates"] == 0, "an empty minibatch still steps"
    assert row["parity_mean"] is None and row["ratio_max"] is None


def test_a_sampler_that_missed_a_sync_stops_the_run(warm_model, tmp_path, monkeypatch):
    from drgrpo.engine_torch import TorchEngine

    original, synced = TorchEngine.sync, []

    def only_once(self, named_weights):
        if not synced:
            synced.append(original(self, named_weights))

    monkeypatch.setattr(TorchEngine, "sync", only_once)
    with pytest.raises(parity.ParityError, match="disagree on fresh samples"):
        run(small(warm_model, tmp_path / "stale"))
    assert len(read_jsonl(tmp_path / "stale" / "metrics.jsonl")) == 1, (
        "the step on stale samples was trained on"
    )


def test_reward_rises(warm_model, tmp_path):
    """The first steps of the recipe: held-out accuracy, sampled, goes up by half and more."""
    run(
        small(
            warm_model,
            tmp_path / "learn",
            prompts_per_step=32,
            minibatches=4,
            steps=15,
            eval_samples=3,
        )
    )
    before, after = [
        r["accuracy"]
        for r in read_jsonl(tmp_path / "learn" / "eval.jsonl")
        if r["temperature"] == 1
    ]
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
    device, generator, half = (
        torch.device("cuda", 0),
        torch.Generator().manual_seed(0),
        getattr(torch, dtype),
    )
    draw = lambda n: torch.randint(260, (n,), generator=generator).tolist()  # noqa: E731
    parts = [
        [(draw(20), draw(n), [-5.0] * n, 1.0 - 2 * (n % 2)) for n in range(5, 100, 7)]
        for _ in range(2)
    ]
    batches = [pack.pack(part, device) for part in parts]
    noise = [0.3 * torch.randn(len(b.target_N), generator=generator).to(device) for b in batches]
    config, found = replace(RECIPES["tiny"](), dtype=dtype, lr=1e-3), {}
    for head in ("triton", "torch", "reference"):
        policy = load_policy(
            random_model, dtype=half, device=device, kernel="torch" if head == "reference" else head
        )
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
        old = [
            train.logprob(policy, b, Objective()) + x for b, x in zip(batches, noise, strict=True)
        ]
        with monkeypatch.context() as patch:
            if head == "reference":
                patch.setattr("drgrpo.model.linear_drgrpo_loss", linear_drgrpo_loss_ref)
            found[head] = train.train_minibatch(
                config,
                policy,
                optimizer,
                [*zip(batches, old, [None] * 2, strict=True)],
                Objective(),
                lr=1e-3,
                check_parity=False,
            )
    want = found.pop("reference")
    assert want["clipped"] > 10 and want["grad_norm"] > 0
    for head, got in found.items():
        for column in ("loss", "grad_norm", "ratio_max", "clipped", "tokens"):
            assert got[column] == pytest.approx(
                want[column], rel=1e-4 if dtype == "float32" else 2e-2
            ), (head, column)


# ---- bad input, through the command line

MATH_ROW = '{"problem": "What is 1 + 1?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--recipe", "tinny"], "unknown recipe 'tinny'"),
        (["--template", "qwen-math"], "qwen_math"),
        (["--train-data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--train-data", "math.jsonl", "--answer-field", "anwser"], "'answer'"),
        (["--train-data", "holes.jsonl"], "no answer"),
        (["--train-data", "math.jsonl", "--max-prompt-tokens", "3"], "no prompt fits"),
        (["--minibatches", "5"], "--minibatches 4 or 8"),
        (["--out", "."], "is not empty and holds no run"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_clear_line_before_any_training(
    random_model, tmp_path, monkeypatch, capsys, extra, message
):
    (tmp_path / "math.jsonl").write_text(MATH_ROW * 3)
    (tmp_path / "holes.jsonl").write_text(
        MATH_ROW + '{"problem": "What is 2 + 2?", "answer": null}\n'
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.cli(["--recipe", "tiny", "--model", random_model, "--out", "run", *extra])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_error_and_shows_no_traceback():
    done = subprocess.run(
        [sys.executable, "train.py", "--recipe", "tinny"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(
        "error: unknown recipe 'tinny'"
    )


def test_overlong_prompts_are_dropped_and_counted(warm_model, tmp_path, capsys):
    rows = [{"problem": "What is 1 + 1?", "answer": "2"}] * 3 + [
        {"problem": "x" * 2000, "answer": "2"}
    ]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"train_data": str(tmp_path / "math.jsonl"), "template": "qwen_math", "eval_data": ""}
    run(small(warm_model, tmp_path / "run", steps=1, **data))
    assert (
        "3 training problems, 1 dropped for a prompt of more than 928 tokens"
        in capsys.readouterr().out
    )


def test_real_math_problems_run_through(warm_model, tmp_path):
    if not SHARED_DATA.exists():
        pytest.skip(f"MATH-12K is not at {SHARED_DATA}")
    rows = run(
        small(
            warm_model,
            tmp_path / "math",
            train_data=str(SHARED_DATA / "train" / "math_12k.jsonl"),
            template="qwen_math",
            eval_data="",
        )
    )
    assert len(rows) == 2 and rows[0]["response_len_mean"] > 1
