"""The gate between trainer and sampler opens for rounding and shuts for everything else."""

import math

import pytest
import torch

from drgrpo.parity import ParityError, check, difference


def test_difference_counts_tokens():
    total, largest, n = difference(
        torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -2.75])
    )
    assert (total, largest, n) == (0.75, 0.5, 3)
    assert difference(torch.tensor([]), torch.tensor([])) == (0.0, 0.0, 0)


@pytest.mark.parametrize(
    ("mean", "largest", "dtype"),
    [(1e-6, 3e-5, torch.float32), (2e-2, 0.3, torch.bfloat16)],
    ids=["fp32 rounding", "bf16 rounding"],
)
def test_rounding_passes(mean, largest, dtype):
    check(mean, largest, dtype)


@pytest.mark.parametrize(
    ("mean", "largest", "dtype"),
    [
        (1e-2, 5e-4, torch.float32),
        (1e-6, 1e-2, torch.float32),
        (1.1, 2, torch.bfloat16),
        (math.nan, 0, torch.float32),
    ],
    ids=["mean", "one token", "bf16", "nan"],
)
def test_more_stops_the_run_and_names_the_suspects(mean, largest, dtype):
    with pytest.raises(ParityError, match=r"lm_head.*prefix cache.*--parity-mean"):
        check(mean, largest, dtype)


def test_limits_can_be_raised():
    check(0.5, 2.0, torch.float32, limit_mean=1.0, limit_max=3.0)
