"""Checkpoints are whole or absent, and a run folder belongs to one config. (Exact resume:
test_train.py.)"""

import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drgrpo.config import RECIPES
from drgrpo.model import Objective, load_policy
from drgrpo.pack import pack
from drgrpo.run import checkpoint
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


def save(config, step, policy, optimizer, tokenizer, dtype=torch.float32):
    checkpoint.write(
        config, step, policy, optimizer, tokenizer, dtype, hours_used=0.5, versions={"torch": "x"}
    )
    checkpoint.commit(config, step)


def test_a_new_or_empty_folder_is_free(config, tmp_path, group_of_one):
    checkpoint.claim(config)
    (tmp_path / "run").mkdir()
    checkpoint.claim(config)
    assert checkpoint.newest_whole(config) is None


def test_a_folder_with_something_else_in_it_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("the only copy")
    with pytest.raises(UserError, match="holds no run"):
        checkpoint.claim(config)


@pytest.mark.parametrize(
    ("changes", "suggestion"),
    [
        ({"algo": "grpo"}, "run-grpo"),
        ({"seed": 4}, "run-seed4"),
        ({"lr": 1e-5, "algo": "rloo"}, "run-rloo-lr1e-05"),
    ],
    ids=["algo", "seed", "two"],
)
def test_another_config_is_refused_with_a_name_for_its_own_folder(config, changes, suggestion):
    checkpoint.open_run(config, resumed_step=0)
    with pytest.raises(UserError, match="another config") as error:
        checkpoint.claim(replace(config, **changes))
    assert str(error.value).endswith(suggestion)


def test_fields_that_only_say_when_may_change(config):
    checkpoint.open_run(config, resumed_step=0)
    checkpoint.claim(replace(config, steps=500, save_every=7, keep=9))


def test_records_are_cut_back_to_the_checkpoint_and_torn_lines_go(config, tmp_path):
    checkpoint.open_run(config, resumed_step=0)
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "re'
    )
    checkpoint.open_run(config, resumed_step=2)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_saved_and_loaded_weights_and_optimizer_are_the_same_bits(
    config, trained, random_model, tokenizer
):
    policy, optimizer = trained
    checkpoint.open_run(config, resumed_step=0)
    torch.manual_seed(11)
    save(config, 1, policy, optimizer, tokenizer)
    expected = torch.rand(2)

    other = load_policy(random_model, dtype=torch.float32, device=torch.device("cpu"))
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    newest = checkpoint.newest_whole(config)
    assert newest.name == "step-000001"
    trainer = checkpoint.load(newest, other, other_optimizer)
    assert (trainer["step"], trainer["hours_used"], trainer["processes"], trainer["versions"]) == (
        1,
        0.5,
        1,
        {"torch": "x"},
    )
    assert trainer["config"] == asdict(config)
    assert torch.equal(torch.rand(2), expected), "the random generators were not restored"
    assert torch.equal(flat(policy), flat(other))
    for p, o in (
        (policy, optimizer),
        (other, other_optimizer),
    ):  # one more step shows the optimizer's state
        update(p, o)
    assert torch.equal(flat(policy), flat(other))


def test_the_hf_folder_holds_the_policy(config, trained, tokenizer, tmp_path):
    policy, optimizer = trained
    checkpoint.open_run(config, resumed_step=0)
    save(config, 1, policy, optimizer, tokenizer, torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert loaded.dtype == torch.bfloat16
    for (name, ours), (_, theirs) in zip(
        policy.lm.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert torch.equal(ours.detach().to(torch.bfloat16), theirs), name
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "run" / "hf").eos_token_id
        == tokenizer.eos_token_id
    )


def test_old_checkpoints_go_and_latest_points_at_the_newest(config, trained, tokenizer, tmp_path):
    checkpoint.open_run(config, resumed_step=0)
    for step in (1, 2, 3):
        save(config, step, *trained, tokenizer)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000002", "step-000003"]
    assert (folder / "latest").resolve() == (folder / "step-000003").resolve()


def test_a_full_disk_during_a_save_leaves_the_last_one_in_place(
    config, trained, tokenizer, monkeypatch
):
    checkpoint.open_run(config, resumed_step=0)
    save(config, 1, *trained, tokenizer)
    monkeypatch.setattr(
        checkpoint,
        "save_hf",
        lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError, match="No space left"):
        save(config, 2, *trained, tokenizer)
    assert checkpoint.newest_whole(config).name == "step-000001"


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "one bit": lambda file: file.write_bytes(
        bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    ),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize(
    "pattern", ["state/*.distcp", "hf/model.safetensors", "trainer.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    config, trained, tokenizer, pattern, damage
):
    checkpoint.open_run(config, resumed_step=0)
    for step in (1, 2):
        save(config, step, *trained, tokenizer)
    (file,) = (checkpoint.found(config)[0]).glob(pattern)
    DAMAGE[damage](file)
    said = []
    assert checkpoint.newest_whole(config, said.append).name == "step-000001"
    assert len(said) == 1 and "step-000002 is damaged" in said[0] and file.name in said[0]


def test_a_checkpoint_counts_from_its_commit_on(config, trained, tokenizer):
    checkpoint.open_run(config, resumed_step=0)
    checkpoint.write(config, 1, *trained, tokenizer, torch.float32, hours_used=0, versions={})
    assert checkpoint.newest_whole(config) is None
    checkpoint.commit(config, 1)
    assert checkpoint.newest_whole(config).name == "step-000001"


def test_resume_never_refuses_a_folder_with_checkpoints(config, trained, tokenizer):
    checkpoint.open_run(config, resumed_step=0)
    checkpoint.claim(replace(config, resume="never"))
    save(config, 1, *trained, tokenizer)
    with pytest.raises(UserError, match="--resume never"):
        checkpoint.claim(replace(config, resume="never"))


def test_the_config_is_written_as_it_is_used(config, tmp_path):
    checkpoint.open_run(config, resumed_step=0)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == asdict(config)
