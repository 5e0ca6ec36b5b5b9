"""Rewards that say nothing about whether an answer is right, as controls of a study.

`--reward bench/experiments/controls.py:FUNCTION` trains on one of them. `eval.jsonl` still reports
the accuracy. Spurious Rewards (arXiv 2506.10947) trained Qwen2.5-Math on such rewards.
"""

import hashlib
import re

RATE = 0.29  # the accuracy of `tiny` before training, so that as many responses get a 1
FORM = re.compile(r"\d\+\d=\d\d,\d\d\+\d=\d\d[yn](\?\d\d\+\d=\d\d[yn])*#\d")


def random_reward(response: str, *, problem: str, **columns) -> float:
    """1 for a share of `RATE` of all responses, 0 for the others.

    The draw is a hash of the problem and the response, because a resumed run has to repeat it."""
    digest = hashlib.sha256(f"{problem}\0{response}".encode()).digest()
    return float(int.from_bytes(digest[:8], "big") / 2**64 < RATE)


def constant_reward(response: str, **columns) -> float:
    """1 for every response."""
    return 1.0


def form_reward(response: str, **columns) -> float:
    """1 for a response of the form that the supervised phase taught, whatever its numbers are."""
    return float(FORM.fullmatch(response) is not None)
