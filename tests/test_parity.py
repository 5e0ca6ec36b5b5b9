"""The gate between trainer and sampler opens for rounding and shuts for everything else."""

import math

import pytest
import torch

from drgrpo.parity import ParityError, check

DISAGREEMENTS = [
    pytest.param(2e-4, 5e-4, torch.float32, id="mean"),
    pytest.param(1e-6, 2e-3, torch.float32, id="one token"),
    pytest.param(0.06, 2, torch.bfloat16, id="bf16 mean"),
    pytest.param(1e-3, 11, torch.bfloat16, id="bf16 one token"),
    pytest.param(0.02, 0.5, torch.float16, id="fp16 mean"),
    pytest.param(1e-3, 3, torch.float16, id="fp16 one token"),
    pytest.param(math.nan, 0, torch.float32, id="nan"),
]


@pytest.mark.parametrize(
    ("mean", "largest", "dtype"),
    [(1e-6, 3e-5, torch.float32), (3e-2, 1.0, torch.bfloat16), (3e-3, 0.2, torch.float16)],
    ids=["fp32 rounding", "bf16 rounding", "fp16 rounding"],
)
def test_rounding_passes(mean, largest, dtype):
    check(mean, largest, dtype)


@pytest.mark.parametrize(("mean", "largest", "dtype"), DISAGREEMENTS)
def test_more_stops_the_run_and_names_the_suspects(mean, largest, dtype):
    with pytest.raises(ParityError, match=r"lm_head.*prefix cache.*--parity warn"):
        check(mean, largest, dtype)


@pytest.mark.parametrize(("mean", "largest", "dtype"), DISAGREEMENTS)
def test_a_run_may_ask_for_a_warning_instead(mean, largest, dtype):
    logged = []
    check(mean, largest, dtype, "warn", logged.append)
    assert len(logged) == 1 and logged[0].startswith("WARNING: trainer and sampler disagree")
