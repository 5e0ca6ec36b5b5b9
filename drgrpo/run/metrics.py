"""What `metrics.jsonl` and `samples.jsonl` say of a step. README has the glossary."""

from statistics import fmean

from torch import Tensor

from drgrpo.evaluation.scores import mean
from drgrpo.types import Rollout


def step_row(
    step: int,
    algo: str,
    rollouts: list[Rollout],
    reward_PG: Tensor,
    advantage_PG: Tensor,
    updates: list[dict],
    seconds: dict[str, float],
) -> dict:
    """Statistics of responses cover all of them. A token without advantage cannot be clipped, so
    `clip_frac` does too; `ratio_max`, `kl` and parity cover the tokens that were trained on."""
    reward_B, length_B = reward_PG.flatten().tolist(), [r.length for r in rollouts]
    right = [n for n, reward in zip(length_B, reward_B, strict=True) if reward > 0]
    wrong = [n for n, reward in zip(length_B, reward_B, strict=True) if reward <= 0]
    trained, first, sampled = sum(u["tokens"] for u in updates), updates[0], sum(length_B)
    applied = [u for u in updates if u["applied"]]
    return {
        "step": step,
        "algo": algo,
        "reward_mean": fmean(reward_B),
        "response_len_mean": fmean(length_B),
        "response_len_correct": mean(right),
        "response_len_incorrect": mean(wrong),
        "truncated_frac": fmean(not r.completion.finished for r in rollouts),
        "zero_adv_frac": (advantage_PG == 0).float().mean().item(),
        "entropy": -sum(sum(r.completion.logprobs) for r in rollouts) / sampled,
        "clip_frac": sum(u["clipped"] for u in updates) / sampled,
        "ratio_max": max(u["ratio_max"] for u in updates) if trained else None,
        "kl": sum(u["kl_sum"] for u in updates) / trained if trained else None,
        "loss": mean([u["loss"] for u in applied]),
        "grad_norm": mean([u["grad_norm"] for u in applied]),
        "skipped_updates": len(updates) - len(applied),
        "lr": updates[-1]["lr"],
        "parity_mean": first["gap_sum"] / first["tokens"] if first["tokens"] else None,
        "parity_max": first["gap_max"] if first["tokens"] else None,
        "tokens": sampled,
        "tokens_trained": int(trained),
        "tokens_per_s": sampled / seconds["total"],
        "rollout_tokens_per_s": sampled / seconds["rollout"],
        "train_tokens_per_s": trained / seconds["train"],
        "seconds": {phase: round(s, 4) for phase, s in seconds.items()},
    }


def sample_rows(step: int, rollouts: list[Rollout], reward_PG: Tensor, count: int) -> list[dict]:
    """The first sample of each of the first `count` prompts."""
    reward_B, group = reward_PG.flatten().tolist(), reward_PG.shape[1]
    return [
        {
            "step": step,
            "problem": r.problem.question,
            "answer": r.problem.answer,
            "response": r.text,
            "reward": reward,
            "tokens": r.length,
            "finished": r.completion.finished,
        }
        for r, reward in list(zip(rollouts, reward_B, strict=True))[::group][:count]
    ]
