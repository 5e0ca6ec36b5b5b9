"""Does a run fit, and how long can it take at most? `train.py --dry-run`."""

import torch
import torch.distributed as dist

from drgrpo import pack
from drgrpo.config import Config
from drgrpo.engine import Engine
from drgrpo.model import Policy
from drgrpo.run.log import Log, Stopwatch


def dry_run(
    config: Config,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    engine: Engine,
    longest: int,
    log: Log,
) -> None:
    """Train on the fullest micro-batch with prompts of `longest` tokens, and log memory and hours.
    The sampler sleeps, as it does in training. Writes nothing."""
    engine.sleep()
    length = longest + config.max_new_tokens
    count = max(1, config.tokens_per_microbatch // length)
    response, logprobs = [1] * config.max_new_tokens, [-1.0] * config.max_new_tokens
    full = pack.Sequence([1] * longest, response, logprobs, advantage=1.0)
    device = next(policy.parameters()).device
    batch = pack.pack([full] * count, device)
    for _ in range(2):  # the first pass also compiles
        timer = Stopwatch()
        with timer("train"):
            policy.loss(batch, scale=1.0)[0].backward()
            optimizer.step()  # allocates Adam's moments
            optimizer.zero_grad()
    seconds, gb = timer.seconds["train"], timer.gb["train"]
    batches = config.rollouts_per_step / dist.get_world_size() / count
    log.say(
        f"dry run: a micro-batch of {count} x {length} tokens takes {seconds:.2f} s, with "
        f"{gb:.2f} GB in use. {config.steps} steps in which no response is short or skipped "
        f"would train for {config.steps * batches * seconds / 3600:.1f} h"
    )
