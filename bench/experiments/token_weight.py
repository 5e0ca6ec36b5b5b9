"""How strongly does each objective push one token?

    python -m bench.experiments.token_weight        # seconds, no training

Result: Dr. GRPO weighs every token alike. GRPO weighs a token of the shortest response 750 times
one of the longest, and a token in a nearly solved group 1.51 times one in a half-solved group.

bench/results/token_weight.json and token_weight.png come from commit 3916b3d, on two cores of an
AMD EPYC. The last line printed is the JSON.

The weight is the derivative of the loss by a token's log-prob at the first update of a rollout. It
is read off the gradient of the hidden states that the trainer's own path gives: rewards ->
`group_advantage` -> `plan_updates` -> `linear_drgrpo_loss`. Responses of different length share one
group. Then groups have different shares of right answers. The formula is compared with both.
"""

from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import train
from bench import harness
from bench.harness import RESULTS, command_line, markdown
from drgrpo import distributed
from drgrpo.advantage import group_advantage
from drgrpo.config import RECIPES
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss
from drgrpo.types import Completion, Problem, Rollout

GROUP = 8
BUDGET = 3000  # C, the paper's
LENGTHS = (4, 10, 26, 67, 174, 450, 1165, 3000)  # of one group, log-spaced
VOCABULARY, WIDTH = 64, 16
"""A made-up LM head. Every token of response i is token i, by which it is found again."""


class Objective(NamedTuple):
    """`formula` takes the response's length n, its group's std, the number B of responses and all
    their tokens T."""

    label: str
    color: str
    formula: Callable[[int, float, int, int], float]


PPO, DAPO = "mean per response (PPO code): 1 / (B n)", "mean over tokens (DAPO, verl): 1 / (T std)"
OBJECTIVES = {
    "drgrpo": Objective("Dr. GRPO: 1 / (B C)", "C0", lambda n, std, B, T: 1 / (B * BUDGET)),
    "grpo": Objective("GRPO: 1 / (B n std)", "C3", lambda n, std, B, T: 1 / (B * n * std)),
    "grpo_length": Objective(PPO, "C1", lambda n, std, B, T: 1 / (B * n)),
    "dapo": Objective(DAPO, "C2", lambda n, std, B, T: 1 / (T * std)),
}
"""Paper, Eq. 3, Fig. 1 and App. A. DAPO: Yu et al. 2025, Eq. 8."""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where token_weight.* go")
    args = parser.parse_args()
    result = {"where": harness.provenance()} | measure()
    draw(result, args.out / "token_weight.png")
    print(table(result), harness.write_json(args.out / "token_weight.json", result), sep="\n\n")


def measure() -> dict:
    """Weights per |r - mean| with their formulas, by response length and by the std of a group."""
    half = torch.tensor([[1.0, 0.0] * (GROUP // 2)])
    by_share = torch.tensor([[1.0] * right + [0.0] * (GROUP - right) for right in range(1, GROUP)])
    alike = [[100] * GROUP] * len(by_share)
    last = slice(GROUP - 1, None, GROUP)  # the last response of every group
    distributed.start()
    by_length = {algo: points(algo, half, [LENGTHS]) for algo in OBJECTIVES}
    by_std = {algo: points(algo, by_share, alike)[last] for algo in OBJECTIVES}
    distributed.stop()
    return {"by_length": by_length, "by_std": by_std}


def points(algo: str, reward_PG: Tensor, lengths_PG: list) -> list[dict]:
    """One point per response: the lightest and the heaviest of its tokens, and what the formula
    says."""
    weights = token_weights(algo, reward_PG, lengths_PG)
    tokens, rows = sum(map(sum, lengths_PG)), []
    for p, group in enumerate(lengths_PG):
        std, mean = reward_PG[p].std().item(), reward_PG[p].mean().item()
        for g, length in enumerate(group):
            weight_N, advantage = weights[p * GROUP + g], abs(reward_PG[p, g].item() - mean)
            low, high = weight_N.min().item() / advantage, weight_N.max().item() / advantage
            formula = OBJECTIVES[algo].formula(length, std, reward_PG.numel(), tokens)
            rows.append(dict(length=length, std=std, low=low, high=high, formula=formula))
    return rows


def token_weights(algo: str, reward_PG: Tensor, lengths_PG: list) -> list[Tensor]:
    """|d loss / d log-prob| of every token of each response, through the trainer's path."""
    generator = torch.Generator().manual_seed(0)
    size = dict(prompts_per_step=len(reward_PG), group_size=GROUP, max_new_tokens=BUDGET)
    whole = dict(minibatches=1, tokens_per_microbatch=2**30)
    config = replace(RECIPES["oat_zero_7b"](), algo=algo, **size, **whole)
    rollouts = []
    for i, length in enumerate(length for group in lengths_PG for length in group):
        completion = Completion([i] * length, [0.0] * length, True)
        rollouts.append(Rollout(Problem(i, "", "", [0]), completion, ""))
    advantage_PG = group_advantage(reward_PG, algo)
    [[batch]] = train.plan_updates(config, rollouts, advantage_PG, 1, torch.device("cpu"))
    hidden_ND = torch.randn(len(batch.target_N), WIDTH, generator=generator, requires_grad=True)
    head_VD = torch.randn(VOCABULARY, WIDTH, generator=generator)
    inputs = hidden_ND, head_VD, batch.target_N, batch.advantage_N
    scale = 1 / (config.minibatch_size * config.max_new_tokens)  # as in train.train_minibatch
    linear_drgrpo_loss(*inputs, scale=scale, backend="torch")[0].backward()
    # The gradient is a multiple of d log-prob / d hidden, and the multiple is the weight.
    with torch.no_grad():
        slope_ND = head_VD[batch.target_N] - torch.softmax(hidden_ND @ head_VD.T, -1) @ head_VD
        weight_N = ((hidden_ND.grad * slope_ND).sum(1) / slope_ND.square().sum(1)).abs()
    return [weight_N[batch.target_N == i] for i in range(len(rollouts))]


def table(result: dict) -> str:
    """Markdown: the heaviest over the lightest token, and how far the loss is from the formula."""
    heads = ["objective", "shortest over longest response", "nearly solved over half-solved group"]
    rows = []
    for algo, objective in OBJECTIVES.items():
        by_length, by_std = result["by_length"][algo], result["by_std"][algo]
        length = f"{by_length[0]['low'] / by_length[-1]['low']:.0f} x"
        std = f"{by_std[-1]['low'] / by_std[3]['low']:.2f} x"
        rows.append([objective.label, length, std, f"{worst(by_length + by_std):.0e}"])
    return markdown([*heads, "off the formula"], rows)


def worst(rows: list[dict]) -> float:
    """Largest relative deviation of a token's weight from the formula."""
    return max(abs(p[end] / p["formula"] - 1) for p in rows for end in ("low", "high"))


PANELS = {  # part of the result, what it varies, label
    "by_length": ("length", "response length n (tokens), half of the group right"),
    "by_std": ("std", "std of the group's rewards, responses of 100 tokens"),
}


def draw(result: dict, path: Path) -> None:
    figure, axes = harness.new_figure(1, 2, (11, 3.6))
    sizes = (10, 8, 6, 4)  # so that none hides another
    for axis, (part, (x, label)) in zip(axes, PANELS.items(), strict=True):
        for size, (algo, objective) in zip(sizes, OBJECTIVES.items(), strict=True):
            rows = sorted(result[part][algo], key=lambda row: row[x])
            at, low, formula = (list(map(itemgetter(key), rows)) for key in (x, "low", "formula"))
            axis.plot(at, formula, color=objective.color, lw=1)
            axis.plot(at, low, "o", ms=size, color=objective.color, label=objective.label)
        axis.set(xlabel=label, yscale="log", ylabel="weight of a token / |r - mean r|")
        axis.grid(alpha=0.3)
    axes[0].set_xscale("log")
    axes[0].legend(fontsize=8, title="points: the loss; lines: the formula", title_fontsize=8)
    harness.save_figure(figure, path)


if __name__ == "__main__":
    main()
