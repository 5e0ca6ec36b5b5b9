"""Checkpoints are whole or absent, and a run folder belongs to one config. (Exact resume: test_train.py.)"""

import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drgrpo import checkpoint
from drgrpo.config import RECIPES
from drgrpo.model import Objective, load_policy
from drgrpo.pack import pack
from drgrpo.types import UserError


@pytest.fixture
def config(tmp_path):
    return replace(RECIPES["tiny"](), out=str(tmp_path / "run"), keep=2)


@pytest.fixture
def trained(random_model, group_of_one):
    """A policy and an optimizer with state."""
    policy = load_policy(random_model, dtype=torch.float32, device=torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    update(policy, optimizer)
    return policy, optimizer


def update(policy, optimizer):
    loss, _ = policy(pack([([1, 2], [3, 4, 5], [-1.0] * 3, 1.0)]), Objective(), scale=1.0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def flat(policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_a_new_or_empty_folder_is_free(config, tmp_path):
    assert checkpoint.claim(config) is None
    (tmp_path / "run").mkdir()
    assert checkpoint.claim(config) is None


def test_a_folder_with_something_else_in_it_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("the only copy")
    with pytest.raises(UserError, match="holds no run"):
        checkpoint.claim(config)


@pytest.mark.parametrize(
    ("changes", "suggestion"),
    [({"algo": "grpo"}, "run-grpo"), ({"seed": 4}, "run-seed4"), ({"lr": 1e-5, "algo": "rloo"}, "run-rloo-lr1e-05")],
    ids=["algo", "seed", "two"],
)
def test_another_config_is_refused_with_a_name_for_its_own_folder(config, changes, suggestion):
    checkpoint.open_run(config, resumed_step=0)
    with pytest.raises(UserError, match="another config") as error:
        checkpoint.claim(replace(config, **changes))
    assert str(error.value).endswith(suggestion)


def test_fields_that_only_say_when_may_change(config):
    checkpoint.open_run(config, resumed_step=0)
    assert checkpoint.claim(replace(config, steps=500, save_every=7, keep=9)) is None


def test_records_are_cut_back_to_the_checkpoint_and_torn_lines_go(config, tmp_path):
    checkpoint.open_run(config, resumed_step=0)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "re')
    checkpoint.open_run(config, resumed_step=2)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_saved_and_loaded_weights_and_optimizer_are_the_same_bits(config, trained, random_model, tokenizer):
    policy, optimizer = trained
    checkpoint.open_run(config, resumed_step=0)
    checkpoint.save(config, 1, policy, optimizer, tokenizer, torch.float32, hours_used=0.5)

    other = load_policy(random_model, dtype=torch.float32, device=torch.device("cpu"))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    latest = checkpoint.claim(config)
    assert latest.name == "step-000001"
    assert checkpoint.load(latest, other, other_optimizer) == {"step": 1, "hours_used": 0.5}
    assert torch.equal(flat(policy), flat(other))
    for p, o in ((policy, optimizer), (other, other_optimizer)):  # one more step shows the optimizer's state
        update(p, o)
    assert torch.equal(flat(policy), flat(other))


def test_the_hf_folder_holds_the_policy(config, trained, tokenizer, tmp_path):
    policy, optimizer = trained
    checkpoint.open_run(config, resumed_step=0)
    checkpoint.save(config, 1, policy, optimizer, tokenizer, torch.bfloat16, hours_used=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert loaded.dtype == torch.bfloat16
    for (name, ours), (_, theirs) in zip(policy.lm.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours.detach().to(torch.bfloat16), theirs), name
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "hf").eos_token_id == tokenizer.eos_token_id


def test_old_checkpoints_go_and_latest_points_at_the_newest(config, trained, tokenizer, tmp_path):
    checkpoint.open_run(config, resumed_step=0)
    for step in (1, 2, 3):
        checkpoint.save(config, step, *trained, tokenizer, torch.float32, hours_used=0)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000002", "step-000003"]
    assert (folder / "latest").resolve() == (folder / "step-000003").resolve()


def test_a_save_that_dies_half_way_leaves_the_last_one_in_place(config, trained, tokenizer, tmp_path, monkeypatch):
    checkpoint.open_run(config, resumed_step=0)
    checkpoint.save(config, 1, *trained, tokenizer, torch.float32, hours_used=0)
    monkeypatch.setattr(checkpoint, "save_hf", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(config, 2, *trained, tokenizer, torch.float32, hours_used=0)
    assert checkpoint.claim(config).name == "step-000001"
    assert json.loads((checkpoint.claim(config) / "trainer.json").read_text())["step"] == 1


def test_the_config_is_written_as_it_is_used(config, tmp_path):
    checkpoint.open_run(config, resumed_step=0)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == asdict(config)
