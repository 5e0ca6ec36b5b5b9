"""The properties that define Dr. GRPO and its relatives, against closed forms (paper, Fig. 1 and
App. A)."""

from typing import get_args, get_type_hints

import pytest
import torch

from drgrpo.advantage import group_advantage, token_weight
from drgrpo.config import Config

ALGORITHMS = get_args(get_type_hints(Config)["algo"])
REWARD_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])


def test_drgrpo_is_reward_minus_group_mean():
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0], [0.5, 0.5, -0.5, -0.5]])
    torch.testing.assert_close(group_advantage(REWARD_PG, "drgrpo"), expected)


def test_grpo_divides_by_the_unbiased_std():
    advantage_PG = group_advantage(REWARD_PG, "grpo")
    with_ddof_1 = torch.tensor([0.75, -0.25, -0.25, -0.25]) / 0.5
    torch.testing.assert_close(advantage_PG[0], with_ddof_1)
    assert (advantage_PG[1] == 0).all()  # a group of equal rewards has no gradient, not 0 / 0


def test_rloo_is_the_leave_one_out_baseline():
    advantage_PG = group_advantage(REWARD_PG, "rloo")
    for p, g in ((0, 0), (0, 2), (2, 3)):
        others = torch.cat([REWARD_PG[p, :g], REWARD_PG[p, g + 1 :]])
        torch.testing.assert_close(advantage_PG[p, g], REWARD_PG[p, g] - others.mean())


@pytest.mark.parametrize("algo", ["grpo_std", "dapo"])
def test_the_std_term_alone_is_grpo_s_advantage(algo):
    assert torch.equal(group_advantage(REWARD_PG, algo), group_advantage(REWARD_PG, "grpo"))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_adding_a_constant_to_all_rewards_changes_nothing(algo):
    torch.testing.assert_close(
        group_advantage(REWARD_PG + 3, algo), group_advantage(REWARD_PG, algo)
    )


def test_drgrpo_weighs_a_token_the_same_in_short_and_long_responses():
    assert token_weight(torch.tensor([1, 10, 96]), "drgrpo", 96).tolist() == [1, 1, 1]


def test_grpo_weighs_a_token_by_one_over_its_response_length():
    length_B, budget = torch.tensor([4, 32, 96]), 96
    torch.testing.assert_close(
        token_weight(length_B, "grpo", budget) / budget, 1 / length_B.float()
    )


def test_each_single_term_keeps_the_other_half_of_dr_grpo():
    length_B = torch.tensor([4, 32, 96])
    assert torch.equal(
        group_advantage(REWARD_PG, "grpo_length"), group_advantage(REWARD_PG, "drgrpo")
    )
    assert torch.equal(
        token_weight(length_B, "grpo_length", 96), token_weight(length_B, "grpo", 96)
    )
    assert torch.equal(token_weight(length_B, "grpo_std", 96), token_weight(length_B, "drgrpo", 96))


def test_dapo_makes_the_loss_a_mean_over_all_tokens():
    length_B, budget = torch.tensor([4, 32, 96]), 96
    weight_B = token_weight(length_B, "dapo", budget)
    torch.testing.assert_close(
        (weight_B * length_B).sum() / (len(length_B) * budget), torch.tensor(1.0)
    )
    assert len(set(weight_B.tolist())) == 1


def test_inputs_are_not_changed():
    before = REWARD_PG.clone()
    for algo in ALGORITHMS:
        group_advantage(REWARD_PG, algo)
    assert torch.equal(before, REWARD_PG)
