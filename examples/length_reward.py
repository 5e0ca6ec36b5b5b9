"""A penalty for long responses: DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13), in
characters, since a reward function sees text.

python train.py --recipe oat_zero_1_5b --reward "math + 0.5*examples/length_reward.py:brevity"
"""

from typing import Any

FREE = 6000  # characters without a penalty; 3000 tokens of mathematics are about 9000
LONGEST = 9000  # from here on the penalty is 1


def brevity(response: str, *, problem: str, answer: Any, finished: bool, **columns: Any) -> float:
    """0 up to FREE characters, then a straight line down to -1 at LONGEST."""
    excess = (len(response) - FREE) / (LONGEST - FREE)
    return -min(max(excess, 0.0), 1.0)
