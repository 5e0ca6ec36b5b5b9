"""FLOPs of a training pass against PyTorch's own counter."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen3Config

from drgrpo.config import Config
from drgrpo.lora import Adapter
from drgrpo.model import Objective, load_policy
from drgrpo.pack import Sequence, pack
from drgrpo.run import flops
from drgrpo.types import Completion, Problem, Rollout

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(random_model):
    return load_policy(random_model, Objective(), dtype=torch.float32, device=CPU)


def test_matmuls_of_blocks_and_head(policy):
    lengths = [(30, 20), (5, 9)]
    batch = pack([Sequence([1] * p, [2] * r, [-1.0] * r, 1.0) for p, r in lengths])
    with FlopCounterMode(display=False) as counter:
        policy.loss(batch, scale=1.0)[0].backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if "attention" not in str(op))
    config = policy.lm.config
    pairs = sum((p + r) ** 2 / 2 for p, r in lengths)
    attention = 3 * 4 * pairs * config.hidden_size * config.num_hidden_layers
    # Ours counts the last token of every sequence too, which never runs through the blocks.
    head = 3 * 2 * config.vocab_size * config.hidden_size * 29
    expected = (counted - head) * 64 / 62 + head
    assert flops.training_flops(policy.lm, lengths) - attention == pytest.approx(expected, rel=0.02)


def test_a_frozen_weight_has_no_product_for_its_gradient(random_model):
    """LoRA's own factors are small, and the first block's inputs need no gradient."""
    adapter = Adapter(rank=1)
    policy = load_policy(
        random_model, Objective(), dtype=torch.float32, device=CPU, adapter=adapter
    )
    batch = pack([Sequence([1] * 30, [2] * 40, [-1.0] * 40, 1.0)])
    with FlopCounterMode(display=False) as counter:
        policy.loss(batch, scale=1.0)[0].backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if "attention" not in str(op))
    config = policy.lm.config
    attention = 3 * 4 * 70**2 / 2 * config.hidden_size * config.num_hidden_layers
    ours = flops.training_flops(policy.lm, [(30, 40)]) - attention
    assert ours == pytest.approx(counted, rel=0.08)


def test_the_width_of_a_head_is_the_configs_own_or_its_share_of_the_model():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert flops.head_dim(Qwen2Config(**sizes)) == 16
    assert flops.head_dim(Qwen3Config(**sizes, head_dim=32)) == 32


def test_the_peak_follows_the_name_of_the_gpu(monkeypatch):
    peaks = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12, "Tesla T4": None}
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(torch.device("cuda", 0)) == peak
    assert flops.peak_flops(CPU) is None


def test_utilization_counts_the_trained_responses_of_one_process(policy, group_of_one, monkeypatch):
    problem = Problem(0, "", "", prompt_ids=[1] * 30)
    rollouts = [Rollout(problem, Completion([2] * n, [-1.0] * n, True), "") for n in (20, 9)]
    advantage_PG, config = torch.tensor([[0.0, 0.5]]), Config(recipe="any")
    trained = flops.training_flops(policy.lm, [(30, 9)])
    everything = flops.training_flops(policy.lm, [(30, 20), (30, 9)])

    timer = SimpleNamespace(seconds={"train": 4.0})

    def use(config):
        return flops.utilization(config, policy.lm, rollouts, advantage_PG, timer, CPU)

    assert use(config) == {"tflops": trained / 4e12, "mfu": None}
    assert use(replace(config, drop_zero_advantage=False))["tflops"] == everything / 4e12
    monkeypatch.setattr(flops, "peak_flops", lambda device: 1e9)
    assert use(config)["mfu"] == trained / 4e9
    monkeypatch.setattr(flops.dist, "get_world_size", lambda: 2)
    assert use(config)["tflops"] == trained / 2 / 4e12
