"""The loop as a whole: it learns, and what should change time only changes time only."""

import json
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from conftest import ROOT, SHARED_DATA
from drgrpo import data, distributed, pack, parity
from drgrpo.config import RECIPES, Config
from drgrpo.engine_torch import TorchEngine
from drgrpo.grade import Grade
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss_ref
from drgrpo.model import Objective, Policy, load_policy
from drgrpo.pack import Sequence
from drgrpo.rollout import Sampler, sample_seed
from drgrpo.run import checkpoint, folder, report, summary
from drgrpo.run.files import append_jsonl, read_jsonl
from drgrpo.run.guard import NonFinite
from drgrpo.run.log import Log
from drgrpo.types import Batch, Completion, ParityError, Problem, Rollout, Sampling, UserError
from runs import assert_close_run, assert_same_run, metrics, run, small

CPU = torch.device("cpu")


# ---- one optimizer step


def micro(model: str, out, **changes) -> Config:
    """Two optimizer steps a step, on two responses each of four tokens."""
    settings = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4, "eval_data": ""}
    return small(model, out, **settings | changes)


def load(model: str, **changes) -> tuple[Config, Policy, torch.optim.Optimizer]:
    """The policy of a config, and an optimizer that follows the gradient itself."""
    config = micro(model, "unused", **changes)
    policy, _, _ = train.load_policies(config, model, CPU)
    return config, policy, torch.optim.SGD(policy.parameters(), lr=1.0)


def responses(policy: Policy, *advantages: float, gap: float = 0.0) -> Batch:
    """One response of ten tokens for each advantage. The sampler's log-probs are the policy's less
    `gap`."""
    prompt, tokens = [1, 2, 3], list(range(10, 20))
    sequences = [
        Sequence(prompt, [i, *tokens[1:]], [0.0] * 10, a) for i, a in enumerate(advantages)
    ]
    batch = pack.pack(sequences)
    batch.sampler_logprob_N = policy.logprob(batch) - gap
    return batch


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3], ids=["clipped", "not clipped"])
def test_an_update_follows_the_sum_over_micro_batches_divided_by_b_times_c(
    random_model, group_of_one, max_grad_norm
):
    config, policy, optimizer = load(random_model, max_grad_norm=max_grad_norm)
    batches = [responses(policy, 1.0, -0.5), responses(policy, 0.25)]
    for _ in range(2):  # the second update must not see the gradient of the first
        losses = [policy.loss(batch, scale=1 / (2 * 4))[0] for batch in batches]
        gradient = flat(torch.autograd.grad(sum(losses), list(policy.parameters())))
        before = flat(policy.parameters())
        update = train.train_minibatch(config, policy, optimizer, batches, lr=0.5)
        norm = gradient.norm().item()
        assert update.grad_norm == pytest.approx(norm, rel=1e-4) and update.applied
        expected = before - 0.5 * gradient * min(1, max_grad_norm / norm)
        torch.testing.assert_close(flat(policy.parameters()), expected, atol=1e-6, rtol=0)


def test_the_world_size_turns_the_average_of_gradients_into_a_sum(
    random_model, group_of_one, monkeypatch
):
    updates = []
    for world in (1, 2):
        config, policy, optimizer = load(random_model)
        batches = [responses(policy, 1.0)]
        with monkeypatch.context() as patch:
            patch.setattr(dist, "get_world_size", lambda world=world: world)
            updates.append(train.train_minibatch(config, policy, optimizer, batches, lr=0.0))
    one, two = updates
    assert two.grad_norm == pytest.approx(2 * one.grad_norm) and two.loss == pytest.approx(one.loss)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_an_update_that_is_not_finite_changes_no_weight_and_is_no_parity_error(
    random_model, group_of_one, monkeypatch, fault
):
    config, policy, optimizer = load(random_model)
    batch, before = responses(policy, 1.0), flat(policy.parameters())
    if fault == "loss":
        batch.advantage_N, batch.sampler_logprob_N = torch.full((2, 10), torch.nan)
    else:
        nan = torch.tensor(torch.nan)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: nan)
    update = train.train_minibatch(config, policy, optimizer, [batch], 1.0, check_parity=True)
    assert not update.applied and torch.equal(flat(policy.parameters()), before)
    assert all(p.grad is None for p in policy.parameters())


def test_parity_is_the_mean_gap_of_a_token_and_is_checked_where_asked(random_model, group_of_one):
    config, policy, optimizer = load(random_model)
    rounding, wrong = responses(policy, *[1.0] * 5, gap=5e-5), responses(policy, 1.0, gap=5e-4)
    for batch, check_parity in ((rounding, True), (wrong, False)):
        train.train_minibatch(config, policy, optimizer, [batch], 0.0, check_parity)
    with pytest.raises(ParityError):
        train.train_minibatch(config, policy, optimizer, [wrong], 0.0, check_parity=True)


def test_a_token_of_older_weights_does_not_count_in_the_parity_gate(random_model, group_of_one):
    config, policy, optimizer = load(random_model)
    batch = responses(policy, 1.0, gap=5e-4)
    batch.fresh_N[:] = False
    update = train.train_minibatch(config, policy, optimizer, [batch], 0.0, check_parity=True)
    assert (update.tokens, update.fresh, update.gap_sum, update.gap_max) == (10, 0, 0, 0)
    batch.fresh_N[-1] = True  # the mean is that of this token
    with pytest.raises(ParityError, match=r"0\.0005 nats on average"):
        train.train_minibatch(config, policy, optimizer, [batch], 0.0, check_parity=True)


def test_an_update_of_other_than_the_usual_responses_is_divided_by_their_number(
    random_model, group_of_one
):
    norms = []
    for B in (None, 2, 3):  # the config says 2
        config, policy, optimizer = load(random_model)
        batch = responses(policy, 1.0)
        norms.append(train.train_minibatch(config, policy, optimizer, [batch], 0.0, B=B).grad_norm)
    assert norms[0] == norms[1] == pytest.approx(1.5 * norms[2])


def test_each_side_of_the_clip_is_its_own(random_model, group_of_one):
    clipped = []
    for low, high in ((0.2, 0.2), (0.2, 0.99), (0.99, 0.2), (0.99, 0.99)):
        config, policy, optimizer = load(random_model, clip_low=low, clip_high=high)
        batch = responses(policy, -1.0, 1.0, 1.0)
        shift_N = 0.5 * torch.tensor([-1.0] * 10 + [1.0] * 20)  # ratios of 0.61 and 1.65
        batch.old_logprob_N = batch.sampler_logprob_N - shift_N
        clipped.append(train.train_minibatch(config, policy, optimizer, [batch], 0.0).clipped)
    assert clipped == [30, 10, 20, 0]


def test_truncated_importance_sampling_weighs_every_token(random_model, group_of_one):
    """Sampler and trainer agree here, so that a cap of one half halves the gradient."""
    norms = []
    for cap in (0.0, 0.5, 2.0):
        config, policy, optimizer = load(random_model, tis_cap=cap)
        batch = responses(policy, 1.0, -0.5)
        batch.old_logprob_N = batch.sampler_logprob_N
        norms.append(train.train_minibatch(config, policy, optimizer, [batch], 0.0).grad_norm)
    assert norms == pytest.approx([norms[0], norms[0] / 2, norms[0]], rel=1e-3)


def test_the_ratio_divides_by_what_the_config_names(random_model, group_of_one):
    config, policy, _ = load(random_model)
    old = {}
    for name in ("sampler", "recompute", "none"):
        first, second = (responses(policy, 1.0, gap=0.1) for _ in range(2))
        changed = replace(config, minibatches=1, old_logprob=name)
        train.add_logprobs(changed, policy, None, [[first], [second]])
        old[name] = first.old_logprob_N, second.old_logprob_N
    sampler_N = first.sampler_logprob_N
    assert old["none"] == (None, None) and old["recompute"][0] is None
    torch.testing.assert_close(old["recompute"][1], sampler_N + 0.1)
    assert all(torch.equal(old_N, sampler_N) for old_N in old["sampler"])


def test_a_mask_weighs_tokens_by_what_trainer_and_sampler_differ_by(random_model, group_of_one):
    settings = {"algo": "icepop", "old_logprob": "recompute", "tis_cap": 1.05}  # 0.049 nats
    config, policy, optimizer = load(random_model, **settings)
    first, second = responses(policy, 1.0, gap=0.01), responses(policy, 1.0, gap=0.1)
    train.add_logprobs(config, policy, None, [[first], [second]])
    torch.testing.assert_close(first.advantage_N, torch.full_like(first.advantage_N, 0.01).exp())
    assert not second.advantage_N.any()
    masked = [train.train_minibatch(config, policy, optimizer, [b], 0.0) for b in (first, second)]
    assert [update.masked for update in masked] == [0, len(second.advantage_N)]


def test_the_learning_rate_rises_linearly_and_then_stays():
    config = replace(RECIPES["tiny"](), lr=0.5, warmup_steps=4)
    rates = [train.learning_rate(config, update) for update in range(6)]
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert train.learning_rate(replace(config, warmup_steps=0), 0) == 0.5


def test_policy_reference_and_optimizer_are_those_of_the_config(random_model, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **options: compiled.append(block))
    settings = {"clip_low": 0.1, "clip_high": 0.3, "tis_cap": 2.0, "temperature": 0.7}
    settings |= {"kl_coef": 0.01, "beta1": 0.5, "beta2": 0.6, "weight_decay": 0.25}
    settings |= {"kernel": "triton", "checkpointing": "full", "compile": True}
    config = micro(random_model, "unused", **settings)
    policy, reference, optimizer = train.load_policies(config, random_model, CPU)
    assert policy.objective == Objective(0.1, 0.3, 2.0, 0.7, 0.01) and policy.kernel == "triton"
    assert policy.lm.is_gradient_checkpointing and not reference.lm.is_gradient_checkpointing
    assert compiled == list(policy.lm.model.layers)
    assert not any(p.requires_grad for p in reference.parameters())
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.5, 0.6) and group["weight_decay"] == 0.25
    plain = replace(config, tis_cap=0.0, kl_coef=0.0)
    policy, reference, _ = train.load_policies(plain, random_model, CPU)
    assert policy.objective.tis_cap is None and reference is None
    with pytest.raises(UserError, match="--attention varlen needs CUDA"):
        train.load_policies(replace(config, attention="varlen"), random_model, CPU)


def plan(step: int = 1, **changes) -> list[list[Batch]]:
    """The plan of four responses of 2 to 8 tokens, the first without advantage."""
    config = micro("unused", "unused", **changes)
    problem, lengths = Problem(0, "", "", [1, 2]), (2, 4, 6, 8)
    completions = [Completion([n] * n, [-1.0] * n, True) for n in lengths]
    rollouts = [Rollout(problem, completion, "") for completion in completions]
    advantage_PG = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    return train.plan_updates(config, rollouts, advantage_PG, step, CPU)


def advantages(batches: list[Batch]) -> dict[int, float]:
    """Length of a response -> the advantage of its tokens."""
    pairs = [(batch.target_N.tolist(), batch.advantage_N.tolist()) for batch in batches]
    return {n: a for ns, values in pairs for n, a in zip(ns, values, strict=True)}


def test_a_plan_weighs_every_response_and_skips_those_without_advantage(group_of_one):
    assert [advantages(batches) for batches in plan(minibatches=1)] == [{4: 1.0, 6: 2.0, 8: 3.0}]
    kept = plan(minibatches=1, drop_zero_advantage=False)
    assert advantages(kept[0]) == {2: 0.0, 4: 1.0, 6: 2.0, 8: 3.0}
    (by_length,) = plan(minibatches=1, algo="grpo_length")  # the budget is 4 tokens
    assert advantages(by_length) == pytest.approx({4: 1.0, 6: 2 * 4 / 6, 8: 3 * 4 / 8})


def test_a_plan_keeps_the_budget_of_tokens_and_deals_anew_in_every_step(group_of_one):
    (batches,) = plan(minibatches=1, tokens_per_microbatch=14)  # with prompts 6, 8 and 10 tokens
    assert sorted(sorted(advantages([batch])) for batch in batches) == [[4, 6], [8]]
    deals = {tuple(map(tuple, map(advantages, plan(step)))) for step in range(1, 9)}
    others = {tuple(map(tuple, map(advantages, plan(1, seed=seed)))) for seed in range(1, 9)}
    assert len(deals) > 1 and len(others) > 1
    assert all(len(deal) == 2 for deal in deals | others)


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


# ---- the order of things, on a model that knows nothing


def note_call(monkeypatch, notes: list, owner, name: str, describe) -> None:
    """Add `describe(arguments)` to the notes at every call of `owner.name`, which still runs."""
    original = getattr(owner, name)

    def noted(*args, **kwargs):
        notes.append(describe(*args, **kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)


def describe_update(config, policy, optimizer, batches, lr, check_parity, B) -> str:
    has_old = all(batch.old_logprob_N is not None for batch in batches)
    has_ref = all(batch.ref_logprob_N is not None for batch in batches)
    return f"update lr={lr:g} gate={check_parity} old={has_old} ref={has_ref}"


@pytest.fixture
def notes(monkeypatch) -> list:
    """What a run does, in order: the phases of the watchdog, and the calls of the sampler, of the
    optimizer step, of the evaluation and of the checkpoint."""
    notes = []

    def watchdog(rank, minutes):
        notes.append(f"watch {minutes:g} minutes")
        return SimpleNamespace(
            enter=lambda phase: notes.append(f"{phase}:"), rest=lambda: notes.append("rest")
        )

    monkeypatch.setattr(train, "Watchdog", watchdog)
    for name in ("sync", "sleep", "close"):
        note_call(monkeypatch, notes, TorchEngine, name, lambda *args, name=name: name)
    calls = (
        (train, "train_minibatch", describe_update),
        (train, "evaluate_sets", lambda *args: f"{args[4]} x T={args[5].temperature:g}"),
        (NonFinite, "check", lambda self, ok, batches, step, i: f"finite {ok} at {step}.{i}"),
        (distributed, "any_rank", lambda flag: f"stopping {flag}"),
        (checkpoint, "write", lambda config, now, *args: f"write {now.step}"),
        (checkpoint, "commit", lambda config, step: f"commit {step}"),
        (report, "refresh", lambda log: "report"),
        (Log, "track", lambda log, *args: f"track {args[0]} {args[1]!r}"),
        (Log, "step", lambda log, row, *args: f"row {row['step']}"),
    )
    for owner, name, describe in calls:
        note_call(monkeypatch, notes, owner, name, describe)
    monkeypatch.setattr(summary, "finish", lambda *args: notes.append("summary"))  # a second
    return notes


ORDER = """
watch 7 minutes | sync | track False '' | 1 x T=0 | 3 x T=1
rollout: | grade: | pack: | sleep | old:
train: | update lr=0.125 gate=True old=True ref=True | finite True at 1.0
update lr=0.25 gate=False old=True ref=True | finite True at 1.1
sync: | sync | stopping False | eval: | save: | row 1
rollout: | grade: | pack: | sleep | old:
train: | update lr=0.375 gate=True old=True ref=True | finite True at 2.0
update lr=0.5 gate=False old=True ref=True | finite True at 2.1
sync: | sync | stopping False | eval: | 1 x T=0 | 3 x T=1 | save: | write 2 | row 2 | commit 2
report | finish: | sleep | summary | close | rest
"""


def test_a_run_does_its_work_in_this_order(random_model, tmp_path, notes):
    settings = {"lr": 0.5, "warmup_steps": 4, "kl_coef": 0.1}
    settings |= {"eval_samples": 3, "watchdog_minutes": 7.0}
    run(micro(random_model, tmp_path / "run", **settings))
    assert notes == re.split(r" \| |\n", ORDER.strip())


def test_another_config_does_not_touch_the_run(random_model, tmp_path, notes):
    config = micro(random_model, tmp_path / "run")
    folder.open_run(config, 0, {})
    message = r"another config \(algo='drgrpo' there, 'grpo' now\).*--out .*run-grpo"
    with pytest.raises(UserError, match=message):
        train.main(replace(config, algo="grpo"))
    assert not notes


def test_a_step_samples_its_own_problems_with_seeds_of_its_own(
    random_model, tmp_path, monkeypatch, notes
):
    calls = []
    note_call(monkeypatch, calls, TorchEngine, "generate", lambda *args: args[1:3])
    template = {"template": "r1", "temperature": 0.7, "seed": 5}
    run(micro(random_model, tmp_path / "run", **template))
    problems = data.load_problems("arithmetic")
    training_calls = [call for call in calls if len(call[0]) == 4]
    assert len(training_calls) == 2
    for step, (requests, sampling) in enumerate(training_calls, 1):
        chosen = data.step_problems(problems, step, 2, seed=5)
        expected = [sample_seed(5, step, p.id, k) for p in chosen for k in range(2)]
        assert [r.seed for r in requests] == expected
        assert sampling == Sampling(
            max_new_tokens=4, stop_token_ids=(256,), temperature=0.7, stop=("</answer>",)
        )


def test_a_resumed_run_goes_on_with_its_step_and_its_hours(
    random_model, tmp_path, monkeypatch, notes
):
    monkeypatch.setattr(checkpoint, "resume", lambda *args: checkpoint.Progress(1, 2.0))
    (row,) = run(micro(random_model, tmp_path / "run"))
    assert row["step"] == 2 and 2 < row["hours_used"] < 2.01
    assert notes.index("rollout:") < notes.index("1 x T=0"), "step 0 was evaluated again"
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())
    assert start["resumed_step"] == 1


def test_a_time_limit_saves_and_stops_and_the_same_command_resumes(
    random_model, tmp_path, capsys, notes
):
    config = micro(random_model, tmp_path / "run", max_hours=1e-9)
    assert len(run(config)) == 1
    assert "stopping after step 1: --max-hours 1e-09" in capsys.readouterr().out
    assert (tmp_path / "run" / "hf" / "config.json").exists()
    assert len(run(config)) == 2
    assert "stopping" not in capsys.readouterr().out, (
        "after the last step nothing is left to resume"
    )


def test_only_rank_0_prints_and_records(random_model, tmp_path, monkeypatch, capsys):
    distributed.start()
    monkeypatch.setattr(distributed, "start", lambda *args: (1, 1, CPU))
    # The checkpoint asks the group, whose only rank is 0.
    monkeypatch.setattr(checkpoint.model_card, "write", lambda *args: None)
    train.main(micro(random_model, tmp_path / "run"))
    assert capsys.readouterr().out == ""
    written = [p.name for p in (tmp_path / "run").rglob("*") if "partial" not in str(p)]
    assert written == ["checkpoints"]


def test_a_dry_run_puts_the_sampler_to_sleep_first(random_model, tmp_path, notes):
    train.main(micro(random_model, tmp_path / "run", dry_run=True, tokens_per_microbatch=1024))
    assert (
        notes == ["watch 60 minutes", "sync", "sleep", "close"] and not (tmp_path / "run").exists()
    )


# ---- whole runs


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
    page = (ROOT / "docs" / "metrics.md").read_text().partition("## A line of samples.jsonl")[2]
    cells = " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))
    assert samples[0].keys() == set(re.findall(r"`(\w+)`", cells))
    assert all("".join(row["pieces"]) == row["response"] for row in samples)
    evals = read_jsonl(out / "eval.jsonl")
    expected = [(0, 0.0), (0, 1.0), (2, 0.0), (2, 1.0)]
    assert [(r["step"], r["temperature"]) for r in evals] == expected
    columns = {
        "benchmark",
        "accuracy",
        "interval",
        "n",
        "len_correct",
        "len_incorrect",
        "truncated_frac",
    }
    assert columns <= evals[0].keys() and evals[0]["template"] == "arithmetic"
    (start,) = json.loads((out / "run.json").read_text())
    assert start["resumed_step"] == 0 and start["torch"] == torch.__version__
    for figure in ("curves.png", "time.png"):
        assert (out / "plots" / figure).read_bytes().startswith(b"\x89PNG")
    assert "Step 2 of 2" in (out / "report.html").read_text()
    assert "after 2 steps" in (out / "hf" / "README.md").read_text()


def test_the_same_seed_gives_the_same_run_bit_for_bit(base, warm_model, tmp_path):
    run(small(warm_model, tmp_path / "again"))
    assert_same_run(base[0], tmp_path / "again")


def test_another_seed_gives_another_run(base, warm_model, tmp_path):
    rows = run(small(warm_model, tmp_path / "seed1", seed=1))
    assert rows[0]["tokens"] != base[1][0]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("minibatches", [1, 8])
def test_the_first_update_of_a_step_needs_no_pass_for_old_log_probs(
    warm_model, tmp_path, monkeypatch, minibatches
):
    """With a pass for every update the metrics and weights are the same to the bit."""
    settings = {"minibatches": minibatches, "old_logprob": "recompute", "tis_cap": 2.0}
    passes, counts = [], []
    note_call(monkeypatch, passes, Policy, "logprob", lambda *args: "pass")

    def every_update(config, policy, reference, plan):
        for batch in chain(*plan):
            batch.old_logprob_N = policy.logprob(batch)

    for function in (train.add_logprobs, every_update):
        monkeypatch.setattr(train, "add_logprobs", function)
        run(config := small(warm_model, tmp_path / function.__name__, **settings))
        counts.append(len(passes))
    fewer = counts[1] - 2 * counts[0]
    assert fewer == config.steps  # a micro-batch is an update here
    assert_same_run(tmp_path / "add_logprobs", tmp_path / "every_update")


@pytest.mark.parametrize(
    "changes",
    [
        {"drop_zero_advantage": False},
        {"tokens_per_microbatch": 200},
        {"checkpointing": "full"},
        pytest.param({"sampler_batch": 7}, marks=pytest.mark.slow),
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


@pytest.mark.parametrize("algo", ["grpo_length", "grpo_std"])
def test_the_other_algorithms_run_and_differ_in_the_update_only(base, warm_model, tmp_path, algo):
    rows = run(small(warm_model, tmp_path / algo, algo=algo, steps=1))
    assert rows[0]["tokens"] == base[1][0]["tokens"]
    assert rows[0]["grad_norm"] != pytest.approx(base[1][0]["grad_norm"], rel=0.02)


@pytest.mark.slow
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
    with pytest.raises(ParityError, match="disagree on fresh samples"):
        run(small(warm_model, tmp_path / "stale"))
    assert len(metrics(tmp_path / "stale")) == 1, "the step on stale samples was trained on"


def test_the_last_sync_is_checked_too(warm_model, tmp_path, monkeypatch):
    original, synced = TorchEngine.sync, []

    def all_but_the_last(self, named_weights):
        synced.append(1)
        if len(synced) < 3:  # at the start, after step 1
            original(self, named_weights)

    monkeypatch.setattr(TorchEngine, "sync", all_but_the_last)
    with pytest.raises(ParityError, match="disagree on fresh samples"):
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
        ("--out math.jsonl", "math.jsonl is no folder to write to"),
        ("--out math.jsonl/run", "math.jsonl is no folder to write to"),
        ("--model ./no/such/model", "--model ./no/such/model holds no config.json"),
        ("--tp 3", "--tp 3 does not divide the 1 processes"),
        ("--dp-replicate 2", "--dp-replicate 2 does not divide the 1 processes"),
        ("--seed -1", "--seed -1 must be 0 or a positive number"),
        ("--clip-low -0.1", "--clip-low -0.1 must be 0 or a positive number"),
        ("--beta2 1", "--beta2 1.0 must be at least 0 and below 1"),
        ("--max-grad-norm 0", "--max-grad-norm 0.0 must be a positive number"),
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


def test_a_mistake_that_shows_late_is_one_line_too(tmp_path, monkeypatch, capsys):
    command = f"train.py --recipe tiny --tp 3 --out {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --tp 3 does not divide the 1 processes\n"


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
