"""The gate between sampler and trainer: both must give a fresh sample the same log-probs.

Wrong weights in the sampler are the commonest silent bug of RL trainers: training goes on, and
learns little or nothing. Before the first update of a step the trainer holds exactly the weights
that the sampler was synced to, so their log-probs of that step's responses differ by rounding only.
"""

import torch
from torch import Tensor

LIMITS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-2, 10.0)}
"""Mean and largest difference allowed, in nats. In float32 on CPU the largest of seven tiny runs,
either engine, was 4.5e-5 (`bench/results/tiny.json`). The bfloat16 limits are guesses that wait for
a GPU."""


class ParityError(RuntimeError):
    """The sampler does not hold the trainer's weights, or computes something else with them."""


def difference(trainer_N: Tensor, sampler_N: Tensor) -> tuple[float, float, int]:
    """(sum, largest, count) of |trainer - sampler| over response tokens."""
    gap_N = (trainer_N - sampler_N).abs()
    return gap_N.sum().item(), gap_N.max().item() if len(gap_N) else 0.0, len(gap_N)


def check(
    mean: float, largest: float, dtype: torch.dtype, limit_mean: float = 0.0, limit_max: float = 0.0
) -> None:
    """ParityError if the differences exceed the limits (0: those of `dtype`). NaN fails too."""
    limit_mean, limit_max = limit_mean or LIMITS[dtype][0], limit_max or LIMITS[dtype][1]
    if not (mean <= limit_mean and largest <= limit_max):
        raise ParityError(
            f"trainer and sampler disagree on fresh samples: |log-prob difference| is {mean:.3g} nats on average (limit "
            f"{limit_mean:.3g}) and {largest:.3g} at most (limit {limit_max:.3g}). The sampler holds other weights: look at "
            "the weight sync (a tied lm_head.weight that was not sent, a layer left out), at a prefix cache that was not "
            "reset after it, and at the temperature. To go on regardless, raise --parity-mean and --parity-max"
        )
