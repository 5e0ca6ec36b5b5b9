"""Rewards -> advantages. Here stand the two deletions that turn GRPO into Dr. GRPO.

`grpo_length` and `grpo_std` are Dr. GRPO with one of GRPO's two divisions put back, as in the
paper's ablation (v2, App. C). `dapo` is that paper's group advantage with its token-mean loss. Its
wider clip range is `--clip-high 0.28`.
"""

import torch
from torch import Tensor

DIVIDE_BY_STD = ("grpo", "grpo_std", "dapo")
DIVIDE_BY_LENGTH = ("grpo", "grpo_length")


def group_advantage(reward_PG: Tensor, algo: str) -> Tensor:
    """The advantage of each response, [P, G], from its group's rewards (paper, Fig. 1, App. A)."""
    # Dr. GRPO (1/2): no division by the group's std
    advantage_PG = reward_PG - reward_PG.mean(dim=1, keepdim=True)
    if algo in DIVIDE_BY_STD:  # the unbiased std, as in the paper's code
        advantage_PG = advantage_PG / (reward_PG.std(dim=1, keepdim=True) + 1e-8)
    if algo == "rloo":  # the leave-one-out baseline: App. A
        group = reward_PG.shape[1]
        advantage_PG = advantage_PG * (group / (group - 1))
    return advantage_PG


def token_weight(length_B: Tensor, algo: str, budget: int) -> Tensor:
    """Factor on each response's advantage, [B].

    The kernel always divides by B x budget (Dr. GRPO). Other objectives scale the advantage:
    min(ratio * A, clip(ratio) * A) is homogeneous in A, so a positive factor commutes with it.
    `length_B`: response lengths of one optimizer step, over all processes."""
    length_B = length_B.float()
    if algo in DIVIDE_BY_LENGTH:  # mean over the response's own tokens: the length bias
        return budget / length_B
    if algo == "dapo":  # mean over all tokens
        return torch.full_like(length_B, budget * len(length_B) / length_B.sum().item())
    # Dr. GRPO (2/2): constant normalizer, not response length
    return torch.ones_like(length_B)
