"""Rewards -> advantages. Here stand the two deletions that turn GRPO into Dr. GRPO.

The other objectives differ from Dr. GRPO by a line or two each. docs/objectives.md has the papers.
"""

import math

import torch
from torch import Tensor

from drgrpo.types import Batch, UserError

DIVIDE_BY_STD = ("grpo", "grpo_std", "dapo")
DIVIDE_BY_LENGTH = ("grpo", "grpo_length")
DIVIDE_BY_TOKENS = ("dapo", "lite_ppo", "cispo")
EPS = 1e-8  # a group of equal rewards has no advantage, and not 0 / 0


def group_advantage(reward_PG: Tensor, algo: str, finished_PG: Tensor | None = None) -> Tensor:
    """The advantage of each response, [P, G], from its group's rewards (paper, Fig. 1, App. A).

    `finished_PG`: False for a response that was cut off, which only overlong_mask asks for.
    UserError if `algo` is maxrl and a reward is negative."""
    # Dr. GRPO (1/2): no division by the group's std
    advantage_PG = reward_PG - reward_PG.mean(dim=1, keepdim=True)
    if algo in DIVIDE_BY_STD:  # the unbiased std, as in the paper's code
        advantage_PG = advantage_PG / (reward_PG.std(dim=1, keepdim=True) + EPS)
    if algo == "lite_ppo":  # the std of all rewards of the step
        advantage_PG = advantage_PG / (reward_PG.std() + EPS)
    if algo == "maxrl":  # a rare success weighs more
        check_not_negative(reward_PG)
        advantage_PG = advantage_PG / (reward_PG.mean(dim=1, keepdim=True) + EPS)
    if algo == "rloo":  # the leave-one-out baseline: App. A
        group = reward_PG.shape[1]
        advantage_PG = advantage_PG * (group / (group - 1))
    if algo == "overlong_mask":  # a response that was cut off is compared with, and not trained on
        assert finished_PG is not None, "overlong_mask has to know what was cut off"
        advantage_PG = advantage_PG * finished_PG
    return advantage_PG


def check_not_negative(reward_PG: Tensor) -> None:
    """UserError if a reward is negative."""
    if (reward_PG < 0).any():
        raise UserError(
            f"--algo maxrl divides by a group's mean reward, and a reward is "
            f"{reward_PG.min().item():g}; use a reward that is never negative, or another --algo"
        )


def token_weight(length_B: Tensor, algo: str, budget: int) -> Tensor:
    """Factor on each response's advantage, [B].

    The kernel always divides by B x budget (Dr. GRPO). Other objectives scale the advantage:
    min(ratio * A, clip(ratio) * A) is homogeneous in A, so a positive factor commutes with it.
    `length_B`: response lengths of one optimizer step, over all processes."""
    length_B = length_B.float()
    if algo in DIVIDE_BY_LENGTH:  # mean over the response's own tokens: the length bias
        return budget / length_B
    if algo in DIVIDE_BY_TOKENS:  # mean over all tokens
        return torch.full_like(length_B, budget * len(length_B) / length_B.sum().item())
    # Dr. GRPO (2/2): constant normalizer, not response length
    return torch.ones_like(length_B)


def mismatch_weight(batch: Batch, algo: str, cap: float) -> Tensor:
    """Factor on each token's advantage, [N], from what trainer and sampler differ by.

    The factor is r = exp(old - sampler) where r is in [1 / cap, cap], and 0 elsewhere. `icepop`
    takes r of the token. `sequence_mask` takes r of the whole response, the product over its
    tokens."""
    assert batch.old_logprob_N is not None, "a mask compares the trainer's log-probs"
    log_ratio_N = batch.old_logprob_N - batch.sampler_logprob_N
    if algo == "sequence_mask":
        sequence_N = torch.searchsorted(batch.cu_seqlens[1:], batch.row_N, right=True)
        sum_S = log_ratio_N.new_zeros(len(batch.cu_seqlens) - 1)
        log_ratio_N = sum_S.index_add(0, sequence_N, log_ratio_N)[sequence_N]
    return torch.where(log_ratio_N.abs() <= math.log(cap), log_ratio_N.exp(), 0.0)
