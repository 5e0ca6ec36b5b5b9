"""The bounds on what dropped rows cost hold on random rows and cannot be improved; the script's own arithmetic.

    pytest tests/test_row_sparsity.py
"""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import row_sparsity
from bench.row_sparsity import (
    ASSUMED,
    TARGETS,
    THRESHOLDS,
    accumulate,
    allowed,
    bound_dhidden,
    bound_dweight,
    drop,
    gemm_saved,
    head_share,
    make_rows,
    model_row,
    moments,
)


def random_rows(seed: int, N: int = 60, D: int = 5, V: int = 11):
    """Of all kinds: logits from flat to certain, likely and unlikely targets, advantages of both signs, some of them 0, and
    hidden states that share a direction, as real ones do."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=rng) + 3 * torch.randn(D, generator=rng)
    hidden *= 10 ** (2 * torch.rand(N, 1, generator=rng) - 1)
    weight = torch.randn(V, D, generator=rng) + torch.randn(D, generator=rng)
    target = torch.multinomial(torch.softmax(hidden @ weight.T, 1), 1, generator=rng)[:, 0]
    target = torch.where(torch.rand(N, generator=rng) < 0.1, torch.randint(V, (N,), generator=rng), target)
    g = torch.randn(N, generator=rng) * (torch.rand(N, generator=rng) < 0.8)
    return make_rows(hidden, weight, target, g)


def aligned_pair(logit: float = 3.0):
    """One row kept, one dropped that takes some of it back, and only two tokens: the worst case of both bounds."""
    hidden, weight = torch.tensor([[1.0], [logit]]), torch.tensor([[1.0], [0.0]])
    rows = make_rows(hidden, weight, torch.tensor([0, 0]), torch.tensor([-1.0, 0.5]))
    return rows, torch.tensor([False, True])


def test_rows_are_the_gradient_of_the_loss():
    rows = random_rows(0)
    logits = (rows.hidden_ND @ rows.weight_VD.T).requires_grad_()
    logprob = logits.log_softmax(1).gather(1, rows.target_N[:, None])[:, 0]
    (expected,) = torch.autograd.grad((rows.g_N * logprob).sum(), logits)
    torch.testing.assert_close(rows.dz_NV, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rows.miss_N, -torch.expm1(logprob.detach()), rtol=1e-9, atol=1e-14)


def test_a_certain_token_keeps_its_digits():
    rows = make_rows(torch.tensor([[1.0]]), torch.tensor([[60.0], [0.0]]), torch.tensor([0]), torch.tensor([1.0]))
    assert rows.miss_N.item() == pytest.approx(math.exp(-60), rel=1e-12)
    assert rows.dz_NV.abs().max().item() == pytest.approx(math.exp(-60), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_rows_score_and_reach_are_at_least_its_norms(seed):
    rows = random_rows(seed)
    part = rows.dz_NV.norm(dim=1) * rows.hidden_ND.norm(dim=1)
    assert (part <= rows.score_N * (1 + 1e-12)).all() and (part >= rows.score_N / math.sqrt(2) * (1 - 1e-12)).all()
    assert ((rows.dz_NV @ rows.weight_VD).norm(dim=1) <= rows.reach_N * (1 + 1e-12)).all()
    apart = torch.cdist(rows.weight_VD, rows.weight_VD)[rows.target_N].amax(1) * rows.g_N.abs() * rows.miss_N
    assert (apart <= rows.reach_N * (1 + 1e-9)).all() and (apart >= rows.reach_N / 4).any()


@pytest.mark.parametrize("seed", range(40))
def test_no_set_of_rows_costs_more_than_its_bounds(seed):
    rows = random_rows(seed)
    rng = torch.Generator().manual_seed(seed)
    sets = [rows.score_N < t * rows.score_N.max() for t in THRESHOLDS]
    sets += [torch.rand(len(rows.g_N), generator=rng) < share for share in (0.05, 0.3, 0.9)]
    certified = 0
    for dropped in sets:
        found = drop(rows, dropped)
        certified += found["dweight_bound"] is not None
        assert found["dweight_bound"] is None or found["dweight"] <= found["dweight_bound"] + 1e-12
        assert found["dhidden"] <= found["dhidden_bound"] + 1e-12
    assert certified >= 3


def test_two_tokens_and_opposed_rows_reach_both_bounds():
    found = drop(*aligned_pair())
    assert found["dweight"] == pytest.approx(found["dweight_bound"], rel=1e-9)
    assert found["dhidden"] == pytest.approx(found["dhidden_bound"], rel=1e-9)
    assert found["dweight"] > 0.05 and found["alignment"] == pytest.approx(1.0)


def test_rows_that_all_point_the_same_way_reach_the_sum():
    """What the triangle inequality allows for does occur, so no better bound follows from the scores alone."""
    n = 16
    hidden, weight = torch.full((n + 1, 1), 6.0), torch.tensor([[1.0], [0.0]])
    hidden[0] = 0.1
    rows = make_rows(hidden, weight, torch.zeros(n + 1, dtype=torch.long), torch.ones(n + 1))
    dropped = torch.arange(n + 1) > 0
    lost = (rows.dz_NV[dropped].T @ rows.hidden_ND[dropped]).norm().item()
    assert lost == pytest.approx(rows.score_N[dropped].sum().item(), rel=1e-9)
    assert drop(rows, dropped)["alignment"] == pytest.approx(math.sqrt(n), rel=1e-9)


def test_nothing_dropped_or_nothing_there_costs_nothing():
    rows = random_rows(1)
    for dropped in (torch.zeros(len(rows.g_N), dtype=torch.bool), rows.g_N == 0):  # clipped tokens
        found = drop(rows, dropped)
        for key in ("dweight", "dweight_bound", "dhidden", "dhidden_bound", "square_share"):
            assert found[key] <= 1e-15, key
    assert found["dropped"] > 0 and found["gemm_saved"] == pytest.approx(2 / 3 * found["dropped"])


def test_bounds_by_hand():
    assert bound_dweight(torch.tensor([1.0, 2.0]), 9.0) == pytest.approx(3 / 6)
    assert bound_dweight(torch.tensor([1.0, 2.0]), 3.0) == math.inf
    assert bound_dhidden(torch.tensor([3.0, 4.0]), 12.0) == pytest.approx(5 / 13)
    assert bound_dhidden(torch.zeros(0), 0.0) == 0.0
    assert gemm_saved(0.75) == pytest.approx(0.5)


@pytest.mark.parametrize("error", [*TARGETS, 0.3])
def test_what_is_certified_to_be_allowed_is_allowed(error):
    rows = random_rows(2, N=400)
    found = allowed(rows, error)
    count = round(found["certified"] * 400)
    dropped = torch.zeros(400, dtype=torch.bool)
    dropped[rows.score_N.argsort()[:count]] = True
    assert drop(rows, dropped)["dweight_bound"] <= error
    assert 0 < found["certified"] <= found["actual"] + 1 / 200 <= 1 + 1 / 200
    dropped[rows.score_N.argsort()[: round(found["actual"] * 400)]] = True
    assert drop(rows, dropped)["dweight"] <= error


def test_an_error_that_repeats_does_not_average_out():
    same = accumulate([random_rows(3)] * 4, threshold=1e-1)
    assert same["dropping, all batches"] == pytest.approx(same["dropping, one batch"])
    assert same["bf16, all batches"] == pytest.approx(same["bf16, one batch"]) and 1e-4 < same["bf16, one batch"] < 1e-2


@pytest.mark.parametrize("name", ASSUMED)
def test_assumed_distributions(name):
    """The moments are those of tokens drawn from the distribution, and so are the errors that follow from them."""
    shares = [piece[0] for piece in moments(ASSUMED[name])]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    rng = torch.Generator().manual_seed(0)
    n, edges = 200_000, torch.tensor([1.0, *THRESHOLDS], dtype=torch.float64)
    piece = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=rng)
    low, high = edges[(piece + 1).clamp(max=len(THRESHOLDS))], edges[piece.clamp(max=len(THRESHOLDS))]
    q = low * (high / low) ** torch.rand(n, generator=rng, dtype=torch.float64)
    for i, threshold in enumerate(THRESHOLDS[:4]):
        row, gone = model_row(name, i, n), q < threshold
        assert row["dropped"] == pytest.approx(gone.double().mean().item(), abs=0.005)
        assert row["independent"] == pytest.approx((math.sqrt(2) * q[gone].norm() / q[~gone].norm()).item(), rel=0.05)
        assert row["aligned"] == pytest.approx((math.sqrt(2) * q[gone].sum() / q[~gone].norm()).item(), rel=0.05)
        assert row["independent"] < row["aligned"]


def test_the_heads_share_of_a_step():
    """Qwen2.5's parameters: 6.525 and 1.310 billion below the head, 0.545 and 0.233 in it."""
    assert head_share("7B") == pytest.approx(0.545 / (0.545 + 6.525), abs=1e-3)
    assert head_share("1.5B") == pytest.approx(0.233 / (0.233 + 1.310), abs=1e-3)


def test_the_command_from_rollouts_to_json(random_model, tmp_path, monkeypatch, capsys):
    for name, value in {"PROMPTS": 2, "GROUP": 4, "BUDGET": 12}.items():
        monkeypatch.setattr(row_sparsity, name, value)
    out = tmp_path / "new" / "out.json"
    monkeypatch.setattr(sys, "argv", ["", "--model", random_model, "--batches", "2", "--out", str(out)])
    with pytest.raises(SystemExit, match="no response of batch 1 has an advantage"):  # a random model solves nothing
        row_sparsity.main()

    monkeypatch.setattr(row_sparsity, "grade", lambda text, *_: SimpleNamespace(score=float(len(text) % 2)))
    rollout = row_sparsity.rollout

    def finished(*args):
        found = rollout(*args)
        return [replace(r, text="?" * (i % 3), completion=replace(r.completion, finished=True)) for i, r in enumerate(found)]

    monkeypatch.setattr(row_sparsity, "rollout", finished)
    row_sparsity.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text(), parse_constant=pytest.fail)  # neither NaN nor Infinity
    found = result["measured"][random_model]
    assert len(found["batches"]) == 2 and found["accumulated"]["threshold"] == 1e-3
    for batch in found["batches"]:
        dropped = [row["dropped"] for row in batch["thresholds"]]
        assert dropped == sorted(dropped, reverse=True) and batch["n"] <= 2 * 4 * 12
        assert all(1e-4 < error < 1e-2 for error in batch["bf16"].values())
        for row in batch["thresholds"]:
            assert row["dweight_bound"] is None or row["dweight"] <= row["dweight_bound"]
            assert row["dhidden"] <= row["dhidden_bound"]
