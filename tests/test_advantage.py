"""The properties that define Dr. GRPO and its relatives, against closed forms (paper, Fig. 1 and
App. A)."""

from itertools import chain
from typing import get_args, get_type_hints

import pytest
import torch

from drgrpo import pack
from drgrpo.advantage import group_advantage, mismatch_weight, token_weight
from drgrpo.config import MASKS, Config
from drgrpo.types import UserError

ALGORITHMS = get_args(get_type_hints(Config)["algo"])
REWARD_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
FINISHED_PG = torch.ones(3, 4, dtype=torch.bool)


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


def test_lite_ppo_divides_by_the_std_of_all_rewards_of_the_step():
    advantage_PG = group_advantage(REWARD_PG, "lite_ppo")
    std = (sum((r - 7 / 12) ** 2 for r in [1] * 7 + [0] * 5) / 11) ** 0.5
    torch.testing.assert_close(advantage_PG[0], torch.tensor([0.75, -0.25, -0.25, -0.25]) / std)
    torch.testing.assert_close(advantage_PG[2], torch.tensor([0.5, 0.5, -0.5, -0.5]) / std)
    assert (group_advantage(torch.ones(3, 4), "lite_ppo") == 0).all()


def test_maxrl_divides_by_the_group_s_mean_reward():
    advantage_PG = group_advantage(REWARD_PG, "maxrl")
    expected = torch.tensor([[3.0, -1, -1, -1], [0, 0, 0, 0], [1, 1, -1, -1]])
    torch.testing.assert_close(advantage_PG, expected)
    assert (group_advantage(torch.zeros(3, 4), "maxrl") == 0).all()  # nothing solved: no 0 / 0


def test_maxrl_refuses_a_negative_reward():
    with pytest.raises(UserError, match=r"--algo maxrl .* a reward is -0\.5; use a reward"):
        group_advantage(REWARD_PG - 0.5, "maxrl")


def test_the_overlong_mask_compares_with_a_truncated_response_and_does_not_train_on_it():
    finished_PG = FINISHED_PG.clone()
    finished_PG[0, 1] = finished_PG[2, 0] = False
    advantage_PG = group_advantage(REWARD_PG, "overlong_mask", finished_PG)
    expected = torch.tensor([[0.75, 0, -0.25, -0.25], [0, 0, 0, 0], [0, 0.5, -0.5, -0.5]])
    torch.testing.assert_close(advantage_PG, expected)
    for algo in set(ALGORITHMS) - {"overlong_mask"}:
        truncated = group_advantage(REWARD_PG, algo, finished_PG)
        assert torch.equal(truncated, group_advantage(REWARD_PG, algo)), "others train on it"


@pytest.mark.parametrize("algo", sorted(set(ALGORITHMS) - {"maxrl"}))
def test_adding_a_constant_to_all_rewards_changes_nothing(algo):
    torch.testing.assert_close(
        group_advantage(REWARD_PG + 3, algo, FINISHED_PG),
        group_advantage(REWARD_PG, algo, FINISHED_PG),
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


@pytest.mark.parametrize("algo", ["dapo", "lite_ppo", "cispo"])
def test_the_loss_is_a_mean_over_all_tokens(algo):
    length_B, budget = torch.tensor([4, 32, 96]), 96
    weight_B = token_weight(length_B, algo, budget)
    torch.testing.assert_close(
        (weight_B * length_B).sum() / (len(length_B) * budget), torch.tensor(1.0)
    )
    assert len(set(weight_B.tolist())) == 1


@pytest.mark.parametrize("algo", ["rloo", "maxrl", *MASKS, "overlong_mask"])
def test_the_others_keep_dr_grpo_s_constant(algo):
    assert token_weight(torch.tensor([1, 10, 96]), algo, 96).tolist() == [1, 1, 1]


def mismatched(*differences):
    """A batch of responses. `differences` holds trainer minus sampler, in nats, of their tokens."""
    sequences = [pack.Sequence([5], [7] * len(d), [-1.0] * len(d), 1.0) for d in differences]
    batch = pack.pack(sequences)
    batch.old_logprob_N = batch.sampler_logprob_N + torch.tensor([*chain(*differences)])
    return batch


def test_icepop_weighs_a_token_by_its_ratio_within_bounds_and_drops_it_beyond():
    batch = mismatched([0.1, 0.8, -0.8], [0.6, 0.0])
    weight_N = mismatch_weight(batch, "icepop", 2.0)  # ln 2 is 0.69
    torch.testing.assert_close(weight_N, torch.tensor([0.1, -9e9, -9e9, 0.6, 0.0]).exp())


def test_the_sequence_mask_takes_the_ratio_of_the_whole_response():
    batch = mismatched([0.8, -0.9, 0.4], [0.4, 0.4], [-0.5, -0.3], [0.6])
    weight_N = mismatch_weight(batch, "sequence_mask", 2.0)
    expected = torch.tensor([0.3, 0.3, 0.3, -9e9, -9e9, -9e9, -9e9, 0.6]).exp()
    torch.testing.assert_close(weight_N, expected)


@pytest.mark.parametrize("algo", MASKS)
def test_a_mask_of_an_empty_micro_batch_is_empty(algo):
    batch = pack.pack([])
    batch.old_logprob_N = batch.sampler_logprob_N
    assert mismatch_weight(batch, algo, 2.0).shape == (0,)


def test_inputs_are_not_changed():
    before = REWARD_PG.clone()
    for algo in ALGORITHMS:
        group_advantage(REWARD_PG, algo, FINISHED_PG)
    assert torch.equal(before, REWARD_PG)
