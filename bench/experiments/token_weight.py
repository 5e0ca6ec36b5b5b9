"""How strongly does each objective push one token? `python -m bench.experiments.token_weight`
(seconds, no training)

The derivative of the loss by a token's log-prob, at the first update of a rollout, read off the
gradient that the trainer's own path gives: rewards -> `group_advantage` -> `plan_updates` ->
`linear_drgrpo_loss` -> gradient of the hidden states. Once for responses of different length in one
group, once for groups with different shares of right answers; against the formula. Writes
token_weight.json and token_weight.png to bench/results; the last line printed is the JSON.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import train
from bench.harness import ROOT, markdown, provenance, write_json
from drgrpo.advantage import group_advantage
from drgrpo.config import RECIPES
from drgrpo.kernels.linear_drgrpo import linear_drgrpo_loss
from drgrpo.types import Completion, Problem, Rollout

GROUP = 8
BUDGET = 3000  # C, the paper's
LENGTHS = (4, 10, 26, 67, 174, 450, 1165, 3000)  # of one group, log-spaced
VOCABULARY, WIDTH = (
    64,
    16,
)  # of a made-up LM head; every token of response i is token i, by which it is found again


@dataclass(frozen=True)
class Objective:
    """`formula` takes the response's length n, its group's std, the number B of responses and all
    their tokens T."""

    label: str
    color: str
    formula: Callable[[int, float, int, int], float]


OBJECTIVES = {
    "drgrpo": Objective("Dr. GRPO: 1 / (B C)", "C0", lambda n, std, B, T: 1 / (B * BUDGET)),
    "grpo": Objective("GRPO: 1 / (B n std)", "C3", lambda n, std, B, T: 1 / (B * n * std)),
    "grpo_length": Objective(
        "mean per response (PPO code): 1 / (B n)", "C1", lambda n, std, B, T: 1 / (B * n)
    ),
    "dapo": Objective(
        "mean over tokens (DAPO, verl): 1 / (T std)", "C2", lambda n, std, B, T: 1 / (T * std)
    ),
}
"""Paper, Eq. 3, Fig. 1 and App. A; DAPO: Yu et al. 2025, Eq. 8."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results", help="where token_weight.* go"
    )
    args = parser.parse_args()
    result = {"where": provenance()} | measure()
    draw(result, args.out / "token_weight.png")
    line = write_json(args.out / "token_weight.json", result)
    print(table(result), line, sep="\n\n")


def measure() -> dict:
    """Weights per |r - mean| with their formulas, by response length and by the std of a group."""
    half = torch.tensor([[1.0, 0.0] * (GROUP // 2)])
    by_share = torch.tensor([[1.0] * right + [0.0] * (GROUP - right) for right in range(1, GROUP)])
    return {
        "by_length": {algo: points(algo, half, [LENGTHS]) for algo in OBJECTIVES},
        "by_std": {
            algo: points(algo, by_share, [[100] * GROUP] * len(by_share))[GROUP - 1 :: GROUP]
            for algo in OBJECTIVES
        },
    }


def points(algo: str, reward_PG: Tensor, lengths_PG: list) -> list[dict]:
    """One point per response: the lightest and the heaviest of its tokens, and what the formula
    says."""
    weights = token_weights(algo, reward_PG, lengths_PG)
    tokens, found = sum(map(sum, lengths_PG)), []
    for p, group in enumerate(lengths_PG):
        std, mean = reward_PG[p].std().item(), reward_PG[p].mean().item()
        for g, length in enumerate(group):
            low, high = (
                f(weights[p * GROUP + g]).item() / abs(reward_PG[p, g].item() - mean)
                for f in (min, max)
            )
            formula = OBJECTIVES[algo].formula(length, std, reward_PG.numel(), tokens)
            found.append(
                {"length": length, "std": std, "low": low, "high": high, "formula": formula}
            )
    return found


def token_weights(algo: str, reward_PG: Tensor, lengths_PG: list) -> list[Tensor]:
    """|d loss / d log-prob| of every token of each response, through the trainer's path."""
    generator = torch.Generator().manual_seed(0)
    config = replace(
        RECIPES["oat_zero_7b"](),
        algo=algo,
        prompts_per_step=len(reward_PG),
        group_size=GROUP,
        minibatches=1,
        max_new_tokens=BUDGET,
        tokens_per_microbatch=2**30,
    )
    lengths = [length for group in lengths_PG for length in group]
    rollouts = [
        Rollout(Problem(i, "", "", [0]), Completion([i] * length, [0.0] * length, True), "")
        for i, length in enumerate(lengths)
    ]
    advantage_PG = group_advantage(reward_PG, algo)
    [[batch]] = train.plan_updates(config, rollouts, advantage_PG, 1, 0, 1, torch.device("cpu"))
    hidden_ND = torch.randn(len(batch.target_N), WIDTH, generator=generator, requires_grad=True)
    head_VD = torch.randn(VOCABULARY, WIDTH, generator=generator)
    scale = 1 / (config.minibatch_size * config.max_new_tokens)  # as in train.train_minibatch
    loss, _ = linear_drgrpo_loss(
        hidden_ND, head_VD, batch.target_N, batch.advantage_N, scale=scale, backend="torch"
    )
    loss.backward()
    with (
        torch.no_grad()
    ):  # d log-prob / d hidden; the gradient is a multiple of it, and the multiple is the weight
        slope_ND = head_VD[batch.target_N] - torch.softmax(hidden_ND @ head_VD.T, -1) @ head_VD
        weight_N = ((hidden_ND.grad * slope_ND).sum(1) / slope_ND.square().sum(1)).abs()
    return [weight_N[batch.target_N == i] for i in range(len(rollouts))]


def table(result: dict) -> str:
    """Markdown: the heaviest over the lightest token, and how far the loss is from the formula."""
    heads = [
        "objective",
        "shortest over longest response",
        "nearly solved over half-solved group",
        "off the formula",
    ]
    rows = []
    for algo, objective in OBJECTIVES.items():
        by_length, by_std = result["by_length"][algo], result["by_std"][algo]
        ratios = by_length[0]["low"] / by_length[-1]["low"], by_std[-1]["low"] / by_std[3]["low"]
        rows.append(
            [
                objective.label,
                f"{ratios[0]:.0f} x",
                f"{ratios[1]:.2f} x",
                f"{worst(by_length + by_std):.0e}",
            ]
        )
    return markdown(heads, rows)


def worst(found: list[dict]) -> float:
    """Largest relative deviation of a token's weight from the formula."""
    return max(abs(p[end] / p["formula"] - 1) for p in found for end in ("low", "high"))


def draw(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    for axis, key, x, title in (
        (axes[0], "by_length", "length", "response length n (tokens), half of the group right"),
        (axes[1], "by_std", "std", "std of the group's rewards, responses of 100 tokens"),
    ):
        for size, (algo, objective) in zip(
            (10, 8, 6, 4), OBJECTIVES.items(), strict=True
        ):  # so that none hides another
            at, low, formula = zip(
                *sorted((p[x], p["low"], p["formula"]) for p in result[key][algo]), strict=True
            )
            axis.plot(at, formula, color=objective.color, lw=1)
            axis.plot(at, low, "o", ms=size, color=objective.color, label=objective.label)
        axis.set(xlabel=title, yscale="log", ylabel="weight of a token / |r - mean r|")
        axis.grid(alpha=0.3)
    axes[0].set_xscale("log")
    axes[0].legend(fontsize=8, title="points: the loss; lines: the formula", title_fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
