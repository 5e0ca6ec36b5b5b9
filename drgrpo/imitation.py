"""Supervised training on demonstrations, before RL.

RL learns from the difference between right and wrong responses, so its first model has to be right
now and then. A trained model is cached under a hash of all that it depends on, so that the next run
begins with RL.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM

from drgrpo.model import Objective, Policy, attention_implementation
from drgrpo.pack import Sequence, pack

CACHE = Path("runs/warmup")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Of the learning rate: it rises over `lr_warmup` steps, and falls to zero over all `steps`.
    A step imitates `batch` demonstrations."""

    steps: int
    batch: int
    lr: float
    lr_warmup: int


def cached(
    name: str,
    inputs: list,
    folder: str | Path,
    make: Callable[[Path], None],
    log: Callable[[str], None],
) -> Path:
    """The Hugging Face folder `name` in the cache `folder`, which `make` fills if it is not there.

    `inputs` is what the model depends on besides the versions of torch and transformers. It has to
    be JSON."""
    key = json.dumps([*inputs, torch.__version__, transformers.__version__])
    path = Path(folder) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # a second run that starts meanwhile waits for the model
        if path.exists():
            log(f"warm-up: from the cache, {path}")
            return path
        partial = path.with_name(path.name + ".partial")
        make(partial)
        partial.rename(path)  # a killed warm-up leaves no half-trained model under the final name
    return path


def demonstration(prompt_ids: list[int], response_ids: list[int]) -> Sequence:
    """A response to imitate. Its log-likelihood is RL's objective with advantage 1, so that both
    phases have one loss."""
    return Sequence(prompt_ids, response_ids, [0.0] * len(response_ids), advantage=1.0)


def imitate(
    path: Path,
    schedule: Schedule,
    demonstrations: Iterator[list[Sequence]],
    log: Callable[[str], None] = print,
) -> None:
    """Train the model in the folder `path`, in float32 on the CPU, and overwrite it. Each item of
    `demonstrations` is the batch of one step."""
    attention = attention_implementation("sdpa", torch.device("cpu"), torch.float32)
    lm = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention
    )
    policy = Policy(lm, Objective(), kernel="torch").train()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step in range(schedule.steps):
        rise, fall = (step + 1) / schedule.lr_warmup, 1 - step / schedule.steps
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * min(rise, fall)
        batch = pack(next(demonstrations))
        loss, stats = policy.loss(batch, scale=1 / len(batch.target_N))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, schedule.steps // 8) == 0:
            nll = -stats["logprob"].mean().item()
            log(f"warm-up {step + 1:4d}/{schedule.steps}  nll/token {nll:.4f}")
    lm.save_pretrained(path)
