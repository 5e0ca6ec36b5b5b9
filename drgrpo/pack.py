"""Rollouts -> packed micro-batches: which response goes into which optimizer step, process and
micro-batch."""

import heapq

import numpy as np
import torch

from drgrpo.types import Batch


def minibatches(n: int, count: int, seed: int, step: int) -> list[list[int]]:
    """The n rollouts of a step dealt into `count` optimizer steps at random: a function of (seed,
    step) alone, and decided before any response is dropped, so that dropping does not move the
    others."""
    order = np.random.default_rng((seed, step)).permutation(n)
    return [part.tolist() for part in np.split(order, count)]


def balance(lengths: dict[int, int], world: int) -> list[list[int]]:
    """Rollouts (index -> tokens) dealt to `world` processes, longest first, each to the one with
    the fewest tokens."""
    shares = [(0, rank, []) for rank in range(world)]
    for i in sorted(lengths, key=lambda i: (-lengths[i], i)):
        tokens, rank, share = heapq.heappop(shares)
        heapq.heappush(shares, (tokens + lengths[i], rank, [*share, i]))
    return [share for _, _, share in sorted(shares, key=lambda s: s[1])]


def fill(share: list[int], lengths: dict[int, int], budget: int) -> list[list[int]]:
    """First-fit decreasing: one process's rollouts in micro-batches of at most `budget` tokens; a
    longer one goes alone."""
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
    """[world][count] lists of rollout indices. Every process gets the same count, of at least one,
    padded with empty lists: the forward and backward passes of FSDP2 are collectives, and even an
    empty minibatch has to step."""
    filled = [fill(share, lengths, budget) for share in balance(lengths, world)]
    count = max(1, *map(len, filled))
    return [bins + [[]] * (count - len(bins)) for bins in filled]


def pack(
    sequences: list[tuple[list[int], list[int], list[float], float]],
    device: torch.device | str = "cpu",
) -> Batch:
    """(prompt ids, response ids, sampler log-probs, advantage) of each sequence -> one packed
    `Batch`.

    An empty list gives a batch of one token and no response, through which gradients are exactly
    zero."""
    tokens, positions, starts, rows, targets, sampler, advantages = [], [], [0], [], [], [], []
    for prompt, response, logprobs, advantage in sequences or [([0], [], [], 0.0)]:
        tokens += prompt + response[:-1]  # nothing is predicted from the last one
        positions += range(len(tokens) - starts[-1])
        first = (
            starts[-1] + len(prompt) - 1
        )  # the last prompt token predicts the first response token
        rows += range(first, first + len(response))
        targets += response
        sampler += logprobs
        advantages += [advantage] * len(response)
        starts.append(len(tokens))
    long, fp32 = {"dtype": torch.long, "device": device}, {"dtype": torch.float32, "device": device}
    return Batch(
        token_T=torch.tensor(tokens, **long),
        position_T=torch.tensor(positions, **long),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        max_seqlen=int(np.diff(starts).max()),
        row_N=torch.tensor(rows, **long),
        target_N=torch.tensor(targets, **long),
        advantage_N=torch.tensor(advantages, **fp32),
        sampler_logprob_N=torch.tensor(sampler, **fp32),
    )
