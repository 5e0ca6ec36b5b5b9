"""What bench/bench_python.py times, and what its result file says."""

import json
import sys
from importlib.util import find_spec
from statistics import median

import pytest

from bench import bench_python
from bench.bench_python import PHASES, made_up_rollouts, slower
from drgrpo.config import RECIPES
from drgrpo.smol import PACKAGE


def test_responses_have_the_size_of_the_recipe():
    rollouts = made_up_rollouts(RECIPES["oat_zero_7b"](), 800, vocabulary=50)
    lengths = [rollout.length for rollout in rollouts]
    assert len(lengths) == 1024
    assert max(lengths) == 3000
    assert 700 < sum(lengths) / len(lengths) < 900
    assert max(rollouts[0].completion.token_ids) < 50
    assert rollouts[0].problem is rollouts[7].problem is not rollouts[8].problem


def test_the_slower_process_counts():
    one, two = dict.fromkeys(PHASES, 1.0), dict.fromkeys(PHASES, 2.0)
    assert slower((one | {"plan": 3.0}, two)) == two | {"plan": 3.0}


@pytest.mark.skipif(not find_spec(PACKAGE), reason=f"{PACKAGE}: has the tokenizer")
def test_a_small_step_through_the_command(monkeypatch, tmp_path):
    command = f"bench_python --prompts 2 --mean-length 20 --repeats 3 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    bench_python.main()
    result = json.loads((tmp_path / "python.json").read_text())
    totals = [sum(step[phase] for phase in PHASES) for step in result["steps"]]
    assert len(totals) == 3
    assert min(min(step.values()) for step in result["steps"]) > 0
    assert result["ms_per_response"] == pytest.approx(1e3 * median(totals) / 16)
