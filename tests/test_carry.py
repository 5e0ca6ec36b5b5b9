"""Responses that a step leaves open go on in the next one; no group is torn, lost or trained
twice."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from drgrpo import distributed
from drgrpo.carry import CarryOver, from_row, to_row
from drgrpo.rollout import Known, Sampler, with_grades
from drgrpo.types import BLANK, Completion, Grade, Problem, Rollout, Sampling
from runs import run, small

BUDGET, PROMPTS, GROUP = 12, 4, 2


def response(step=1, open=False, tokens=2, problem=0) -> Rollout:
    completion = Completion([5] * tokens, [-0.5] * tokens, finished=not open, open=open)
    return Rollout(Problem(problem, "", "1", [1]), completion, "text", step=step)


# ---- when a step may end


def test_a_step_ends_once_a_share_of_its_responses_is_left():
    carry = CarryOver(0.25, steps=2, last_step=9)
    assert not carry.enough([response()] * 3, count=8, step=1)
    assert carry.enough([response()] * 2, count=8, step=1)
    assert not carry.enough([response()] * 2, count=7, step=1), "a share is not rounded up"


def test_a_step_waits_for_a_response_that_was_carried_often_enough():
    carry = CarryOver(0.25, steps=2, last_step=9)
    assert carry.enough([response(step=2)], count=8, step=3)
    assert not carry.enough([response(step=1), response(step=3)], count=8, step=3)


def test_the_last_step_of_a_run_leaves_nothing_open():
    carry = CarryOver(0.25, steps=2, last_step=9)
    assert not carry.enough([response(step=9)], count=8, step=9)
    assert carry.enough([], count=8, step=9)


# ---- groups


def test_a_group_with_an_open_response_waits_whole():
    carry = CarryOver(0.25, steps=2, last_step=9)
    groups = [response(problem=0), response(problem=0)]
    groups += [response(problem=1), response(problem=1, open=True)]
    groups += [response(problem=2), response(problem=2)]
    rewards = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    complete, reward_PG = carry.split(groups, rewards)
    assert [r.problem.id for r in complete] == [0, 0, 2, 2]
    assert reward_PG.tolist() == [[0, 1], [4, 5]]
    assert carry.pending == groups[2:4]
    assert [r.stale for r in carry.go_on()] == [2, 2], "all that earlier steps drew is stale"


def test_a_step_in_which_no_group_is_complete_trains_on_nothing():
    carry = CarryOver(0.25, steps=2, last_step=9)
    complete, reward_PG = carry.split([response(), response(open=True)], torch.zeros(1, 2))
    assert complete == [] and reward_PG.shape == (0, 2)


def test_a_pending_response_survives_json():
    grade = Grade(1.0, parsed=True, reward=0.1 + 0.2, components={"math": 1.0, "f": None})
    problem = Problem(7, "q", "a", [1, 2], columns={"level": 3})
    completion = Completion([5, 6], [-0.1, -1 / 3], finished=False, open=True)
    rollout = Rollout(problem, completion, "text \ufffd", grade, seed=2**62 + 1, step=4)
    for kept in (rollout, replace(rollout, completion=BLANK, text="")):
        row = json.loads(json.dumps(to_row(kept), allow_nan=False))
        assert from_row(row, {7: problem}) == kept
    with pytest.raises(KeyError):
        from_row(to_row(rollout), {8: problem})


# ---- steps of a sampler, on an engine whose lengths are known


class Script:
    """An engine that draws a token of every response at a time. `length` is that of a seed."""

    def __init__(self, length):
        self.length, self.drew, self.tokens = length, [], 0

    def generate(self, requests, sampling, on_finish, enough):
        completions, unfinished = [r.drawn for r in requests], set(range(len(requests)))
        while unfinished and not enough():
            for i in sorted(unfinished):
                n = len(completions[i].token_ids) + 1
                self.tokens += 1
                finished = n == self.length(requests[i].seed)
                over = finished or n == sampling.max_new_tokens
                completions[i] = Completion(list(range(n)), [-1.0] * n, finished, open=not over)
                if over:
                    unfinished.remove(i)
                    on_finish(i, completions[i])
        self.drew.append((len(requests), len(unfinished)))
        return completions


class Graders:
    def __init__(self):
        self.graded = []

    def grade(self, rollout):
        self.graded.append(rollout.seed)
        return Known(Grade(1.0, parsed=True, reward=float(rollout.length)))


def walk(tokenizer, patch, length, share, carry_steps, steps, world=1, tp=1):
    """The groups trained in each step, the engines and the graders, of `world` processes."""
    engines, graders = [Script(length) for _ in range(world)], [Graders() for _ in range(world)]
    carry = CarryOver(share, carry_steps, steps)  # every process has the same
    sampling = Sampling(max_new_tokens=BUDGET, stop_token_ids=())
    patch.setattr(dist, "get_world_size", lambda: world)
    trained = []
    for step in range(1, steps + 1):
        problems = [Problem(step * 100 + i, "", "", [1]) for i in range(PROMPTS)]
        parts = []
        for rank in range(world):
            patch.setattr(dist, "get_rank", lambda rank=rank: rank)
            sampler = Sampler(engines[rank], tokenizer, seed=0, tp=tp)
            asked = (problems, GROUP, sampling, step, graders[rank], carry)
            rollouts = with_grades(*sampler.rollout(*asked))
            pairs = [(r, r.grade.reward) for r in rollouts]
            parts.append([pairs[i : i + GROUP] for i in range(0, len(pairs), GROUP)])
        patch.setattr(distributed, "gather_lists", lambda _, parts=parts: parts)
        rollouts, reward_PG = carry.split(*sampler.gather([], [], GROUP))
        assert reward_PG.flatten().tolist() == [r.length for r in rollouts], "its own reward"
        trained.append([rollouts[i : i + GROUP] for i in range(0, len(rollouts), GROUP)])
    assert not carry.pending, "nothing is left at the end of a run"
    return trained, engines, graders


def check(trained, engines, graders, length, share, carry_steps, tp=1):
    """What holds for every mix of lengths."""
    steps = range(1, len(trained) + 1)
    groups = [
        (step, group) for step, groups in zip(steps, trained, strict=True) for group in groups
    ]
    ids = sorted(group[0].problem.id for _, group in groups)
    assert ids == [step * 100 + i for step in steps for i in range(PROMPTS)], "all of them, once"
    for step, responses in groups:
        assert len({(r.problem.id, r.step) for r in responses}) == 1 and len(responses) == GROUP
        assert len({r.seed for r in responses}) == GROUP
        assert step - responses[0].step <= carry_steps
        for r in responses:
            assert r.length == min(length(r.seed), BUDGET)
            assert r.completion.finished == (length(r.seed) <= BUDGET)
            assert r.step < step or r.stale == 0
            assert r.completion.token_ids == list(range(r.length))
    for engine, grader in zip(engines, graders, strict=True):
        assert len(grader.graded) == len(set(grader.graded)), "a response is graded once"
        assert all(left <= share * drawn for drawn, left in engine.drew)
    lengths = [r.length for _, responses in groups for r in responses]
    assert sum(engine.tokens for engine in engines) == tp * sum(lengths), "no token is drawn twice"


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, BUDGET + 3), min_size=1, max_size=7),
    share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
    carry_steps=st.integers(1, 3),
    steps=st.integers(1, 5),
    processes=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
)
def test_every_group_is_trained_once_whole_and_in_time(
    tokenizer, lengths, share, carry_steps, steps, processes
):
    def length(seed):
        return lengths[seed % len(lengths)]

    with pytest.MonkeyPatch.context() as patch:
        done = walk(tokenizer, patch, length, share, carry_steps, steps, *processes)
    check(*done, length, share, carry_steps, tp=processes[1])


HOSTILE = {
    "all at the budget": lambda seed: BUDGET + 1,
    "all stop at once": lambda seed: 1,
    "a few at the budget": lambda seed: BUDGET + 1 if seed % 8 == 0 else 2,
}


@pytest.mark.parametrize("mix", HOSTILE)
def test_hostile_lengths(tokenizer, monkeypatch, mix):
    done = walk(tokenizer, monkeypatch, HOSTILE[mix], 0.25, 2, 6)
    check(*done, HOSTILE[mix], 0.25, 2)
    trained, (engine,), _ = done
    if mix != "a few at the budget":  # they end together: nothing is left, and nothing waits
        assert {len(groups) for groups in trained} == {PROMPTS}
    else:
        assert any(left for _, left in engine.drew[:-1])


def test_processes_that_share_an_engine_stop_together(tokenizer, monkeypatch):
    _, engines, _ = walk(tokenizer, monkeypatch, HOSTILE["a few at the budget"], 0.25, 2, 4, 2, 2)
    assert engines[0].drew == engines[1].drew and any(left for _, left in engines[0].drew)


# ---- whole runs


def settings_of(**changes) -> dict:
    return {"carry_over": 0.25, "steps": 4, "eval_samples": 0} | changes


@pytest.mark.slow
def test_a_run_trains_on_every_response_and_counts_every_token(warm_model, tmp_path):
    """The parity gate looks at every step and lets it pass, whatever the stale tokens' gap is."""
    rows = run(small(warm_model, tmp_path / "run", **settings_of(lr=3e-3)))
    assert sum(row["responses"] for row in rows) == 4 * 64
    assert all(0 < row["carried"] <= 0.25 * (64 + row["carried"]) for row in rows[:3])
    assert rows[0]["stale_frac"] == 0 and all(row["stale_frac"] > 0 for row in rows[1:])
    assert rows[3]["carried"] == rows[3]["waiting"] == 0
    trained = sum(row["responses"] * row["response_len_mean"] for row in rows)
    assert sum(row["tokens"] for row in rows) == pytest.approx(trained)
    assert all(row["parity_max"] < 1e-4 for row in rows if row["parity_max"] is not None)


@pytest.mark.slow
def test_a_step_that_completes_no_group_makes_no_update(warm_model, tmp_path, capsys):
    """Some of the 64 responses have ended, but neither group of 32."""
    changes = {"carry_over": 0.95, "carry_steps": 1, "prompts_per_step": 2, "group_size": 32}
    rows = run(small(warm_model, tmp_path / "run", **settings_of(**changes)))
    first = rows[0]
    assert (first["responses"], first["tokens_trained"]) == (0, 0) and first["tokens"] > 0
    assert first["carried"] + first["waiting"] == 64 and first["waiting"] > 0
    assert first["reward_mean"] is None and first["lr"] is None and first["loss"] is None
    assert "step    1/4  reward -  len -" in capsys.readouterr().out
    assert sum(row["responses"] for row in rows) == 4 * 64 and rows[1]["tokens_trained"] > 0
