"""Problems -> rollouts: tokenize, sample a group of responses for each, decode."""

import hashlib
import struct
from dataclasses import replace

from drgrpo.engine import Sampling
from drgrpo.templates import Template, encode
from drgrpo.types import Problem, Request, Rollout, UserError


def tokenize(problems: list[Problem], template: Template, tokenizer, longest: int) -> tuple[list[Problem], int]:
    """The problems with their `prompt_ids`, and how many were dropped for a prompt of more than `longest` tokens."""
    encoded = [replace(p, prompt_ids=encode(template, p.question, tokenizer)) for p in problems]
    kept = [p for p in encoded if len(p.prompt_ids) <= longest]
    if not kept:
        shortest = min(len(p.prompt_ids) for p in encoded)
        raise UserError(
            f"no prompt fits: the shortest of {len(encoded)} has {shortest} tokens and {longest} are allowed; raise "
            "--max-prompt-tokens, or lower --max-new-tokens if prompt and response exceed the model's positions"
        )
    return kept, len(encoded) - len(kept)


def sample_seed(*key: int) -> int:
    """63 bits from (run seed, step, problem, sample): a sample depends on nothing else, so a rollout does not change with
    the order of the batch or the number of processes, and resuming needs no saved random state."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rollout(engine, tokenizer, problems: list[Problem], samples: int, sampling: Sampling, seed: int,
            step: int) -> list[Rollout]:  # fmt: skip
    """`samples` responses to each problem, grouped by problem."""
    grouped = [(p, Request(p.prompt_ids, sample_seed(seed, step, p.id, k))) for p in problems for k in range(samples)]
    completions = engine.generate([request for _, request in grouped], sampling)
    texts = tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
    return [
        Rollout(problem, completion, text)
        for (problem, _), completion, text in zip(grouped, completions, texts, strict=True)
    ]
