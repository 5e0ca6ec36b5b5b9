"""Problems -> rollouts: tokenize, sample a group of responses for each, decode."""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace

from drgrpo.templates import Template, encode
from drgrpo.types import Completion, Problem, Request, Rollout, Sampling, UserError


def tokenize(
    problems: list[Problem], template: Template, tokenizer, longest: int
) -> tuple[list[Problem], int]:
    """The problems with their `prompt_ids`, and how many were dropped for a prompt of more than
    `longest` tokens."""
    encoded = [replace(p, prompt_ids=encode(template, p.question, tokenizer)) for p in problems]
    kept = [p for p in encoded if len(p.prompt_ids) <= longest]
    if not kept:
        shortest = min(len(p.prompt_ids) for p in encoded)
        raise UserError(
            f"no prompt fits: the shortest of {len(encoded)} has {shortest} tokens and {longest} are allowed by "
            "--max-prompt-tokens (in training) and by the model's positions less --max-new-tokens"
        )
    return kept, len(encoded) - len(kept)


def sample_seed(*key: int) -> int:
    """63 bits from (run seed, step, problem, sample): a sample depends on nothing else, so a
    rollout does not change with the order of the batch or the number of processes, and resuming
    needs no saved random state."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rollout(
    engine,
    tokenizer,
    problems: list[Problem],
    samples: int,
    sampling: Sampling,
    seed: int,
    step: int,
    on_finish: Callable[[int, Rollout], None] = lambda i, r: None,
) -> list[Rollout]:
    """`samples` responses to each problem, grouped by problem. `on_finish(i, rollout)` is called as
    rollout i finishes."""
    asked = [p for p in problems for _ in range(samples)]
    requests = [
        Request(p.prompt_ids, sample_seed(seed, step, p.id, i % samples))
        for i, p in enumerate(asked)
    ]
    rollouts: dict[int, Rollout] = {}

    def finish(i: int, completion: Completion) -> None:
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        rollouts[i] = Rollout(asked[i], completion, text)
        on_finish(i, rollouts[i])

    engine.generate(requests, sampling, finish)
    return [rollouts[i] for i in range(len(requests))]
