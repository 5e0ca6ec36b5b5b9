"""FLOPs of a training pass against PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drgrpo.model import Objective, load_policy
from drgrpo.pack import pack
from drgrpo.run.flops import peak_flops, training_flops


def test_matmuls_of_blocks_and_head(random_model):
    policy = load_policy(random_model, dtype=torch.float32, device=torch.device("cpu"))
    lengths = [(30, 20), (5, 9)]
    batch = pack([([1] * p, [2] * r, [-1.0] * r, 1.0) for p, r in lengths])
    with FlopCounterMode(display=False) as counter:
        policy(batch, Objective(), scale=1.0)[0].backward()
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)
    )
    config = policy.lm.config
    attention = (
        3
        * 4
        * sum((p + r) ** 2 / 2 for p, r in lengths)
        * config.hidden_size
        * config.num_hidden_layers
    )
    # ours counts the last token of every sequence too, which never runs; and the custom head is
    # opaque to the counter
    head = 3 * 2 * config.vocab_size * config.hidden_size * 29
    assert training_flops(policy.lm, lengths) - attention == pytest.approx(
        counted * 64 / 62 + head, rel=0.02
    )


def test_the_peak_is_unknown_without_a_gpu():
    assert peak_flops(torch.device("cpu")) is None
