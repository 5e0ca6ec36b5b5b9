"""A dry run fills a micro-batch with the longest sequences and projects the hours of a run."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from drgrpo.config import RECIPES
from drgrpo.model import Objective, load_policy
from drgrpo.run import dry_run as module
from drgrpo.run.dry_run import dry_run


class Slow:
    """A stopwatch that reads 36 s and 2 GB."""

    def __init__(self):
        self.seconds, self.gb = {"train": 36.0}, {"train": 2.0}

    def __call__(self, phase):
        return nullcontext()


@pytest.mark.parametrize(
    ("budget", "shape", "hours"), [(100, "4 x 25", "64.0 h"), (7, "1 x 25", "256.0 h")]
)
def test_it_projects_the_hours_of_full_micro_batches(
    random_model, group_of_one, monkeypatch, budget, shape, hours
):
    """100 steps of 256 rollouts, at 36 s a micro-batch."""
    changes = {"max_new_tokens": 15, "tokens_per_microbatch": budget}
    config = replace(RECIPES["tiny"](), **changes)
    policy = load_policy(random_model, Objective(), dtype=torch.float32, device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters())
    monkeypatch.setattr(module, "Stopwatch", Slow)
    said, slept = [], []
    engine = SimpleNamespace(sleep=lambda: slept.append(True))
    dry_run(config, policy, optimizer, engine, 10, SimpleNamespace(say=said.append))
    (line,) = said
    assert f"a micro-batch of {shape} tokens takes 36.00 s, with 2.00 GB in use" in line
    assert f"would train for {hours}" in line
    assert slept and optimizer.state, "Adam's moments are part of the memory"
