"""What `metrics.jsonl` holds of a step. docs/metrics.md explains each column."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from drgrpo.config import Config
from drgrpo.grade import Grader
from drgrpo.run.checkpoint import Progress
from drgrpo.run.guard import MIN_LOSS_SCALE
from drgrpo.run.log import Stopwatch
from drgrpo.types import Batch, Grade, Rollout

TIMES = (
    *("seconds", "gb", "tflops", "hours_used"),
    *("tokens_per_s", "rollout_tokens_per_s", "train_tokens_per_s"),
)
"""Columns in which a run that is repeated differs. On a CPU nothing else does."""


class Tally:
    """Statistics of one optimizer step, kept on the device until all micro-batches are done."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.peaks: list[Tensor] = []

    def add(self, batch: Batch, loss: Tensor, stats: dict[str, Tensor]) -> None:
        """One micro-batch: its loss, and the statistics of its response tokens."""
        loss = loss.detach() / dist.get_world_size()
        # Stale tokens do not count: the sampler drew them with other weights than it has now.
        gap_N = (stats["logprob"] - batch.sampler_logprob_N).abs() * batch.fresh_N
        count, clipped = loss.new_tensor(len(gap_N)), (stats["clipped"] != 0).sum()
        masked = (batch.advantage_N == 0).sum()
        kl = stats["kl"].sum() if "kl" in stats else loss.new_zeros(())
        sums = [count, batch.fresh_N.sum(), gap_N.sum(), clipped, masked, loss, kl]
        self.sums.append(torch.stack(sums).double())
        peaks = loss.new_zeros(2, dtype=torch.float64)
        if len(gap_N):
            peaks = torch.stack([gap_N.max(), stats["log_ratio"].max().exp()]).double()
        self.peaks.append(peaks)

    def reduce(self) -> dict[str, float]:
        """Over all micro-batches and processes. The one place that waits for the device."""
        sums = torch.stack(self.sums).sum(0).cpu()
        peaks = torch.stack(self.peaks).amax(0).cpu()
        dist.all_reduce(sums)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        summed = ("tokens", "fresh", "gap_sum", "clipped", "masked", "loss", "kl_sum")
        names = (*summed, "gap_max", "ratio_max")
        return dict(zip(names, [*sums.tolist(), *peaks.tolist()], strict=True))


class Update(NamedTuple):
    """One optimizer step over all processes. `gap`: |trainer - sampler| in nats per fresh token.
    `applied`: False if loss or gradient was not finite and the step was skipped. `loss_scale`: that
    of float16, or 1."""

    tokens: float
    fresh: float
    gap_sum: float
    clipped: float
    masked: float
    loss: float
    kl_sum: float
    gap_max: float
    ratio_max: float
    grad_norm: float
    applied: bool
    lr: float
    loss_scale: float = 1.0

    @property
    def failed(self) -> bool:
        """Skipped, and a smaller loss scale does not help. An overflow above the floor is normal in
        float16: it is how the scale is found."""
        return not self.applied and self.loss_scale <= MIN_LOSS_SCALE


def step_row(
    config: Config,
    now: Progress,
    rollouts: list[Rollout],
    reward_PG: Tensor,
    advantage_PG: Tensor,
    updates: list[Update],
    timer: Stopwatch,
    grader: Grader,
) -> dict[str, Any]:
    """One line of metrics.jsonl.

    `rollouts` have their grades. A response is right if math is a component of the reward and finds
    it right, or, without math, if its reward is positive. Statistics of responses cover all of
    them. A token without advantage cannot be clipped, so `clip_frac` covers all tokens too.
    `ratio_max`, `kl` and parity cover the tokens trained on. A
    number that is not finite becomes None, because JSON has neither NaN nor infinity."""
    rewards, lengths = reward_PG.flatten().tolist(), [r.length for r in rollouts]
    pairs = list(zip(rollouts, rewards, strict=True))
    right = [rollout.length for rollout, reward in pairs if is_right(rollout, reward)]
    wrong = [rollout.length for rollout, reward in pairs if not is_right(rollout, reward)]
    applied, seconds = [update for update in updates if update.applied], timer.read()
    trained, sampled = sum(column(updates, "tokens")), sum(lengths)
    fresh, stale = sum(column(updates[:1], "fresh")), sum(r.stale for r in rollouts)
    drawn = sampled - stale + sum(r.length - r.stale for r in now.pending)
    logprobs = [sum(rollout.completion.logprobs) for rollout in rollouts]
    truncated = [not rollout.completion.finished for rollout in rollouts]
    row: dict[str, Any] = {
        "step": now.step,
        "algo": config.algo,
        "reward_mean": mean(rewards),
        **reward_columns([rollout.grade for rollout in rollouts]),
        "response_len_mean": mean(lengths),
        "response_len_correct": mean(right),
        "response_len_incorrect": mean(wrong),
        "truncated_frac": mean(truncated),
        "zero_adv_frac": (advantage_PG == 0).float().mean().item(),
        "entropy": ratio(-sum(logprobs), sampled),
        "clip_frac": ratio(sum(column(updates, "clipped")), sampled),
        "ratio_max": max(column(updates, "ratio_max")) if trained else None,
        "kl": ratio(sum(column(updates, "kl_sum")), trained),
        "loss": mean(column(applied, "loss")),
        "grad_norm": mean(column(applied, "grad_norm")),
        "skipped_updates": sum(column(updates, "failed")),
        "lr": updates[-1].lr if updates else None,
        "parity_mean": ratio(sum(column(updates[:1], "gap_sum")), fresh),
        "parity_max": updates[0].gap_max if fresh else None,
        "tokens": drawn,
        "tokens_trained": int(trained),
        "tokens_per_s": drawn / seconds["total"],
        "rollout_tokens_per_s": drawn / seconds["rollout"],
        "train_tokens_per_s": trained / seconds["train"],
        "seconds": rounded(seconds, 4),
        "gb": rounded(timer.gb, 3),
        "grader_timeout": grader.timeouts,
        "grader_error": grader.errors,
        "hours_used": now.hours_used,
    }
    if config.dtype == "float16":
        row["loss_scale"] = updates[-1].loss_scale if updates else None
        row["overflowed_updates"] = len(updates) - len(applied) - sum(column(updates, "failed"))
    if config.masks_mismatch:
        row["masked_frac"] = ratio(sum(column(updates, "masked")), trained)
    if config.carry_over:
        row["responses"] = len(rollouts)
        row["carried"] = sum(rollout.completion.open for rollout in now.pending)
        row["waiting"] = len(now.pending) - row["carried"]
        row["stale_frac"] = ratio(stale, sampled)
    return {name: finite_or_none(value) for name, value in row.items()}


def is_right(rollout: Rollout, reward: float) -> bool:
    return (rollout.grade.components.get("math", reward) or 0.0) > 0


def reward_columns(grades: list[Grade]) -> dict[str, Any]:
    """What the reward is made of: the accuracy of all responses, truncated ones too, the share
    without an answer, the mean of each component, and the calls of reward functions that failed."""
    names = grades[0].components if grades else ()
    row: dict[str, Any] = {f"reward/{name}": mean_of(grades, name) for name in names}
    row["accuracy"] = mean([grade.score for grade in grades])
    row["no_answer_frac"] = mean([not grade.parsed for grade in grades])
    row["reward_error"] = sum(list(grade.components.values()).count(None) for grade in grades)
    return row


def mean_of(grades: list[Grade], name: str) -> float:
    """The mean of a component. A call that failed counts as 0."""
    return fmean(grade.components[name] or 0.0 for grade in grades)


def column(updates: list[Update], name: str) -> list[float]:
    return [getattr(update, name) for update in updates]


def finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean(values: Sequence[float]) -> float | None:
    """None without values."""
    return fmean(values) if values else None


def ratio(part: float, whole: float) -> float | None:
    """None of nothing."""
    return part / whole if whole else None


def rounded(by_phase: dict[str, float], digits: int) -> dict[str, float]:
    return {phase: round(value, digits) for phase, value in by_phase.items()}
