"""A reward for the form of a response, whatever its answer.

python train.py --recipe oat_zero_1_5b --reward "math + 0.1*examples/format_reward.py:one_box"
"""

from typing import Any


def one_box(response: str, *, problem: str, answer: Any, finished: bool, **columns: Any) -> float:
    """1 for a complete response with exactly one box, else 0."""
    return float(finished and response.count("\\boxed{") == 1)
