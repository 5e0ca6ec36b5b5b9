"""Checkpoints: complete or absent, and resumed exactly.

    OUT/checkpoints/step-000050/   state/         trained weights and optimizer, sharded
                                   hf/            for transformers, vLLM and eval.py, with a card
                                   adapter/       with LoRA, for peft
                                   trainer.json   step, hours, config, loss scale
                                   pending.jsonl  with --carry-over: groups that wait
                                   manifest.json  checksum of every file
    OUT/checkpoints/latest         -> the newest complete one
    OUT/hf, OUT/adapter            -> its hf/ and adapter/

Trained weights, the optimizer's state, the step number and the loss scale of float16 are all that
the trainer needs to resume, beside the groups of responses that --carry-over has left waiting.
Weights that LoRA freezes come from the model that the run began with.
Rollouts are functions of (seed, step, problem, sample), and the order of the data is one of
(seed, epoch).
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import PreTrainedTokenizerBase

from drgrpo.carry import CarryOver, from_row, to_row
from drgrpo.config import Config
from drgrpo.distributed import gather_lists, shard
from drgrpo.lora import save_adapter
from drgrpo.model import Policy
from drgrpo.run import model_card
from drgrpo.run.files import append_jsonl, read_jsonl, write_json
from drgrpo.run.folder import list_checkpoints
from drgrpo.types import Problem, Rollout


class Progress(NamedTuple):
    """How far a run has come. pending: the responses of groups that wait, with --carry-over."""

    step: int = 0
    hours_used: float = 0.0
    pending: Sequence[Rollout] = ()


def resume(
    config: Config,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    log: Callable[[str], None] = print,
) -> Progress:
    """Fill policy and optimizer from the newest intact checkpoint, written by any number of
    processes. Without one, nothing changes. Collective."""
    path = newest_intact(config.folder, log)
    if path is None:
        return Progress()
    state = trained_state(policy, optimizer)
    dcp.load(state, checkpoint_id=path / "state")
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=state["weights"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),  # frozen weights are not in it
    )
    saved = json.loads((path / "trainer.json").read_text())
    policy.scaler.load_state_dict(saved.get("loss_scale"))
    done = Progress(saved["step"], saved["hours_used"])
    if done.step >= config.steps:
        log(f"{config.out} is complete at step {done.step}: raise --steps, or choose another --out")
    else:
        log(f"resumed from {path} after step {done.step}")
    return done


def carry_over(config: Config, step: int, problems: list[Problem]) -> CarryOver:
    """What the checkpoint of `step` holds of responses that go on. Every process reads all of it,
    so that any number of processes can go on with it. Nothing if there is no such checkpoint."""
    carry = CarryOver(config.carry_over, config.carry_steps, config.steps)
    path = final_path(config, step) / "pending.jsonl"
    if path.exists():
        by_id = {problem.id: problem for problem in problems}
        carry.pending = [from_row(row, by_id) for row in read_jsonl(path)]
    return carry


def trained_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights that are trained, and the optimizer's state, by name."""
    weights, optimizer_state = get_state_dict(policy, optimizer)
    for name, weight in policy.named_parameters(remove_duplicate=False):  # a tied head has two
        if not weight.requires_grad:
            del weights[name]
    return {"weights": weights, "optimizer": optimizer_state}


def newest_intact(out: Path, log: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint in which every file has its checksum. Warns of newer ones that are
    damaged. Collective."""
    for path in list_checkpoints(out):
        damaged = damaged_files(path)
        if not damaged:
            return path
        log(f"WARNING: {path} is damaged ({', '.join(damaged)}): trying the checkpoint before it")
    return None


def damaged_files(path: Path) -> list[str]:
    """Files of a checkpoint that are missing or changed since they were written. Every process
    reads its shard of them."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return ["manifest.json"]
    damaged = [name for name in shard(sorted(manifest)) if checksum(path / name) != manifest[name]]
    return sorted(chain(*gather_lists(damaged)))


def checksum(path: Path) -> str | None:
    """SHA-256 of a file. None if there is no such file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(
    config: Config,
    progress: Progress,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Everything of a checkpoint, under a temporary name. Collective.

    Between this and `commit` the caller writes the step's records. A run that is killed at any
    moment then has both or neither."""
    partial = partial_path(config, progress.step)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(trained_state(policy, optimizer), checkpoint_id=partial / "state")
    save_hf(partial / "hf", policy, tokenizer, getattr(torch, config.dtype))
    if policy.adapter.rank:
        save_adapter(policy.lm, partial / "adapter", write=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        model_card.write(config, progress.step, partial / "hf", "transformers")
        if policy.adapter.rank:
            model_card.write(config, progress.step, partial / "adapter", "peft")
        about: dict[str, Any] = {"step": progress.step, "hours_used": progress.hours_used}
        about |= {"processes": dist.get_world_size(), "config": asdict(config)}
        if scale := policy.scaler.state_dict():
            about["loss_scale"] = scale
        write_json(partial / "trainer.json", about)
        if progress.pending:
            append_jsonl(partial / "pending.jsonl", map(to_row, progress.pending))
    dist.barrier()
    names = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file())
    checksums = [(name, checksum(partial / name)) for name in shard(names)]
    checksums_of_ranks = gather_lists(checksums)
    if dist.get_rank() == 0:
        write_json(partial / "manifest.json", dict(sorted(chain(*checksums_of_ranks))))


def commit(config: Config, step: int) -> None:
    """Give the checkpoint of `step` its final name, which makes it count, link it, and delete the
    oldest. For rank 0, once the step's records are on disk."""
    final = final_path(config, step)
    shutil.rmtree(final, ignore_errors=True)  # a damaged one, or this step would not run again
    partial_path(config, step).rename(final)
    replace_symlink(final.parent / "latest", final.name)
    for name in ["hf", "adapter"] if config.lora_rank else ["hf"]:
        replace_symlink(config.folder / name, f"checkpoints/latest/{name}")
    for old in list_checkpoints(config.folder)[config.keep :]:
        shutil.rmtree(old)


def final_path(config: Config, step: int) -> Path:
    return config.folder / "checkpoints" / f"step-{step:06d}"


def partial_path(config: Config, step: int) -> Path:
    return final_path(config, step).with_suffix(".partial")


def replace_symlink(link: Path, target: str) -> None:
    """Make or move a symbolic link in one step."""
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)


def save_hf(
    path: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    """The policy in `dtype` as a Hugging Face folder. Collective. Rank 0 writes."""
    weights = {}
    for name, tensor in policy.named_weights(dtype):
        if dist.get_rank() == 0:
            weights[name] = tensor.cpu()
    if dist.get_rank() > 0:
        return
    if policy.lm.config.tie_word_embeddings:  # one storage again, which is saved once
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    policy.lm.save_pretrained(path, state_dict=weights)
    described = json.loads((path / "config.json").read_text())
    described["dtype"] = str(dtype).removeprefix("torch.")  # not that of the fp32 master weights
    write_json(path / "config.json", described)
    tokenizer.save_pretrained(path)
