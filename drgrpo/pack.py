"""Rollouts -> packed micro-batches.

Decides which response goes into which optimizer step, process and micro-batch.
"""

import heapq
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from drgrpo.types import Batch, Rollout

Plan = list[list[Batch]]
"""One process's micro-batches of a step: [minibatches][micro-batches]."""


class Sequence(NamedTuple):
    """A prompt and its response, ready to be packed."""

    prompt_ids: list[int]
    token_ids: list[int]
    sampler_logprobs: list[float]
    advantage: float
    stale: int = 0  # tokens of the response that earlier steps drew


def sequence(rollout: Rollout, advantage: float) -> Sequence:
    prompt_ids, completion = rollout.problem.prompt_ids, rollout.completion
    return Sequence(prompt_ids, completion.token_ids, completion.logprobs, advantage, rollout.stale)


def sizes(n: int, count: int) -> list[int]:
    """The n rollouts of a step in `count` equal optimizer steps, or nearly equal ones where
    `count` does not divide n. There are fewer steps than `count` if there are fewer rollouts."""
    return [n // count + (i < n % count) for i in range(min(n, count))]


def minibatches(n: int, count: int, seed: int, step: int) -> list[list[int]]:
    """The n rollouts of a step, dealt into the optimizer steps of `sizes` at random.

    The deal depends on (seed, step) alone. It is made before any response is dropped, so that
    dropping one does not move the others."""
    order = iter(np.random.default_rng((seed, step)).permutation(n).tolist())
    return [list(islice(order, size)) for size in sizes(n, count)]


def balance(lengths: dict[int, int], world: int) -> list[list[int]]:
    """Rollouts (index -> tokens) dealt to `world` processes. The longest are dealt first, each to
    the process with the fewest tokens."""
    shares: list[tuple[int, int, list[int]]] = [(0, rank, []) for rank in range(world)]
    for i in sorted(lengths, key=lambda i: (-lengths[i], i)):
        tokens, rank, share = heapq.heappop(shares)
        heapq.heappush(shares, (tokens + lengths[i], rank, [*share, i]))
    return [share for _, _, share in sorted(shares, key=lambda s: s[1])]


def fill(share: list[int], lengths: dict[int, int], budget: int) -> list[list[int]]:
    """One process's rollouts in micro-batches of at most `budget` tokens, by first-fit decreasing.
    A longer rollout gets a micro-batch of its own."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(share, key=lambda i: (-lengths[i], i)):
        for b, free in enumerate(room):
            if lengths[i] <= free:
                bins[b].append(i)
                room[b] -= lengths[i]
                break
        else:
            bins.append([i])
            room.append(budget - lengths[i])
    return bins


def microbatches(lengths: dict[int, int], world: int, budget: int) -> list[list[list[int]]]:
    """[world][count] lists of rollout indices.

    Every process gets the same count, at least one, padded with empty lists: the forward and
    backward passes of FSDP2 are collectives, and even an empty minibatch has to step."""
    filled = [fill(share, lengths, budget) for share in balance(lengths, world)]
    count = max(1, *map(len, filled))
    return [bins + [[]] * (count - len(bins)) for bins in filled]


def shard(
    sequences: dict[int, Sequence], rank: int, world: int, budget: int, device: torch.device | str
) -> list[Batch]:
    """The packed micro-batches of process `rank`, with at most `budget` tokens each. The keys of
    `sequences` break ties between equal lengths."""
    lengths = {i: len(s.prompt_ids) + len(s.token_ids) for i, s in sequences.items()}
    batches = []
    for indices in microbatches(lengths, world, budget)[rank]:
        batches.append(pack([sequences[i] for i in indices], device))
    return batches


NOTHING = Sequence([0], [], [], 0.0)


def pack(sequences: list[Sequence], device: torch.device | str = "cpu") -> Batch:
    """Sequences -> one packed `Batch`. No sequence gives a batch of one token without a response,
    through which gradients are exactly zero."""
    tokens: list[int] = []
    positions: list[int] = []
    starts: list[int] = [0]
    rows: list[int] = []
    targets: list[int] = []
    logprobs: list[float] = []
    advantages: list[float] = []
    fresh: list[bool] = []
    for prompt, response, sampler_logprobs, advantage, stale in sequences or [NOTHING]:
        tokens += prompt + response[:-1]  # nothing is predicted from the last token
        positions += range(len(tokens) - starts[-1])
        first = starts[-1] + len(prompt) - 1  # the last prompt token predicts the first response
        rows += range(first, first + len(response))
        targets += response
        logprobs += sampler_logprobs
        advantages += [advantage] * len(response)
        fresh += [i >= stale for i in range(len(response))]
        starts.append(len(tokens))

    def int64(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def fp32(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return Batch(
        token_T=int64(tokens),
        position_T=int64(positions),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        max_seqlen=int(np.diff(starts).max()),
        row_N=int64(rows),
        target_N=int64(targets),
        advantage_N=fp32(advantages),
        sampler_logprob_N=fp32(logprobs),
        fresh_N=torch.tensor(fresh, dtype=torch.bool, device=device),
    )
