"""Problems -> rollouts: tokenize, sample a group of responses for each, decode, start grading."""

import hashlib
import math
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drgrpo import distributed
from drgrpo.carry import CarryOver
from drgrpo.data import overlap
from drgrpo.engine import Engine
from drgrpo.grade import Grader, Grading
from drgrpo.model import max_positions
from drgrpo.templates import Template, encode
from drgrpo.types import (
    BLANK,
    Completion,
    Grade,
    ParityError,
    Problem,
    Request,
    Rollout,
    Sampling,
    UserError,
)

Item = TypeVar("Item")


def longest_prompt(model: str, most: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may have: `most`, or what a response of `max_new_tokens` leaves of the
    model's positions. UserError if that is nothing."""
    positions = max_positions(model)
    check_budget(max_new_tokens, positions)
    return min(most, positions - max_new_tokens)


def check_budget(max_new_tokens: int, positions: int) -> None:
    """UserError if a response of `max_new_tokens` leaves no position for a prompt."""
    if max_new_tokens >= positions:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the model has "
            f"{positions} positions for prompt and response together, so that at most "
            f"{positions - 1} are allowed"
        )


def tokenize(
    problems: list[Problem], template: Template, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[Problem], int]:
    """The problems with their `prompt_ids`, and how many were dropped for a prompt of more than
    `longest` tokens."""
    encoded = [replace(p, prompt_ids=encode(template, p.question, tokenizer)) for p in problems]
    kept = [p for p in encoded if len(p.prompt_ids) <= longest]
    if not kept:
        shortest = min(len(p.prompt_ids) for p in encoded)
        raise UserError(
            f"no prompt fits: the shortest of {len(encoded)} has {shortest} tokens and {longest} "
            "are allowed by --max-prompt-tokens (in training) and by the model's positions less "
            "--max-new-tokens"
        )
    return kept, len(encoded) - len(kept)


def tokenize_sets(
    problems: list[Problem],
    eval_sets: dict[str, list[Problem]],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    log: Callable[[str], None],
) -> tuple[list[Problem], dict[str, list[Problem]], dict[str, int]]:
    """Training problems and evaluation sets with their prompts, and how many prompts of each
    evaluation set are too long."""
    problems, too_long = tokenize(problems, template, tokenizer, longest)
    log(
        f"data: {len(problems)} training problems, {too_long} dropped for a prompt of more than "
        f"{longest} tokens"
    )
    kept, dropped = {}, {}
    for name, eval_problems in eval_sets.items():
        kept[name], dropped[name] = tokenize(eval_problems, template, tokenizer, longest)
        log(
            f"data: {name}, {len(kept[name])} problems, {dropped[name]} too long (they count as "
            f"wrong); {len(overlap(problems, kept[name]))} of them among the training problems"
        )
    return problems, kept, dropped


def sample_seed(*key: int) -> int:
    """63 bits from (run seed, step, problem, sample). A sample's random numbers depend on nothing
    else, so resuming needs no saved random state. The order of the batch and the number of
    processes change a rollout by the rounding of the logits only, and not at all on a CPU."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Known:
    """The grade of a response that an earlier step has graded, or of one that is open."""

    grade: Grade

    def result(self) -> Grade:
        return self.grade


@dataclass(frozen=True)
class Sampler:
    """Draws responses from an engine. `tp` consecutive processes share one engine, and with it one
    shard of the prompts."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    seed: int
    tp: int = 1

    def rollout(
        self,
        problems: list[Problem],
        samples: int,
        sampling: Sampling,
        step: int,
        grader: Grader | None = None,
        carry: CarryOver | None = None,
    ) -> tuple[list[Rollout], list[Grading | Known]]:
        """`samples` responses to each problem of this process's shard, grouped by problem, and
        their grades. With `carry`, the groups that wait come first, and some responses may be
        left open.

        ParityError if a log-prob is NaN or infinite."""
        waiting = carry.go_on() if carry else []
        rollouts = [
            Rollout(p, BLANK, "", seed=sample_seed(self.seed, step, p.id, i), step=step)
            for p in problems
            for i in range(samples)
        ]
        share = list(chain(*distributed.shard(grouped(waiting + rollouts, samples), self.tp)))
        may_leave = partial(carry.enough, step=step) if carry else None
        return self.draw(share, sampling, grader, may_leave)

    def draw(
        self,
        rollouts: list[Rollout],
        sampling: Sampling,
        grader: Grader | None,
        may_leave: Callable[[Collection[Rollout], int], bool] | None,
    ) -> tuple[list[Rollout], list[Grading | Known]]:
        """The same responses, those that were open drawn to their end, and their grades. The
        grader may still be working on the grades: it starts with a response as soon as that is
        complete, while others are sampled.

        Responses are left open once `may_leave(they, how many were drawn)` is true."""
        drawn = list(rollouts)
        grades: list[Grading | Known] = [Known(rollout.grade) for rollout in rollouts]
        todo = [i for i, rollout in enumerate(rollouts) if rollout.completion.open]
        left = {i: rollouts[i] for i in todo}

        def finish(request: int, completion: Completion) -> None:  # they finish in any order
            if not math.isfinite(sum(completion.logprobs)):
                raise ParityError(
                    "the sampler returned log-probs that are not finite. Its weights are damaged: "
                    "look at the weight sync, where a layer may have been left out"
                )
            i = todo[request]
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            drawn[i] = replace(left.pop(i), completion=completion, text=text)
            if grader:
                grades[i] = grader.grade(drawn[i])

        def enough() -> bool:
            return bool(may_leave and may_leave(left.values(), len(todo)))

        requests = [Request(r.problem.prompt_ids, r.seed, r.completion) for r in left.values()]
        completions = self.engine.generate(requests, sampling, finish, enough)
        for request, i in enumerate(todo):
            if i in left:
                drawn[i] = replace(left[i], completion=completions[request])
        return drawn, grades if grader else []

    def gather(
        self, rollouts: list[Rollout], rewards: list[float], group_size: int
    ) -> tuple[list[Rollout], Tensor]:
        """All processes' rollouts, group by group in the order of the step's problems, and their
        rewards [P, G]."""
        pairs = list(zip(rollouts, rewards, strict=True))
        pairs = list(chain(*distributed.gather(grouped(pairs, group_size), self.tp)))
        reward_PG = torch.tensor([reward for _, reward in pairs]).view(-1, group_size)
        return [rollout for rollout, _ in pairs], reward_PG


def with_grades(rollouts: list[Rollout], grades: Sequence[Grading | Known]) -> list[Rollout]:
    """Wait for the grades, and put each into its rollout."""
    return [replace(r, grade=g.result()) for r, g in zip(rollouts, grades, strict=True)]


def grouped(items: list[Item], size: int) -> list[list[Item]]:
    """Consecutive groups of `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]
