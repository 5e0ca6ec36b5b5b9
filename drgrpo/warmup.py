"""Models that a recipe makes itself, by a supervised phase before RL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from drgrpo import distributed
from drgrpo.smol import smol_model
from drgrpo.tiny.warmup import tiny_model

if TYPE_CHECKING:
    from drgrpo.config import Config

MADE = {"tiny": tiny_model, "smol": smol_model}


def initial_model(config: Config, log: Callable[[str], None]) -> str:
    """The Hugging Face folder or hub name that `--model` stands for. Rank 0 makes a model of the
    `MADE` ones, and the other processes read it."""
    if config.model not in MADE:
        return config.model
    with distributed.rank_zero_first():
        return str(MADE[config.model](config, log))
