"""Checkpoints are complete or absent. (Exact resume of whole runs: test_resilience.py.)"""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from drgrpo.carry import CarryOver
from drgrpo.config import RECIPES
from drgrpo.model import Objective, load_policy
from drgrpo.pack import Sequence, pack
from drgrpo.run import checkpoint, folder
from drgrpo.run.checkpoint import Progress
from drgrpo.types import BLANK, Completion, Grade, Problem, Rollout


@pytest.fixture
def config(tmp_path):
    config = replace(RECIPES["tiny"](), out=str(tmp_path / "run"), keep=2)
    folder.open_run(config, 0, {})
    return config


@pytest.fixture
def trained(random_model, group_of_one):
    """A policy and an optimizer with state."""
    policy, optimizer = fresh(random_model)
    update(policy, optimizer)
    return policy, optimizer


def fresh(path):
    policy = load_policy(path, Objective(), dtype=torch.float32, device=torch.device("cpu"))
    return policy, torch.optim.AdamW(policy.parameters(), lr=1e-2)


def update(policy, optimizer):
    loss, _ = policy.loss(pack([Sequence([1, 2], [3, 4, 5], [-1.0] * 3, 1.0)]), scale=1.0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def flat(policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def save(config, step, policy, optimizer, tokenizer):
    checkpoint.write(config, Progress(step, 0.5), policy, optimizer, tokenizer)
    checkpoint.commit(config, step)


def newest(config) -> str | None:
    path = checkpoint.newest_intact(config.folder)
    return path and path.name


def test_without_a_checkpoint_nothing_is_resumed(config, trained):
    before = flat(trained[0])
    assert checkpoint.resume(config, *trained)[:2] == (0, 0.0)
    assert torch.equal(flat(trained[0]), before)


def test_resumed_weights_and_optimizer_are_the_same_bits(config, trained, random_model, tokenizer):
    policy, optimizer = trained
    save(config, 1, policy, optimizer, tokenizer)
    other, other_optimizer = fresh(random_model)
    logged = []
    assert checkpoint.resume(config, other, other_optimizer, logged.append)[:2] == (1, 0.5)
    assert logged == [f"resumed from {config.out}/checkpoints/step-000001 after step 1"]
    assert torch.equal(flat(policy), flat(other))
    update(policy, optimizer)  # one more step shows the optimizer's state
    update(other, other_optimizer)
    assert torch.equal(flat(policy), flat(other))


def test_groups_that_wait_are_kept_for_any_number_of_processes(config, trained, tokenizer):
    config = replace(config, carry_over=0.25, carry_steps=3, steps=9)
    problems = [Problem(i, "q", "a", [1, i]) for i in range(3)]
    completions = [
        Completion([5], [-1 / 3], True),
        Completion([5, 6], [-0.1] * 2, False, open=True),
    ]
    pending = [
        Rollout(problems[2], c, "text", Grade(1.0, True), seed=i, step=1)
        for i, c in enumerate(completions)
    ]
    checkpoint.write(config, Progress(1, 0.5, pending), *trained, tokenizer)
    assert checkpoint.carry_over(config, 1, problems).pending == [], "it does not count yet"
    checkpoint.commit(config, 1)
    save(config, 2, *trained, tokenizer)
    assert checkpoint.carry_over(config, 1, problems) == CarryOver(0.25, 3, 9, pending)
    for step in (0, 2):
        assert checkpoint.carry_over(config, step, problems) == CarryOver(0.25, 3, 9)
    assert not list(config.folder.glob("checkpoints/step-000002/pending.jsonl"))


def test_trainer_json_holds_what_the_weights_came_from(config, trained, tokenizer):
    save(config, 1, *trained, tokenizer)
    path = config.folder / "checkpoints" / "latest" / "trainer.json"
    expected = {"step": 1, "hours_used": 0.5, "processes": 1, "config": asdict(config)}
    assert json.loads(path.read_text()) == expected


def test_the_hf_folder_holds_the_policy(config, trained, tokenizer):
    config = replace(config, dtype="bfloat16")
    save(config, 1, *trained, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(config.folder / "hf")
    assert loaded.dtype == torch.bfloat16
    saved = dict(loaded.named_parameters())
    for name, ours in trained[0].lm.named_parameters():
        assert torch.equal(ours.detach().to(torch.bfloat16), saved[name]), name
    with safe_open(config.folder / "hf" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys(), "a tied head is saved once"  # noqa: SIM118
    eos = AutoTokenizer.from_pretrained(config.folder / "hf").eos_token_id
    assert eos == tokenizer.eos_token_id


def test_the_manifest_holds_the_files_of_every_process(config, trained, tokenizer, monkeypatch):
    monkeypatch.setattr(checkpoint, "gather_lists", lambda files: [files, [("other", "sum")]])
    checkpoint.write(config, Progress(1, 0.0), *trained, tokenizer)
    manifest = json.loads((checkpoint.partial_path(config, 1) / "manifest.json").read_text())
    assert manifest["other"] == "sum" and {"trainer.json", "hf/README.md"} <= manifest.keys()


def test_other_ranks_write_no_weights(trained, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 1)
    checkpoint.save_hf(tmp_path / "hf", trained[0], tokenizer, torch.float32)
    assert not (tmp_path / "hf").exists()


def test_a_save_starts_over_where_a_killed_one_left_something(config, trained, tokenizer):
    """Under the temporary name, or under the final one, where files were damaged."""
    for name in ("step-000001", "step-000001.partial"):
        (config.folder / "checkpoints" / name / "hf").mkdir(parents=True)
    save(config, 1, *trained, tokenizer)
    assert newest(config) == "step-000001"


def test_old_checkpoints_go_and_latest_points_at_the_newest(config, trained, tokenizer):
    for step in (1, 2, 3):
        save(config, step, *trained, tokenizer)
    checkpoints = config.folder / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step-000002", "step-000003"]
    assert (checkpoints / "latest").resolve() == (checkpoints / "step-000003").resolve()


def test_a_full_disk_during_a_save_leaves_the_last_one_in_place(
    config, trained, tokenizer, monkeypatch
):
    save(config, 1, *trained, tokenizer)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_hf", full)
    with pytest.raises(OSError, match="No space left"):
        save(config, 2, *trained, tokenizer)
    assert newest(config) == "step-000001"


def flip_a_bit(file):
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "one bit": flip_a_bit,
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize(
    "pattern",
    ["state/*.distcp", "hf/model.safetensors", "trainer.json", "pending.jsonl", "manifest.json"],
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    config, trained, tokenizer, pattern, damage
):
    for step in (1, 2):
        pending = [Rollout(Problem(0, "", ""), BLANK, "")]
        checkpoint.write(config, Progress(step, 0.5, pending), *trained, tokenizer)
        checkpoint.commit(config, step)
    (file,) = (config.folder / "checkpoints" / "step-000002").glob(pattern)
    DAMAGE[damage](file)
    logged = []
    assert checkpoint.newest_intact(config.folder, logged.append).name == "step-000001"
    (line,) = logged
    assert "step-000002 is damaged" in line and file.name in line


def test_a_checkpoint_counts_from_its_commit_on(config, trained, tokenizer):
    checkpoint.write(config, Progress(1, 0.0), *trained, tokenizer)
    assert newest(config) is None
    checkpoint.commit(config, 1)
    assert newest(config) == "step-000001"
