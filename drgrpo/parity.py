"""The parity gate: trainer and sampler must give a fresh sample the same log-probs.

Wrong weights in the sampler are the commonest silent bug of RL trainers. Training goes on and
learns little or nothing. Before the first update of a step the trainer holds exactly the weights
that the sampler was synced to, so the two log-probs of a response differ by rounding only.
"""

from collections.abc import Callable

import torch

LIMITS = {torch.float32: (1e-4, 1e-3), torch.float16: (1e-2, 2.0), torch.bfloat16: (5e-2, 10.0)}
"""Mean and largest difference allowed, in nats, by compute type. In float32 on a CPU, the largest
difference of seven tiny runs with either engine was 4.5e-5. The bfloat16 limits are guesses that no
GPU has confirmed. The float16 limits are a fifth of them: its rounding error is an eighth."""


class ParityError(RuntimeError):
    """The sampler does not hold the trainer's weights, or computes something else with them."""


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
