"""Carry-over: a step does not wait for its last responses. They go on in the next step.

A group is trained in the step in which its last response ends. Until then it waits whole, and its
complete responses keep their grades. Every token keeps the log-prob that it was drawn with, so that
the ratio corrects for the weights that have changed since.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor

from drgrpo.types import Completion, Grade, Problem, Rollout


@dataclass
class CarryOver:
    """Which responses a step leaves open, and the groups that wait for them.

    share: of the responses that an engine draws in a step, how many it may leave open. steps: how
    often a response is carried at most. The step after that waits for it. last_step: of the run,
    which leaves nothing open. pending: the groups that wait, of all processes, response by
    response. It is the same on every process."""

    share: float
    steps: int
    last_step: int
    pending: list[Rollout] = field(default_factory=list)

    def go_on(self) -> list[Rollout]:
        """The responses of the groups that wait. In the new step all of their tokens are stale."""
        return [replace(rollout, stale=rollout.length) for rollout in self.pending]

    def enough(self, left: Collection[Rollout], count: int, step: int) -> bool:
        """Whether an engine that draws `count` responses in this step may stop now and leave those
        of `left` open."""
        share = self.share if step < self.last_step else 0.0
        return len(left) <= share * count and all(step - r.step < self.steps for r in left)

    def split(self, rollouts: list[Rollout], reward_PG: Tensor) -> tuple[list[Rollout], Tensor]:
        """The groups that are complete, with their rewards [P', G]. The others are pending."""
        open_PG = torch.tensor([r.completion.open for r in rollouts]).view_as(reward_PG)
        waits_P = open_PG.any(dim=1)
        waits = waits_P.repeat_interleave(reward_PG.shape[1]).tolist()
        self.pending = list(compress(rollouts, waits))
        return list(compress(rollouts, map(not_, waits))), reward_PG[~waits_P]


def to_row(rollout: Rollout) -> dict[str, Any]:
    """A pending response as JSON. Its problem is named by `id`."""
    kept = {"seed": rollout.seed, "step": rollout.step, "text": rollout.text}
    parts = {"completion": to_dict(rollout.completion), "grade": to_dict(rollout.grade)}
    return {"problem": rollout.problem.id} | kept | parts


def from_row(row: dict[str, Any], problems: dict[int, Problem]) -> Rollout:
    """The inverse. KeyError if its problem is not among `problems`."""
    parts = {"completion": Completion(**row["completion"]), "grade": Grade(**row["grade"])}
    return Rollout(**row | parts | {"problem": problems[row["problem"]]})


def to_dict(item: Completion | Grade) -> dict[str, Any]:
    """Its fields, not copied: a response has thousands of tokens."""
    return {f.name: getattr(item, f.name) for f in fields(item)}
