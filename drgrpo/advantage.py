"""Rewards -> advantages. The two deletions that turn GRPO into Dr. GRPO are the two tagged lines
here.

`grpo_length` and `grpo_std` are Dr. GRPO with one of GRPO's two divisions put back: the paper
deletes both at once, and `make study` tells them apart. `dapo` is that paper's group advantage and
token-mean loss; its wider clip is --clip-high 0.28.
"""

import torch
from torch import Tensor

DIVIDE_BY_STD = ("grpo", "grpo_std", "dapo")
DIVIDE_BY_LENGTH = ("grpo", "grpo_length")


def group_advantage(reward_PG: Tensor, algo: str) -> Tensor:
    """The advantage of each response, [P, G], from the rewards of its group (paper, Fig. 1 and App.
    A)."""
    advantage_PG = reward_PG - reward_PG.mean(
        dim=1, keepdim=True
    )  # Dr. GRPO (1/2): no division by the group's std
    if algo in DIVIDE_BY_STD:
        advantage_PG = advantage_PG / (
            reward_PG.std(dim=1, keepdim=True) + 1e-8
        )  # unbiased std, as the reference has it
    if algo == "rloo":
        group = reward_PG.shape[1]
        advantage_PG = advantage_PG * (group / (group - 1))  # the leave-one-out baseline: App. A
    return advantage_PG


def token_weight(length_B: Tensor, algo: str, budget: int) -> Tensor:
    """What each response's advantage is multiplied by before the one kernel divides every token by
    B * budget, [B].

    min(ratio * A, clip(ratio) * A) is homogeneous in A, so the weights of other losses fit into the
    advantage. `length_B`: response lengths of one optimizer step over all processes."""
    length_B = length_B.float()
    if algo in DIVIDE_BY_LENGTH:
        return budget / length_B  # mean over the response's own tokens: the length bias
    if algo == "dapo":
        return torch.full_like(
            length_B, budget * len(length_B) / length_B.sum().item()
        )  # mean over all tokens
    return torch.ones_like(length_B)  # Dr. GRPO (2/2): constant normalizer, not response length
