"""The parity gate: trainer and sampler must give a fresh sample the same log-probs.

Wrong weights in the sampler are the commonest silent bug of RL trainers. Training goes on and
learns little or nothing. Before the first update of a step the trainer holds exactly the weights
that the sampler was synced to, so the two log-probs of a response differ by rounding only.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from drgrpo import pack
from drgrpo.model import Policy
from drgrpo.rollout import Sampler
from drgrpo.types import Batch, ParityError, Problem, Sampling

LIMITS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-2, 10.0), torch.float16: (1e-2, 2.0)}
"""Mean and largest difference allowed, in nats, by compute type. No GPU has confirmed them.

float32: the largest difference of seven tiny runs on a CPU with either engine was 4.5e-5.

bfloat16: the mean of a tiny run with vLLM on a CPU was 7e-4, and its largest difference 0.17. On
GPUs others published a mean of 0.011 for a 4B model (vime issue 64) and a root mean square of 0.031
for a 0.5B model (Fast-LLM pull request 525). A sampler that lacked one of 28 layers was off by 0.5
on average, in a random model on a CPU. The limit of the mean lies between. The limit of the largest
difference catches a few wrong tokens among many. Both are for trained models: with all its weights
the random model was off by 0.14, because its errors grow from layer to layer.

float16: its rounding error is an eighth of bfloat16's, and so were the random model's means (0.018
against 0.14 with 28 layers)."""


def check(
    mean: float,
    largest: float,
    dtype: torch.dtype,
    mode: str = "stop",
    log: Callable[[str], None] = print,
) -> None:
    """Compare |trainer - sampler|, in nats per token, with the limits of `dtype`. NaN exceeds them.
    Beyond a limit, `mode` "stop" raises ParityError and "warn" logs the same message."""
    limit_mean, limit_max = LIMITS[dtype]
    if mean <= limit_mean and largest <= limit_max:
        return
    message = (
        "trainer and sampler disagree on fresh samples: |log-prob difference| is "
        f"{mean:.3g} nats on average (limit {limit_mean:.3g}) and {largest:.3g} at most (limit "
        f"{limit_max:.3g}). The sampler holds other weights. Look at the weight sync (a tied "
        "lm_head.weight that was not sent, a layer left out), at a prefix cache that was not reset "
        "after it, and at the temperature. --parity warn trains on regardless"
    )
    if mode == "stop":
        raise ParityError(message)
    log(f"WARNING: {message}")


def probe(
    sampler: Sampler, policy: Policy, problems: list[Problem], sampling: Sampling, budget: int
) -> tuple[float, float]:
    """The `gap` of 32 fresh responses per process. The sampler sleeps afterwards.

    As in a training step, it sleeps before the policy computes, and a micro-batch holds at most
    `budget` tokens: there may be no memory for more."""
    rank, world, samples = dist.get_rank(), dist.get_world_size(), 4
    chosen = (problems * world)[: 8 * world]
    rollouts, _ = sampler.rollout(chosen, samples, sampling, step=-1)
    sampler.engine.sleep()
    rollouts, _ = sampler.gather(rollouts, [0.0] * len(rollouts), samples)
    sequences = {i: pack.sequence(r, advantage=0.0) for i, r in enumerate(rollouts)}
    device = next(policy.parameters()).device
    return gap(policy, pack.shard(sequences, rank, world, budget, device))


def gap(policy: Policy, batches: list[Batch]) -> tuple[float, float]:
    """Mean and largest |trainer - sampler|, in nats per token, over the batches of all processes.

    It is collective. Every process brings the same number of batches, some perhaps empty, and gets
    the same two numbers, so that `check` raises on all processes or on none."""
    gap_N = torch.cat([(policy.logprob(b) - b.sampler_logprob_N).abs() for b in batches])
    gap_N = gap_N.double().cpu()
    sums = torch.stack([gap_N.sum(), torch.tensor(float(len(gap_N)), dtype=torch.float64)])
    largest = pad(gap_N, (0, 1)).amax()  # 0 if there is no token
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return (sums[0] / sums[1]).item(), largest.item()
